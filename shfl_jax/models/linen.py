"""Linen: finding the layers of a model, and running it with compressed kernels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from pallas_kernels import Matrix
from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.models._axes import contraction_axes, split_arrays, tie_batch_axes
from shfl_jax.models._contraction import as_tuple, check_convolution, contract, convolve, moved_batch_axes
from shfl_jax.models._plan import Plan
from shfl_jax.sparse import layers, matrices

__all__ = ["apply", "resolve"]


def resolve(plan: Plan, model: nn.Module, *example_inputs: Any, **apply_kwargs: Any) -> dict[str, LayerSpec]:
    """Finds the kernels a plan prunes and the axes they contract, by tracing the model. Nothing is computed.

    Args:
        plan: the rules.
        model: a Linen module.
        *example_inputs: what `model.apply` gets after the variables: arrays, `jax.ShapeDtypeStruct`, or static values.
        **apply_kwargs: further arguments of `model.apply`, such as `method=` or `train=True`.

    Returns:
        path within 'params' -> spec.

    Raises:
        ValueError: a rule matches no kernel, or a kernel's axes cannot be told; the text names path, shape and fix.
    """
    key = jax.random.key(0)
    rngs = apply_kwargs.pop("rngs", {"params": key})
    mutable = apply_kwargs.pop("mutable", nn.DenyList("params"))
    init_kwargs = {name: value for name, value in apply_kwargs.items() if name != "capture_intermediates"}
    arrays, rebuild = split_arrays((example_inputs, apply_kwargs, init_kwargs))

    def init(arrays: list[jax.Array]) -> Any:
        inputs, _, kwargs = rebuild(arrays)
        return model.init(rngs if "params" in rngs else key, *inputs, **kwargs)

    variables = jax.eval_shape(init, arrays)
    shapes = path_leaves(variables["params"])

    def apply(params: dict[str, jax.Array], others: Any, arrays: list[jax.Array]) -> Any:
        inputs, kwargs, _ = rebuild(arrays)
        merged = {**others, "params": update_paths(variables["params"], params)}
        with nn.intercept_methods(_tie_batch_axes):
            return model.apply(merged, *inputs, rngs=rngs, mutable=mutable, **kwargs)

    others = {name: tree for name, tree in variables.items() if name != "params"}
    matched = list(plan.assign(shapes))
    axes = contraction_axes(apply, shapes, matched, others, arrays)
    return plan.specs(shapes, axes)


def apply(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a model with compressed kernels. Like `model.apply`, it is for the caller to jit.

    Calls of `nn.Dense`, `nn.DenseGeneral` (attention's projections too) and `nn.Conv` whose kernel is compressed become
    row-grouped products and convolutions; everything else, layers left dense included, runs as it is. `method=`,
    `rngs=`, `mutable=`, `nn.scan`, `nn.vmap` and `nn.remat` work as usual. Differentiable with respect to
    `variables['params']`.

    Args:
        model: the unmodified module.
        variables: {'params', 'topology'} of `compress` or `load`, and the model's other collections ('batch_stats').
        *args: as in `model.apply`.
        **kwargs: as in `model.apply`. `mutable=True` means every collection but 'params'.

    Returns:
        What `model.apply` returns.

    Raises:
        ValueError: `variables` are not compressed, an input does not fit, or 'params' is to be mutable.
        NotImplementedError: a compressed kernel inside a module of another kind, or whose axes that module's way of
            stacking layers moves; the text names it and the fix.
    """
    mutable = kwargs.get("mutable", False)
    if mutable is True:
        kwargs["mutable"] = nn.DenyList("params")
    elif flax.core.scope.in_filter(mutable, "params"):
        raise ValueError("compressed 'params' cannot be mutable; leave them out of `mutable`")
    specs = {path: layer.spec for path, layer in layers(variables).items()}
    kernels = {
        path: _Kernel(moved_batch_axes(matrix, specs[path]), specs[path])
        for path, matrix in matrices(variables).items()
    }
    merged = {name: tree for name, tree in variables.items() if name not in ("params", "topology")}
    merged["params"] = update_paths(variables["params"], kernels)
    with nn.intercept_methods(_run_compressed):
        return model.apply(merged, *args, **kwargs)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["spec"])
@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A compressed kernel where the model expects an array, so that scan and vmap slice all its arrays alike."""

    matrix: Matrix
    spec: LayerSpec


def _run_compressed(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    kernel = module.get_variable("params", "kernel") if module.scope is not None else None
    kernel = kernel.unbox() if isinstance(kernel, nn.meta.AxisMetadata) else kernel
    if not isinstance(kernel, _Kernel):
        return call(*args, **kwargs)
    spec, conv = kernel.spec, _is_conv(context)
    if not (conv or _is_dense(context)):
        raise NotImplementedError(
            f"{spec.path} {spec.shape}: a {type(module).__name__} cannot run with a compressed kernel, only nn.Dense, "
            "nn.DenseGeneral and nn.Conv can. Map it to None in the plan to keep it dense"
        )
    operation = "conv_general_dilated" if conv else "dot_general"
    if getattr(module, operation) is not None or getattr(module, f"{operation}_cls") is not None:
        raise NotImplementedError(
            f"{spec.path} {spec.shape}: a layer with its own {operation} cannot run with a compressed kernel. Map it "
            "to None in the plan to keep it dense"
        )
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, values, bias = module.promote_dtype(
        _input(*args, **kwargs), kernel.matrix.values, nn.meta.unbox(bias), dtype=module.dtype
    )
    matrix = dataclasses.replace(kernel.matrix, values=values)
    if conv:
        check_convolution(module, spec)
        return convolve(
            matrix,
            x,
            bias,
            spec,
            kernel_size=module.kernel_size,
            strides=module.strides,
            padding=module.padding,
            dilation=module.kernel_dilation,
            precision=module.precision,
        )
    return contract(
        matrix,
        x,
        bias,
        spec,
        axis=as_tuple(getattr(module, "axis", -1)),
        features=as_tuple(module.features),
        batch_dims=as_tuple(getattr(module, "batch_dims", ())),
        precision=module.precision,
    )


def _tie_batch_axes(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    if _is_dense(context) or _is_conv(context):
        kernel = nn.meta.unbox(context.module.get_variable("params", "kernel"))
        return call(tie_batch_axes(jnp.asarray(_input(*args, **kwargs)), kernel))
    return call(*args, **kwargs)


def _is_dense(context: nn.module.InterceptorContext) -> bool:
    return _is_call(context, nn.Dense) or _is_call(context, nn.DenseGeneral)


def _is_conv(context: nn.module.InterceptorContext) -> bool:
    """Whether this is a call of a convolution; `nn.ConvLocal` has the same `__call__`."""
    return _is_call(context, nn.Conv) and context.module.shared_weights


def _is_call(context: nn.module.InterceptorContext, layer: type[nn.Module]) -> bool:
    """Whether this is a call of such a layer, with the layer's own `__call__`."""
    return context.method_name == "__call__" and type(context.module).__call__ is layer.__call__


def _input(inputs: Any) -> Any:
    """The one argument of a layer, by position or by name."""
    return inputs
