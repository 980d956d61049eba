"""The product of a row-grouped matrix and activations: validation, dispatch over the backends, derivatives.

A convolution (`conv2d`) is the same operation with another gather, and takes the same way.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _two_four as two_four
from pallas_kernels._activations import ACTIVATIONS
from pallas_kernels._matrix import RowGrouped, Topology
from pallas_kernels._window import Window
from pallas_kernels.gpu import _layout as layout
from pallas_kernels.mosaic import _conv as mosaic_gpu_conv
from pallas_kernels.mosaic import _matmul as mosaic_gpu
from pallas_kernels.triton import _conv as triton_conv
from pallas_kernels.triton import _matmul as triton
from pallas_kernels.xla import _conv as xla_conv
from pallas_kernels.xla import _matmul as xla

Layout = Literal["token_major", "feature_major"]
LAYOUTS = ("token_major", "feature_major")


# A backend is a module with forward, grad_values, grad_input and prepare over 2-D activations. It may have `pays`,
# which says whether its forward product is worth taking for a call that asks for none by name, and `ADDS`, which says
# that its forward product takes an addend, for matrices without 2:4.
BACKENDS: dict[str, ModuleType] = {"mosaic_gpu": mosaic_gpu, "triton": triton, "xla": xla}
# The same for convolutions, over activations (C, H, W, B) and without prepare: it does not depend on the operation.
CONV_BACKENDS: dict[str, ModuleType] = {"mosaic_gpu": mosaic_gpu_conv, "triton": triton_conv, "xla": xla_conv}
# What `implementation=None` tries on each platform, fastest first; every other platform uses XLA.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("mosaic_gpu", "triton")}
FALLBACK = "xla"


class Call(NamedTuple):
    """The static half of a call; with a window it is a convolution, whose output is (M, N) too."""

    activation: str | None
    layout: Layout
    implementation: str | None
    precision: lax.PrecisionLike
    window: Window | None = None

    @property
    def backends(self) -> dict[str, ModuleType]:
        """The implementations of this operation."""
        return BACKENDS if self.window is None else CONV_BACKENDS

    @property
    def options(self) -> dict[str, Any]:
        """What every function of a backend is told."""
        geometry = {"layout": self.layout} if self.window is None else {"window": self.window}
        return geometry | {"precision": self.precision}


def matmul(
    matrix: RowGrouped,
    x: jax.Array,
    *,
    bias: jax.Array | None = None,
    addend: jax.Array | None = None,
    activation: str | None = None,
    layout: Layout = "token_major",
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Computes activation(W x + bias + addend) for a row-grouped W.

    Differentiable in `matrix.values`, `x`, `bias` and `addend`; `vmap` also maps over a stacked matrix. Accumulates in
    float32. Second derivatives need `implementation="xla"`: Pallas kernels have none, not even where XLA would run.

    Args:
        matrix: W, (M, K), canonical or from `prepare`.
        x: activations, floating: (*tokens, K) token-major, (K, *tokens) feature-major.
        bias: (M,) floating.
        addend: floating, of the result's shape: the other branch of a residual connection.
        activation: None, "relu", "gelu" (the tanh approximation) or "silu".
        layout: "token_major" or "feature_major", of the input and of the output.
        implementation: a name in `BACKENDS`; None takes the fastest one of the platform that can do it.
        precision: as in `jax.lax.dot_general`.

    Returns:
        (*tokens, M) token-major, (M, *tokens) feature-major, in the promoted dtype of the values and `x`.

    Raises:
        ValueError: a shape, a dtype or a name is wrong.
        NotImplementedError: the implementation asked for by name cannot do this product.
    """
    _validate(matrix, x, bias, addend, activation, layout, implementation)
    topology, dtype = matrix.topology, jnp.result_type(matrix.values, x)
    if layout == "token_major":
        tokens, flat = x.shape[:-1], x.reshape(-1, topology.k)
    else:
        tokens, flat = x.shape[1:], x.reshape(topology.k, -1)
    # Casting out here leaves the gradients' way back to the dtypes of the arguments to JAX.
    values, flat, bias, addend = jax.tree.map(lambda a: a.astype(dtype), (matrix.values, flat, bias, addend))
    if addend is not None:
        addend = addend.reshape((-1, topology.m) if layout == "token_major" else (topology.m, -1))
    y = run(Call(activation, layout, implementation, precision), topology, values, flat, bias, addend)
    return y.reshape(*tokens, topology.m) if layout == "token_major" else y.reshape(topology.m, *tokens)


def prepare(matrix: RowGrouped, implementation: str | None = None, window: Window | None = None) -> RowGrouped:
    """Arranges a canonical matrix for one implementation, once and on the host. It stands for the same weights.

    Args:
        matrix: a canonical matrix; leading axes (stacked layers) are allowed.
        implementation: a name in `BACKENDS`; None takes the first choice of the default backend's platform.
        window: the geometry of the convolution that the matrix is for, of images of one size: its kernel on a GPU then
            need not work out where the slots point in every call. None for products, and where images vary.

    Returns:
        The same matrix in the implementation's own arrangement. Only `matmul`, `conv2d` and `to_dense` read it.

    Raises:
        ValueError: the implementation is unknown, the matrix is prepared already, or the window does not fit it.
    """
    _check_implementation(implementation)
    if matrix.topology.counts is not None or matrix.topology.places is not None:
        raise ValueError("the matrix is prepared already: prepare the canonical one, as compressed or loaded")
    if window is not None and (window.features != matrix.topology.k or matrix.values.ndim > 2):
        raise ValueError(f"values {matrix.values.shape} of a matrix {matrix.shape} are no filters for {window}")
    if implementation is not None:
        prepared = two_four.call(BACKENDS[implementation], "prepare", matrix)
    else:
        platform = jax.default_backend()  # JAX calls CUDA "gpu" here, and "cuda" where it lowers
        names = PREFERENCE.get("cuda" if platform == "gpu" else platform, ())
        prepared = _first_able(BACKENDS, names, "prepare", matrix)
    if window is None or (window.is_matmul and prepared.topology.counts is None):
        return prepared
    places = jax.jit(layout.slot_places, static_argnums=1)(prepared.topology, window)
    return RowGrouped(prepared.values, dataclasses.replace(prepared.topology, places=places, window=window))


def _validate(matrix, x, bias, addend, activation, layout, implementation) -> None:
    topology = matrix.topology
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    arrays = {"values": matrix.values, "x": x, "bias": bias, "addend": addend}
    validate_operands(matrix, arrays, activation, implementation)
    axis, wanted = (-1, f"(*tokens, {topology.k})") if layout == "token_major" else (0, f"({topology.k}, *tokens)")
    if x.ndim == 0 or x.shape[axis] != topology.k:
        raise ValueError(
            f"x must have shape {wanted} in {layout} layout for a matrix of shape {matrix.shape}, got {x.shape}"
        )
    if bias is not None and bias.shape != (topology.m,):
        raise ValueError(f"bias must have shape ({topology.m},) for a matrix of shape {matrix.shape}, got {bias.shape}")
    result = (*x.shape[:-1], topology.m) if layout == "token_major" else (topology.m, *x.shape[1:])
    if addend is not None and addend.shape != result:
        raise ValueError(f"addend must have the result's shape {result}, got {addend.shape}")


def validate_operands(
    matrix: RowGrouped, arrays: dict[str, jax.Array | None], activation: str | None, implementation: str | None
) -> None:
    """Checks what all operations share: the names, the values' shape, and that all arrays are floating.

    Raises:
        ValueError: one of them is wrong.
    """
    topology = matrix.topology
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    _check_implementation(implementation)
    if matrix.values.ndim != 2:
        raise ValueError(
            f"values of shape {matrix.values.shape} are a stacked matrix: map over its leading axes with jax.vmap"
        )
    if matrix.values.shape != (topology.num_values, topology.group_size):
        raise ValueError(
            f"values must have shape {(topology.num_values, topology.group_size)} (values of a row, group size) "
            f"to fit their topology, got {matrix.values.shape}"
        )
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}: cast it first")


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(f"implementation must be None or one of {tuple(BACKENDS)}, got {implementation!r}")


def _first_able(backends: dict[str, ModuleType], names: tuple[str, ...], function: str, *args, **kwargs):
    """Calls `function` of the first implementation named that does not raise NotImplementedError, else of XLA."""
    for name in names:
        pays = getattr(backends[name], "pays", None)
        if (
            function == "forward"
            and pays is not None
            and not pays(*args[:2], kwargs.get("layout", kwargs.get("window")))
        ):
            continue
        try:
            return _call(backends[name], function, *args, **kwargs)
        except NotImplementedError:
            continue
    return _call(backends[FALLBACK], function, *args, **kwargs)


def _call(backend: ModuleType, function: str, *args, addend=None, **kwargs) -> Any:
    """Calls a function of a backend; one whose `forward` takes no addend gets it added behind its product."""
    if addend is None:
        return two_four.call(backend, function, *args, **kwargs)
    if getattr(backend, "ADDS", False) and args[0].topology.pairs is None:
        return two_four.call(backend, function, *args, addend=addend, **kwargs)
    y = two_four.call(backend, function, *args, **(kwargs | {"activation": None}))
    return ACTIVATIONS[kwargs["activation"]](y + addend)


def _dispatch(function: str, call: Call, *args, addend: jax.Array | None = None, **kwargs) -> jax.Array:
    """Runs one backend function. The platform is chosen when lowering, so that export from a CPU works."""
    kwargs |= call.options
    if call.implementation is not None:
        return _call(call.backends[call.implementation], function, *args, addend=addend, **kwargs)

    def first_able(names: tuple[str, ...], addend: jax.Array | None, *args) -> jax.Array:
        return _first_able(call.backends, names, function, *args, addend=addend, **kwargs)

    branches = {platform: functools.partial(first_able, names) for platform, names in PREFERENCE.items()}
    return lax.platform_dependent(addend, *args, default=functools.partial(first_able, ()), **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    call: Call,
    topology: Topology,
    values: jax.Array,
    x: jax.Array,
    bias: jax.Array | None,
    addend: jax.Array | None,
) -> jax.Array:
    matrix = RowGrouped(values, topology)
    return _dispatch("forward", call, matrix, x, bias, addend=addend, activation=call.activation)


def _matmul_fwd(call: Call, topology, values, x, bias, addend):
    y = _dispatch("forward", call, RowGrouped(values, topology), x, bias, addend=addend, activation=None)
    # With an activation its argument is the residual; without one nothing of the output is kept.
    pre, has_addend = None if call.activation is None else y, None if addend is None else ()
    return ACTIVATIONS[call.activation](y), (topology, values, x, bias, has_addend, pre)


def _matmul_bwd(call: Call, residuals, dy):
    topology, values, x, bias, has_addend, pre = residuals
    if pre is not None:
        dy = jax.vjp(ACTIVATIONS[call.activation], pre)[1](dy)[0]
    dvalues = _dispatch("grad_values", call, topology, x, dy)
    dx = _dispatch("grad_input", call, RowGrouped(values, topology), dy)
    token_axis = 0 if call.layout == "token_major" else 1
    dbias = None
    if bias is not None:
        dbias = dy.sum(token_axis, dtype=jnp.promote_types(dy.dtype, jnp.float32)).astype(bias.dtype)
    return None, dvalues.astype(values.dtype), dx.astype(x.dtype), dbias, None if has_addend is None else dy


_product.defvjp(_matmul_fwd, _matmul_bwd)
run = jax.jit(_product, static_argnums=0)
