"""Pruning as an Optax transformation: masks live in the optimizer's state, the training step stays as it was."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shfl_jax._layers import LayerSpec
from shfl_jax.patterns import magnitude
from shfl_jax.pruning._masking import Matrices, PruneState, float32_like, hard, layers_of, search
from shfl_jax.pruning._schedules import Schedule
from shfl_jax.sparse import Masks

SCORES = ("magnitude", "taylor")


def prune(
    inner: optax.GradientTransformation,
    specs: Mapping[str, LayerSpec] | Iterable[LayerSpec],
    schedule: Schedule,
    allocation: str | Mapping[str, float] = "uniform",
    score: Literal["magnitude", "taylor"] = "magnitude",
    score_decay: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that training prunes, gradually if the schedule says so.

    Whenever the schedule says, masks are computed from the scores of the parameters, starting from the masks in force;
    Shfl-BW's row permutation is searched for the target sparsity when a layer is first pruned, and again only where the
    schedule asks for it (`search_every`), starting from the one in force. Gradients of pruned weights never reach the
    inner optimizer; where a weight is pruned or comes back, its moments start from zero (arrays of other shapes than
    the parameter, such as Adafactor's factored moments, are left alone); and the update of a pruned weight is minus its
    value, so that it is exactly zero after `optax.apply_updates` as long as the parameters are finite. A layer with a
    non-finite weight or score keeps its mask and counts that in `PruneState.skipped`.

    Wrap it outermost, inside `optax.MultiSteps` only: anything that scales the updates later breaks the exact zeros.
    The masks are updated inside `lax.cond` with fixed shapes: nothing is compiled again, no callback is made.

    Args:
        inner: the optimizer.
        specs: what `shfl_jax.linen.resolve` or `shfl_jax.nnx.resolve` returned.
        schedule: when, and how far; `one_shot`, `cubic`, `linear`, `stages`, `grow_and_prune` or any `Schedule`.
        allocation: how sparsity is spread over layers, a `method` of `shfl_jax.allocate`. "global" ranks anew at every
            update of the masks.
        score: what a weight is worth. "magnitude", or "taylor": its first-order effect on the loss, (gradient times
            weight)^2, averaged over the steps (Molchanov et al., "Importance Estimation for Neural Network Pruning",
            CVPR 2019, arXiv 1906.10771). That takes one float32 array of the kernel's shape a layer, in
            `PruneState.memory`; a step whose gradient is not finite adds nothing.
        score_decay: of Taylor scores: what is left of the average a step later, in [0, 1).

    Returns:
        The transformation; its state is a `PruneState`. Its `update` needs the parameters.

    Raises:
        ValueError: an unknown score or a decay outside [0, 1); from `init` and `update`, the parameters lack a layer or
            it has another shape than its spec; from `update`, no parameters, or an allocation that the schedule does
            not allow.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    if not 0 <= score_decay < 1:
        raise ValueError(f"score_decay must lie in [0, 1), got {score_decay}")
    layers = layers_of(specs)
    by_path = {spec.path: spec for spec in layers}

    def find(step: jax.Array, scores: Matrices, masks: Masks) -> dict[str, Any]:
        return search(step, scores, by_path, masks, schedule, allocation)

    def magnitudes(kernels: Matrices, gradients: Matrices, memory: Any) -> Matrices:
        return {path: magnitude(by_path[path].to_matrix(kernel)) for path, kernel in kernels.items()}

    def recalled(kernels: Matrices, gradients: Matrices, memory: Matrices) -> Matrices:
        return {path: by_path[path].to_matrix(total) for path, total in memory.items()}

    def average(kernels: Matrices, gradients: Matrices, memory: Matrices) -> Matrices:
        averages = {}
        for path, old in memory.items():
            effect = (gradients[path].astype(jnp.float32) * kernels[path].astype(jnp.float32)) ** 2
            new = score_decay * old + (1 - score_decay) * effect
            averages[path] = jnp.where(jnp.isfinite(effect).all(), new, old)
        return averages

    if score == "magnitude":
        return hard(inner, layers, schedule, scores=magnitudes, find=find)
    return hard(
        inner,
        layers,
        schedule,
        scores=recalled,
        find=find,
        remember=average,
        memory=lambda params: float32_like(params, layers),
    )


def masks(opt_state: Any) -> Masks:
    """The masks in an optimizer's state, wherever in it the pruning method is.

    Args:
        opt_state: the state of any optimizer that contains `prune` or another pruning method; also the `opt_state` of
            an `nnx.Optimizer`.

    Returns:
        The masks in force; those of several methods (for different parts of a model) together.

    Raises:
        ValueError: there is no `PruneState` in it, or two of them hold masks of the same layer.
    """
    found = [state.masks for state in prune_states(opt_state)]
    merged = Masks({path: mask for part in found for path, mask in part.items()}, sum((p.specs for p in found), ()))
    if len(merged) < sum(map(len, found)):
        raise ValueError("two `prune`s in this state hold masks of the same layer; give each layer to one of them")
    return merged


def prune_states(opt_state: Any) -> list[PruneState]:
    """Every `PruneState` in an optimizer's state, in order, with plain arrays as leaves.

    Raises:
        ValueError: there is none.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, PruneState))
    found = [nnx.as_pure(leaf) for leaf in leaves if isinstance(leaf, PruneState)]
    if not found:
        raise ValueError(f"no PruneState in an optimizer state of type {type(opt_state).__name__}; wrap with prune")
    return found


def sparse_params(params: optax.Params, state: Any) -> optax.Params:
    """The parameters with every pruned weight set to zero: what is to be evaluated and compressed. jit-able.

    Under hard pruning the trained parameters are sparse already; averages of them (EMA) are not. Soft methods
    (`straight_through`, `admm`) train dense parameters, and this is what their masks make of them.

    Args:
        params: parameters of the tree that is trained.
        state: the optimizer's state.

    Raises:
        ValueError: the state holds no masks, or the parameters lack one of their layers.
    """
    return masks(state).apply(params)
