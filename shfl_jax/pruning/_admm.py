"""Pruning by the alternating direction method of multipliers (ADMM)."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves
from shfl_jax.pruning._masking import Matrices, elements, float32_like, layers_of, soft
from shfl_jax.pruning._prune import prune_states
from shfl_jax.pruning._schedules import Schedule
from shfl_jax.sparse import Masks


class ADMMMemory(NamedTuple):
    """What `admm` remembers, in `PruneState.memory`.

    Attributes:
        sums: path -> W + U at the last update of the masks, float32 in the shape of the kernel. Z is this where the
            mask keeps a weight and zero elsewhere, the new U is the rest of it: one array holds both.
        rho: path -> float32 scalar, the weight of the layer's penalty; 0 before the first update of its mask.
    """

    sums: dict[str, jax.Array]
    rho: dict[str, jax.Array]


def admm(
    inner: optax.GradientTransformation,
    specs: Mapping[str, LayerSpec] | Iterable[LayerSpec],
    schedule: Schedule,
    rho: float = 1e-3,
    allocation: str | Mapping[str, float] = "uniform",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that a penalty pulls dense weights towards sparse ones.

    The loss is minimised over weights W and sparse Z with W = Z (Zhang et al., "A Systematic DNN Weight Pruning
    Framework using Alternating Direction Method of Multipliers", ECCV 2018, arXiv 1804.03294), with scaled multipliers
    U. Training minimises the loss plus `admm_penalty`, rho / 2 ||W - Z + U||^2, over W; whenever the schedule says, Z
    becomes what the pattern keeps of W + U by magnitude, and U becomes W + U - Z. The training step adds the penalty:

        grads = jax.grad(lambda params: loss(params, batch) + shfl_jax.pruning.admm_penalty(params, opt_state))(params)
        updates, opt_state = tx.update(grads, opt_state, params)

    The masks in the state are those of Z: a step that the schedule names begins with new ones, step 0 with those that
    `init` finds. Parameters stay dense and moments are left alone; evaluate and compress
    `shfl_jax.pruning.sparse_params`, then fine-tune. A layer with a non-finite weight keeps its mask, Z and U and
    counts that in `PruneState.skipped`.

    Args:
        inner: the optimizer.
        specs: what `shfl_jax.linen.resolve` or `shfl_jax.nnx.resolve` returned.
        schedule: when, and how far; `constant` gives the target at once and updates Z and U.
        rho: the weight of the penalty. Which one is right depends on the loss and on the learning rate.
        allocation: how sparsity is spread over layers, a `method` of `shfl_jax.allocate`.

    Returns:
        The transformation; its state is a `PruneState`, whose memory is an `ADMMMemory`. Its `update` needs the
        parameters.

    Raises:
        ValueError: rho is not positive; from `init` and `update` as `prune`.
    """
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    layers = layers_of(specs)

    def target(kernels: Matrices, masks: Masks, memory: ADMMMemory) -> Matrices:
        # At first nothing is pruned, so that U is zero.
        return {
            path: kernels[path].astype(jnp.float32) + jnp.where(keep, 0, memory.sums[path])
            for path, keep in elements(masks).items()
        }

    def remember(target: Matrices, finite: dict[str, jax.Array], memory: ADMMMemory) -> ADMMMemory:
        sums = {path: jnp.where(finite[path], new, memory.sums[path]) for path, new in target.items()}
        return ADMMMemory(sums, {path: jnp.where(finite[path], jnp.float32(rho), memory.rho[path]) for path in target})

    return soft(
        inner,
        layers,
        schedule,
        allocation,
        adjust=lambda gradients, kernels, masks: gradients,
        target=target,
        remember=remember,
        memory=lambda params: ADMMMemory(float32_like(params, layers), {spec.path: jnp.float32(0) for spec in layers}),
    )


def admm_penalty(params: optax.Params, opt_state: Any) -> jax.Array:
    """The augmented term of the loss, rho / 2 ||W - Z + U||^2 over all layers: a float32 scalar, differentiable.

    Args:
        params: the parameters.
        opt_state: the optimizer's state, with an `admm` in it.

    Raises:
        ValueError: no `admm` in the state, or the parameters lack one of its layers.
    """
    states = [state for state in prune_states(opt_state) if isinstance(state.memory, ADMMMemory)]
    if not states:
        raise ValueError("there is no `admm` in this optimizer state; wrap the optimizer with it")
    leaves, total = path_leaves(params), jnp.float32(0)
    for state in states:
        for path, keep in elements(state.masks).items():
            if path not in leaves:
                raise ValueError(f"the parameters have no {path!r}; pass the tree that the optimizer was made for")
            # Z - U: the two are nowhere both other than zero.
            goal = jnp.where(keep, state.memory.sums[path], -state.memory.sums[path])
            total += state.memory.rho[path] / 2 * jnp.sum((leaves[path].astype(jnp.float32) - goal) ** 2)
    return total
