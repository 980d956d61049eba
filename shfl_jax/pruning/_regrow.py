"""Regrowth: masks that exchange weights during training and keep their number."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax

from shfl_jax._layers import LayerSpec
from shfl_jax.patterns import Mask, Vectors, group_scores, magnitude, scaled
from shfl_jax.pruning._masking import Matrices, hard, layers_of, search
from shfl_jax.pruning._schedules import Constant, Schedule
from shfl_jax.sparse import Masks


def regrow(
    inner: optax.GradientTransformation,
    specs: Mapping[str, LayerSpec] | Iterable[LayerSpec],
    schedule: Schedule,
    drop: float = 0.3,
    allocation: str | Mapping[str, float] = "uniform",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the masks of a sparse model move to where gradients are large.

    RigL (Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134), as
    `SparseRigLOptimizer` in `rigl/sparse_optimizers.py` of `google-research/rigl` has it, by columns of row groups
    instead of single weights: whenever the schedule says, a share of every layer's kept vectors is dropped, those of
    the least magnitude, and as many are grown where the gradient is largest, dropped ones among them. Vectors that are
    grown start from zero, with zero moments; the number kept never changes, nor does the row permutation. The share
    falls from `drop` to zero by a cosine while the schedule's fraction rises from 0 to 1.

    Like `prune` this is a hard method, with exact zeros after every update. A layer that is whole at an update of the
    masks is pruned to its target, by magnitude; the schedule's first update does that. Gradients must not be masked
    elsewhere: growth needs those of pruned weights.

    Args:
        inner: the optimizer.
        specs: what `shfl_jax.linen.resolve` or `shfl_jax.nnx.resolve` returned; only patterns with `vectors`, which are
            `VW` and `ShflBW`.
        schedule: when, and how far the share has fallen; `linear` from the start of training to its last quarter, say.
        drop: the share at first, in [0, 1].
        allocation: how sparsity is spread over layers, a `method` of `shfl_jax.allocate`.

    Returns:
        The transformation; its state is a `PruneState`. Its `update` needs the parameters.

    Raises:
        ValueError: a share outside [0, 1], or a pattern that does not keep columns of row groups; from `init` and
            `update` as `prune`.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop is the share of vectors that are exchanged and must lie in [0, 1], got {drop}")
    layers = layers_of(specs)
    by_path = {spec.path: spec for spec in layers}
    for spec in layers:
        if spec.pattern.vectors is None:
            raise ValueError(
                f"{spec.path} {spec.shape}: regrow exchanges columns of row groups, which {spec.pattern!r} does not "
                "keep; use VW or ShflBW, or prune this layer by `shfl_jax.pruning.prune`"
            )
    whole = Constant(0, 1)

    def scores(kernels: Matrices, gradients: Matrices, memory: None) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {
            path: (magnitude(spec.to_matrix(kernels[path])), magnitude(spec.to_matrix(gradients[path])))
            for path, spec in by_path.items()
        }

    def find(step: jax.Array, scores: dict[str, tuple[jax.Array, jax.Array]], masks: Masks) -> dict[str, Mask]:
        share = drop / 2 * (1 + jnp.cos(jnp.pi * schedule(step)))
        pruned = search(step, {path: first for path, (first, _) in scores.items()}, by_path, masks, whole, allocation)
        found = {}
        for path, spec in by_path.items():
            move = _exchange
            for _ in spec.batch_axes:
                move = jax.vmap(move, in_axes=(None, 0, 0, 0, None, 0))
            found[path] = move(spec.pattern.vectors, *scores[path], masks[path], share, pruned[path])
        return found

    return hard(inner, layers, schedule, scores=scores, find=find)


def _exchange(
    vectors: Vectors, weights: jax.Array, gradients: jax.Array, mask: Mask, share: jax.Array, pruned: Mask
) -> Mask:
    """Drops and grows vectors of one matrix: magnitudes of weights and gradients (M, K); `pruned` where it is whole."""
    strong, steep = (group_scores(values, mask.rows, vectors.group_size) for values in (weights, gradients))
    count = mask.kept.sum(dtype=jnp.int32)
    staying = count - scaled(count, share)
    stay = vectors.choose(jnp.where(mask.kept, strong, 0), staying) & mask.kept
    # What stays ranks before all that can grow, so that the pattern's own choice keeps its floors and equal counts.
    kept = vectors.choose(jnp.where(stay, jnp.inf, steep), count)
    return jax.tree.map(functools.partial(jnp.where, mask.kept.all()), pruned, Mask(mask.rows, kept, mask.m))
