"""Straight-through training: the loss sees sparse weights, the optimizer keeps dense ones."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import optax

from shfl_jax._layers import LayerSpec
from shfl_jax.pruning._masking import Matrices, elements, layers_of, soft
from shfl_jax.pruning._schedules import Schedule
from shfl_jax.sparse import Masks


def straight_through(
    inner: optax.GradientTransformation,
    specs: Mapping[str, LayerSpec] | Iterable[LayerSpec],
    schedule: Schedule,
    decay: float = 2e-4,
    allocation: str | Mapping[str, float] = "uniform",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that pruned weights go on learning, and can come back.

    Sparse-refined straight-through (SR-STE; Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks
    From Scratch", ICLR 2021, arXiv 2102.04010), as `devkit/sparse_ops/sparse_ops.py` of `aojunzz/NM-sparsity` has it,
    for any pattern: the loss and its gradient are those of the sparse weights, the gradient goes straight to the dense
    ones, and pruned weights w get `decay * w` on top. The training step takes the gradient *at* the sparse parameters:

        grads = jax.grad(loss)(shfl_jax.pruning.sparse_params(params, opt_state), batch)
        updates, opt_state = tx.update(grads, opt_state, params)

    The state always holds the masks for the next step, computed from its weights: a step that the schedule names
    begins with new masks, step 0 with those that `init` finds. Parameters stay dense and moments are left alone;
    evaluate and compress `shfl_jax.pruning.sparse_params`. A layer with a non-finite weight keeps its mask and counts
    that in `PruneState.skipped`. The updates must reach the parameters unchanged, also inside `optax.MultiSteps` and
    the like.

    Args:
        inner: the optimizer.
        specs: what `shfl_jax.linen.resolve` or `shfl_jax.nnx.resolve` returned.
        schedule: when, and how far; `constant` gives the target at once and masks that follow the weights.
        decay: lambda, of the pruned weights; 0 is the plain straight-through estimator.
        allocation: how sparsity is spread over layers, a `method` of `shfl_jax.allocate`.

    Returns:
        The transformation; its state is a `PruneState`. Its `update` needs the parameters.

    Raises:
        ValueError: a negative decay; from `init` and `update` as `prune`.
    """
    if not decay >= 0:
        raise ValueError(f"decay pulls pruned weights to zero and must not be negative, got {decay}")

    def adjust(gradients: Matrices, kernels: Matrices, masks: Masks) -> Matrices:
        return {
            path: gradients[path] + jnp.where(keep, 0, decay * kernels[path]).astype(gradients[path].dtype)
            for path, keep in elements(masks).items()
        }

    def target(kernels: Matrices, masks: Masks, memory: None) -> Matrices:
        return {path: kernel.astype(jnp.float32) for path, kernel in kernels.items()}

    return soft(inner, layers_of(specs), schedule, allocation, adjust=adjust, target=target)
