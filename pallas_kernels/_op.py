"""The product of a row-grouped matrix and activations: validation, the choice of a backend, derivatives.

A convolution (`conv2d`) is the same operation with another gather, and takes the same way.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _devices as devices
from pallas_kernels._activations import ACTIVATIONS, activate, activation_gradient
from pallas_kernels._backend import BACKENDS, Backend, Call, Layout, Op, Problem, check, choose, register
from pallas_kernels._layout import Matrix, MatrixLayout, Prepared, as_prepared
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._promotion import standard_promotion
from pallas_kernels._window import Window
from pallas_kernels.mosaic._backend import Mosaic
from pallas_kernels.triton._backend import Triton
from pallas_kernels.xla import _differentiable as differentiable
from pallas_kernels.xla._backend import XLA

LAYOUTS = ("token_major", "feature_major")
TOKENS = (8, 4096)  # few and many: `prepare` asks for a kernel for one of them

FALLBACK = XLA()
for _backend in (FALLBACK, Triton(), Mosaic()):
    register(_backend)


@dataclasses.dataclass(frozen=True)
class Route:
    """Who may compute a call. Static, so that a backend registered later is not missed by what is compiled already.

    Attributes:
        named: the backend asked for by name.
        backends: all of them, in the order in which they are considered.
    """

    named: Backend | None
    backends: tuple[Backend, ...]

    def on(self, platform: str) -> tuple[Backend, ...]:
        """The backends considered on a platform; the last one does everything."""
        return *(backend for backend in self.backends if platform in backend.platforms), FALLBACK

    def __str__(self) -> str:
        """What the caller asked for."""
        return f"implementation={None if self.named is None else self.named.name!r}"


def matmul(
    matrix: Matrix,
    x: Float[Array, "..."],
    *,
    bias: Float[Array, " M"] | None = None,
    addend: Float[Array, "..."] | None = None,
    activation: str | None = None,
    layout: Layout = "token_major",
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "..."]:
    """Computes activation(W x + bias + addend) for a row-grouped W.

    Differentiable in the matrix's values, `x`, `bias` and `addend`; `vmap` also maps over a stacked matrix. Accumulates
    in float32. Forward mode and second derivatives need `implementation="xla"`: Pallas kernels have none, not even
    where XLA would run.

    Args:
        matrix: W, (M, K), canonical or from `prepare`.
        x: activations, floating: (*tokens, K) token-major, (K, *tokens) feature-major.
        bias: (M,) floating.
        addend: floating, of the result's shape: the other branch of a residual connection.
        activation: None, "relu", "gelu" (the tanh approximation) or "silu".
        layout: "token_major" or "feature_major", of the input and of the output.
        implementation: the name of a backend: "xla", "triton", "mosaic_gpu" or a registered one. None takes the fastest
            one of the platform that can do it. Derivatives that the backend has no kernel for are another's.
        precision: as in `jax.lax.dot_general`.

    Returns:
        (*tokens, M) token-major, (M, *tokens) feature-major, in the promoted dtype of the values and `x`.

    Raises:
        ValueError: a shape, a dtype or a name is wrong.
        TypeError: an argument is no array.
        NotImplementedError: the implementation asked for by name cannot do this product; the text says why.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    route = checked_route(implementation)
    prepared = checked_matrix(matrix, {"x": x, "bias": bias, "addend": addend}, activation)
    m, k = matrix.shape
    axis, wanted = (-1, f"(*tokens, {k})") if layout == "token_major" else (0, f"({k}, *tokens)")
    if x.ndim == 0 or x.shape[axis] != k:
        raise ValueError(
            f"x must have shape {wanted} in {layout} layout for a matrix of shape {matrix.shape}, got {x.shape}"
        )
    tokens = x.shape[:-1] if layout == "token_major" else x.shape[1:]
    result = (*tokens, m) if layout == "token_major" else (m, *tokens)
    check_added(matrix, bias, addend, result)
    flat = x.reshape((-1, k) if layout == "token_major" else (k, -1))
    if addend is not None:
        addend = addend.reshape((-1, m) if layout == "token_major" else (m, -1))
    return run(Call(activation, layout, precision), route, prepared, flat, bias, addend).reshape(result)


def prepare(matrix: RowGrouped, implementation: str | None = None, window: Window | None = None) -> Prepared:
    """Arranges a canonical matrix for one implementation, once and on the host. It stands for the same weights.

    Args:
        matrix: a canonical matrix; leading axes (stacked layers) are allowed.
        implementation: as in `matmul`; None takes the first choice of the default backend's platform.
        window: the geometry of the convolution that the matrix is for, of images of one size: its kernel on a GPU then
            need not work out where the slots point in every call. None for products, and where images vary.

    Returns:
        The same matrix in the implementation's own arrangement. Only `matmul`, `conv2d` and `to_dense` read it.

    Raises:
        ValueError: the implementation is unknown, the matrix is prepared already, or the window does not fit it.
        NotImplementedError: the implementation asked for by name has no kernels for such a matrix.
    """
    route = checked_route(implementation)
    if isinstance(matrix, Prepared):
        raise ValueError("the matrix is prepared already: prepare the canonical one, as compressed or loaded")
    if window is not None and (window.features != matrix.topology.k or matrix.values.ndim > 2):
        raise ValueError(f"values {matrix.values.shape} of a matrix {matrix.shape} are no filters for {window}")
    if route.named is not None:
        if reasons := _why_not_for(route.named, matrix, window):
            raise NotImplementedError(
                f"{implementation} has no kernel for {matrix.dtype.name} matrices of shape {matrix.shape} in groups of "
                f"{matrix.topology.group_size} rows: {'; '.join(reasons)}"
            )
        return route.named.prepare(matrix, window)
    platform = jax.default_backend()  # JAX calls CUDA "gpu" here, and "cuda" where it lowers
    backends, gpu = route.on("cuda" if platform == "gpu" else platform), devices.gpu()
    able = (backend for backend in backends if not backend.missing(gpu) and not _why_not_for(backend, matrix, window))
    return next(able).prepare(matrix, window)


def _why_not_for(backend: Backend, matrix: RowGrouped, window: Window | None) -> list[str]:
    """Why a backend has no kernel for a matrix that it arranged; empty where it has one, for few tokens or many."""
    topology = matrix.topology
    found = []
    for n in TOKENS:
        sizes = topology.m, topology.k, n * (1 if window is None else window.output_pixels), topology.num_slots
        kind = matrix.dtype.name, topology.equal_counts, topology.pairs is not None, window
        found.append(backend.why_not(Problem("forward", *sizes, topology.group_size, *kind)))
    return min(found, key=len)


def checked_route(implementation: str | None) -> Route:
    """Who may compute a call for a value of `implementation=`.

    Raises:
        ValueError: there is no such backend.
    """
    if implementation is not None and implementation not in BACKENDS:
        raise ValueError(f"implementation must be None or one of {tuple(BACKENDS)}, got {implementation!r}")
    named = None if implementation is None else BACKENDS[implementation]
    return Route(named, tuple(BACKENDS.values()))


def checked_matrix(matrix: Matrix, arrays: dict[str, jax.Array | None], activation: str | None) -> Prepared:
    """Checks what all operations share: the activation's name, the values' shape, and that all arrays are floating.

    Returns:
        The matrix as kernels read it.

    Raises:
        ValueError: one of them is wrong.
        TypeError: one is no array.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    for name, array in ({"values": matrix.values} | arrays).items():
        if array is not None and not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, got a {type(array).__name__}: wrap it in jnp.asarray")
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}: cast it first")
        if array is not None and array.dtype.itemsize < 2:
            raise ValueError(f"{name} must be floating, of 16 bits or more, got {array.dtype}: cast it first")
    if matrix.values.ndim != 2:
        raise ValueError(
            f"values of shape {matrix.values.shape} are a stacked matrix: map over its leading axes with jax.vmap"
        )
    prepared = as_prepared(matrix)
    expected = prepared.layout.num_values, prepared.layout.group_size
    if matrix.values.shape != expected:
        raise ValueError(
            f"values must have shape {expected} (values of a row, group size) to fit their topology, "
            f"got {matrix.values.shape}"
        )
    return prepared


def check_added(matrix: Matrix, bias: jax.Array | None, addend: jax.Array | None, result: tuple[int, ...]) -> None:
    """Checks the shapes of what is added to a product.

    Raises:
        ValueError: one does not fit the matrix or the result.
    """
    if bias is not None and bias.shape != (matrix.shape[0],):
        raise ValueError(f"bias must have shape ({matrix.shape[0]},) for a matrix of {matrix.shape}, got {bias.shape}")
    if addend is not None and addend.shape != result:
        raise ValueError(f"addend must have the result's shape {result}, got {addend.shape}")


def run(
    call: Call, route: Route, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None
) -> jax.Array:
    """Computes a call whose arguments are checked, (N, M) or (M, N) in the promoted dtype of the values and x."""
    # Casting out here leaves the gradients' way back to the dtypes of the arguments to JAX.
    cast = operator.methodcaller("astype", jnp.result_type(matrix.values, x))
    values, x, bias, addend = jax.tree.map(cast, (matrix.values, x, bias, addend))
    prepared = Prepared(values, matrix.layout)
    if route.named == FALLBACK:
        return _jitted_xla(call, prepared, x, bias, addend)
    try:
        return _jitted(call, route, prepared, x, bias, addend)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(f"{route} has no forward mode, only XLA has: use implementation='xla'") from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    call: Call, route: Route, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None
) -> jax.Array:
    return _forward(call, route, matrix, x, bias, addend)


@standard_promotion()
def _forward(call: Call, route: Route, matrix: Prepared, *arrays: Any) -> jax.Array:
    def forward(backend: Backend, matrix: Prepared, *arrays: Any) -> jax.Array:
        return backend.forward(call, matrix, *arrays)

    return _dispatch("forward", call, route, arrays[0], forward, matrix, *arrays)


def _once(compute: Callable[..., Any], route: Route) -> Callable[..., Any]:
    """The same function, whose derivative is an error that says which implementation has one."""

    @jax.custom_jvp
    def once(*operands: Any) -> Any:
        return compute(*operands)

    @once.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(f"{route} has no second derivatives, only XLA has: use implementation='xla'")

    return once


def _dispatch(
    op: Op, call: Call, route: Route, x: jax.Array, compute: Callable[..., jax.Array], *operands: Any
) -> jax.Array:
    """Runs `compute(backend, *operands)` with the backend of a call. The platform is chosen when lowering.

    So export from a CPU works. The first operand is a matrix or its layout.
    """
    layout: MatrixLayout = operands[0].layout if isinstance(operands[0], Prepared) else operands[0]
    problem, gpu = Problem.of_layout(op, layout, call.tokens(x), x.dtype, call.window), devices.gpu()
    if route.named is not None:
        if op == "forward":
            check(route.named, problem, gpu)
            return compute(route.named, *operands)
        if choose(problem, [route.named], gpu) is not None:
            return compute(route.named, *operands)

    def branch(platform: str) -> Callable[..., jax.Array]:
        return functools.partial(compute, choose(problem, route.on(platform), gpu))

    platforms = {platform for backend in route.backends for platform in backend.platforms}
    branches = {platform: branch(platform) for platform in sorted(platforms)}
    return lax.platform_dependent(*operands, default=functools.partial(compute, FALLBACK), **branches)


@standard_promotion()
def _product_fwd(
    call: Call, route: Route, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None
) -> tuple[jax.Array, Any]:
    plain = functools.partial(_forward, dataclasses.replace(call, activation=None), route)
    y = _once(plain, route)(matrix, x, bias, addend)
    # With an activation its argument is the residual; without one nothing of the output is kept.
    pre, has_addend = None if call.activation is None else y, None if addend is None else ()
    return activate(call.activation, y), (matrix, x, bias, has_addend, pre)


@standard_promotion()
def _product_bwd(call: Call, route: Route, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    matrix, x, bias, has_addend, pre = residuals
    if pre is not None:
        dy = activation_gradient(call.activation, pre, dy)

    def grad_values(backend: Backend, layout: MatrixLayout, x: jax.Array, dy: jax.Array) -> jax.Array:
        return backend.grad_values(call, layout, x, dy)

    def grad_input(backend: Backend, matrix: Prepared, dy: jax.Array) -> jax.Array:
        return backend.grad_input(call, matrix, dy)

    def derivatives(matrix: Prepared, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        dvalues = _dispatch("grad_values", call, route, x, grad_values, matrix.layout, x, dy)
        return dvalues.astype(x.dtype), _dispatch("grad_input", call, route, x, grad_input, matrix, dy).astype(x.dtype)

    dvalues, dx = _once(derivatives, route)(matrix, x, dy)
    token_axis = 0 if call.layout == "token_major" else 1
    dbias = None
    if bias is not None:
        dbias = dy.sum(token_axis, dtype=jnp.promote_types(dy.dtype, jnp.float32)).astype(bias.dtype)
    return Prepared(dvalues, None), dx, dbias, None if has_addend is None else dy  # pyrefly: ignore[bad-argument-type]


_product.defvjp(_product_fwd, _product_bwd)
_jitted = jax.jit(_product, static_argnums=(0, 1))
_jitted_xla = jax.jit(standard_promotion()(differentiable.forward), static_argnums=0)
