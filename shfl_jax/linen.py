"""Linen: finding the layers of a model, and running it with compressed kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from shfl_jax.axes import contraction_axes, tie_batch_axes
from shfl_jax.layers import LayerSpec
from shfl_jax.paths import path_leaves, update_paths
from shfl_jax.plan import Plan


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
    leaves, treedef = jax.tree.flatten((example_inputs, apply_kwargs, init_kwargs))
    traced = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def arguments(arrays: dict[int, jax.Array]) -> Any:
        return jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])

    def init(arrays: dict[int, jax.Array]) -> Any:
        inputs, _, kwargs = arguments(arrays)
        return model.init(rngs if "params" in rngs else key, *inputs, **kwargs)

    variables = jax.eval_shape(init, traced)
    shapes = path_leaves(variables["params"])

    def apply(params: dict[str, jax.Array], others: Any, arrays: dict[int, jax.Array]) -> Any:
        inputs, kwargs, _ = arguments(arrays)
        merged = {**others, "params": update_paths(variables["params"], params)}
        with nn.intercept_methods(_tie_batch_axes):
            return model.apply(merged, *inputs, rngs=rngs, mutable=mutable, **kwargs)

    others = {name: tree for name, tree in variables.items() if name != "params"}
    matched = list(plan.assign(shapes))
    axes = contraction_axes(apply, shapes, matched, others, traced)
    return plan.specs({path: leaf.shape for path, leaf in shapes.items()}, axes)


def _tie_batch_axes(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    if _is_call(context, nn.Dense) or _is_call(context, nn.DenseGeneral):
        (x, *args) = args
        return call(tie_batch_axes(jnp.asarray(x), context.module.get_variable("params", "kernel")), *args, **kwargs)
    return call(*args, **kwargs)


def _is_call(context: nn.module.InterceptorContext, layer: type[nn.Module]) -> bool:
    """Whether this is a call of such a layer, with the layer's own `__call__`."""
    return context.method_name == "__call__" and type(context.module).__call__ is layer.__call__
