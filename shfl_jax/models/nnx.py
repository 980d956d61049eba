"""NNX: finding the layers of a model, and replacing them by compressed ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

import pallas_kernels
from pallas_kernels import Matrix
from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.models._axes import contraction_axes, split_arrays, tie_batch_axes
from shfl_jax.models._contraction import as_tuple, check_convolution, contract, convolve, moved_batch_axes
from shfl_jax.models._plan import Plan
from shfl_jax.sparse import Masks, compress, layers, matrices

__all__ = ["SparseConv", "SparseLinear", "Topology", "resolve", "sparsify"]


def resolve(plan: Plan, model: nnx.Module, *example_inputs: Any, **call_kwargs: Any) -> dict[str, LayerSpec]:
    """Finds the kernels a plan prunes and the axes they contract, by tracing the model. Nothing is computed.

    Args:
        plan: the rules.
        model: an NNX module; an abstract one (`nnx.eval_shape`) will do. It is left as it is.
        *example_inputs: what the model is called with: arrays, `jax.ShapeDtypeStruct`, or static values.
        **call_kwargs: further arguments of the call.

    Returns:
        path -> spec; a path is the attributes that lead to the kernel, joined by '/'.

    Raises:
        ValueError: a rule matches no kernel, two paths lead to one Variable (tied weights), or a kernel's axes cannot
            be told; the text names path, shape and fix.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    shapes = path_leaves(params)
    matched = list(plan.assign(shapes))
    _check_untied(model, matched, shapes)
    arrays, rebuild = split_arrays((example_inputs, call_kwargs))

    def call(kernels: dict[str, jax.Array], rest: Any, arrays: list[jax.Array]) -> Any:
        merged = nnx.merge(graph, update_paths(params, kernels), rest)
        for _, module in nnx.iter_graph(merged):
            if isinstance(module, nnx.Linear | nnx.LinearGeneral) and not getattr(module, "dot_general_cls", None):
                module.dot_general = _tied(module.dot_general or jax.lax.dot_general)
            elif isinstance(module, nnx.Conv):
                module.conv_general_dilated = _tied(module.conv_general_dilated)
        args, kwargs = rebuild(arrays)
        return merged(*args, **kwargs)

    return plan.specs(shapes, contraction_axes(call, shapes, matched, rest, arrays))


def sparsify(
    model: nnx.Module,
    masks: Masks,
    *,
    tokens: int | Sequence[int] | Mapping[str, int | Sequence[int]] = (),
    dtype: DTypeLike | None = None,
) -> nnx.Module:
    """Compresses a model. On the host.

    Args:
        model: the model that the masks belong to. It is left as it is.
        masks: the masks to apply.
        tokens: as in `shfl_jax.compress`, which also says what stays dense.
        dtype: as in `shfl_jax.compress`.

    Returns:
        A new model in which every compressed `nnx.Linear` or `nnx.LinearGeneral` is a `SparseLinear`, and every
        compressed `nnx.Conv` a `SparseConv`.

    Raises:
        ValueError: as `shfl_jax.compress`.
        NotImplementedError: a compressed kernel inside a module of another kind; the text names it and the fix.
    """
    model = nnx.clone(model)
    params = nnx.state(model, nnx.Param)
    _check_untied(model, list(masks), path_leaves(params))
    sparse = compress(params, masks, tokens=tokens, dtype=dtype)
    compressed = matrices(sparse)
    dense = {path: leaf for path, leaf in path_leaves(sparse["params"]).items() if path not in compressed}
    nnx.update(model, update_paths(params, dense))
    owners = {_spell(path): (path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    for path, matrix in compressed.items():
        keys, layer = owners[path.rpartition("/")[0]]
        kind: Any = SparseConv if type(layer).__call__ is nnx.Conv.__call__ else SparseLinear
        replacement = kind(layer, matrix, layers(sparse)[path].spec)
        if not keys:
            return replacement
        parent: Any = model
        for key in keys[:-1]:
            parent = _child(parent, key)
        if isinstance(keys[-1], str) and hasattr(parent, keys[-1]):
            setattr(parent, keys[-1], replacement)
        else:
            parent[keys[-1]] = replacement
    return model


class Topology(nnx.Variable[Any]):
    """The Variable type of a compressed kernel's integers, so that no filter for `nnx.Param` finds them."""


class _Sparse(nnx.Module):
    """What layers with a compressed kernel share.

    Attributes:
        kernel: `nnx.Param`, the values (P, V), with leading axes for stacked layers.
        topology: `Topology`, the integers of the matrix.
        bias: the layer's `nnx.Param`, or None.
        spec: the layer's `LayerSpec`.
    """

    def __init__(self, layer: Any, matrix: Matrix, spec: LayerSpec) -> None:
        matrix = moved_batch_axes(matrix, spec)
        self.kernel = nnx.Param(matrix.values)
        self.topology = Topology(matrix.integers)
        self.bias = layer.bias
        self.spec = spec
        self.dtype = layer.dtype
        self.precision = layer.precision
        self.promote_dtype = layer.promote_dtype
        self.preferred_element_type = layer.preferred_element_type

    def _operands(self, inputs: jax.Array, out_sharding: Any) -> tuple[Matrix, jax.Array, jax.Array | None]:
        """The matrix, the inputs and the bias in the dtype of the computation."""
        if out_sharding is not None or self.preferred_element_type is not None:
            raise NotImplementedError(f"{self.spec.path}: out_sharding and preferred_element_type need a dense kernel")
        bias = None if self.bias is None else self.bias[...]
        x, values, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return pallas_kernels.join(values, self.topology.get_value()), x, bias


class SparseLinear(_Sparse):
    """An `nnx.Linear` or `nnx.LinearGeneral` with a compressed kernel; `sparsify` makes them."""

    def __init__(self, layer: Any, matrix: Matrix, spec: LayerSpec) -> None:
        """Takes over a layer.

        Raises:
            NotImplementedError: the layer is of another kind, or has its own dot_general.
        """
        kind = type(layer)
        own = getattr(layer, "dot_general", None) not in (None, jax.lax.dot_general)
        own |= getattr(layer, "dot_general_cls", None) is not None
        if kind.__call__ not in (nnx.Linear.__call__, nnx.LinearGeneral.__call__) or own:
            raise NotImplementedError(
                f"{spec.path} {spec.shape}: a {kind.__name__}{' with its own dot_general' if own else ''} cannot run "
                "with a compressed kernel, only nnx.Linear, nnx.LinearGeneral and nnx.Conv can. Map it to None in the "
                "plan to keep it dense"
            )
        super().__init__(layer, matrix, spec)
        self.axis = as_tuple(getattr(layer, "axis", -1))
        self.batch_dims = tuple(getattr(layer, "batch_axis", ()))
        self.features = as_tuple(layer.out_features)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Runs the layer.

        Raises:
            ValueError: the inputs do not fit.
            NotImplementedError: an `out_sharding` or `preferred_element_type` is asked for.
        """
        return contract(
            *self._operands(inputs, out_sharding),
            self.spec,
            axis=self.axis,
            features=self.features,
            batch_dims=self.batch_dims,
            precision=self.precision,
        )


class SparseConv(_Sparse):
    """An `nnx.Conv` with a compressed kernel; `sparsify` makes them."""

    def __init__(self, layer: nnx.Conv, matrix: Matrix, spec: LayerSpec) -> None:
        """Takes over a layer.

        Raises:
            NotImplementedError: the layer has its own conv_general_dilated, a mask, or a dilated input.
        """
        if layer.conv_general_dilated is not jax.lax.conv_general_dilated:
            raise NotImplementedError(
                f"{spec.path} {spec.shape}: a Conv with its own conv_general_dilated cannot run with a compressed "
                "kernel. Map it to None in the plan to keep it dense"
            )
        check_convolution(layer, spec)
        super().__init__(layer, matrix, spec)
        self.kernel_size = layer.kernel_size
        self.strides = layer.strides
        self.padding = layer.padding
        self.dilation = layer.kernel_dilation

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Runs the layer.

        Raises:
            ValueError: the inputs do not fit.
            NotImplementedError: three spatial axes, or an `out_sharding` or `preferred_element_type` is asked for.
        """
        return convolve(
            *self._operands(inputs, out_sharding),
            self.spec,
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            precision=self.precision,
        )


def _check_untied(model: nnx.Module, kernels: list[str], shapes: dict[str, Any]) -> None:
    for group in nnx.find_duplicates(model):
        first, second = (_spell(path) for path in group[:2])
        for kernel in kernels:
            for prefix, other in ((first, second), (second, first)):
                if kernel == prefix or kernel.startswith(f"{prefix}/"):
                    raise ValueError(
                        f"tied weights: {kernel!r} and {other + kernel[len(prefix) :]!r} are one Variable of shape "
                        f"{shapes[kernel].shape}; map it to None in the plan, or give each path its own"
                    )


def _tied(operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def wrapped(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return operation(tie_batch_axes(x, kernel), kernel, *args, **kwargs)

    return wrapped


def _child(node: Any, key: Any) -> Any:
    return getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]


def _spell(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))
