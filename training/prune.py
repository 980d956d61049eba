"""Pruning as an Optax transformation: masks live in the optimizer's state, the training step stays as it was."""

import collections
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from shfl_jax.allocation import allocate
from shfl_jax.layers import LayerSpec
from shfl_jax.masks import Mask, Masks
from shfl_jax.paths import path_leaves, update_paths
from shfl_jax.patterns import Pattern, ShflBW
from shfl_jax.scores import magnitude
from training.schedules import Schedule

BATCH_WEIGHTS = 2**26
"""Weights of equal layers that one batch of the mask search takes: bounds its memory, and fills an accelerator."""


class PruneState(NamedTuple):
    """State of `prune`. Shapes and dtypes never change.

    Attributes:
        step: int32 scalar, updates done.
        masks: the masks in force.
        skipped: path -> int32 scalar, mask updates a layer has sat out because its weights were not finite.
        inner_state: state of the inner optimizer.
    """

    step: jax.Array
    masks: Masks
    skipped: dict[str, jax.Array]
    inner_state: optax.OptState


def prune(
    inner: optax.GradientTransformation,
    specs: Mapping[str, LayerSpec] | Iterable[LayerSpec],
    schedule: Schedule,
    allocation: str | Mapping[str, float] = "uniform",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that training prunes by magnitude, gradually if the schedule says so.

    Whenever the schedule says, masks are computed from the magnitudes of the parameters, starting from the masks in
    force; Shfl-BW's row permutation is searched once, for the target sparsity, when a layer is first pruned. Gradients
    of pruned weights never reach the inner optimizer; where a weight is pruned or comes back, its moments start from
    zero (arrays of other shapes than the parameter, such as Adafactor's factored moments, are left alone); and the
    update of a pruned weight is minus its value, so that it is exactly zero after `optax.apply_updates` as long as the
    parameters are finite. A layer with a non-finite weight keeps its mask and counts that in `PruneState.skipped`.

    Wrap it outermost, inside `optax.MultiSteps` only: whatever scales the updates afterwards breaks the exact zeros.
    The masks are updated inside `lax.cond` with fixed shapes: nothing is compiled again, no callback is made.

    Args:
        inner: the optimizer.
        specs: what `shfl_jax.linen.resolve` or `shfl_jax.nnx.resolve` returned.
        schedule: when, and how far; `one_shot`, `cubic` or any `Schedule`.
        allocation: how sparsity is spread over layers, a `method` of `shfl_jax.allocate`. "global" ranks anew at every
            update of the masks.

    Returns:
        The transformation; its state is a `PruneState`. Its `update` needs the parameters.

    Raises:
        ValueError: from `init` and `update`, the parameters lack a layer or it has another shape than its spec; from
            `update`, no parameters.
    """
    layers = tuple(specs.values()) if isinstance(specs, Mapping) else tuple(specs)
    by_path = {spec.path: spec for spec in layers}
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> PruneState:
        # `optax.tree_utils.tree_map_params` calls init with a placeholder, a tree without leaves.
        if jax.tree.leaves(params):
            _kernels(params, layers)
        masks = Masks({spec.path: _keep_all(spec) for spec in layers}, layers)
        skipped = {spec.path: jnp.zeros((), jnp.int32) for spec in layers}
        return PruneState(jnp.zeros((), jnp.int32), masks, skipped, inner.init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError("prune needs the parameters: call update(grads, state, params)")
        kernels, _ = _kernels(params, layers), _kernels(updates, layers)

        def refresh(masks: Masks, skipped: dict, inner_state: Any) -> tuple[Masks, dict, Any]:
            scores = {path: magnitude(by_path[path].to_matrix(kernel)) for path, kernel in kernels.items()}
            finite = {path: jnp.isfinite(score).all() for path, score in scores.items()}
            scores = {path: jnp.where(finite[path], score, 0) for path, score in scores.items()}
            found = _search(scores, by_path, masks, schedule(state.step), allocation)
            chosen = {
                path: jax.tree.map(lambda new, old, ok=finite[path]: jnp.where(ok, new, old), found[path], masks[path])
                for path in found
            }
            new_masks = Masks(chosen, layers)
            old, new = _elements(masks), _elements(new_masks)
            inner_state = _zero_moments(inner, inner_state, params, {path: old[path] & new[path] for path in new})
            return new_masks, {path: skipped[path] + ~finite[path] for path in skipped}, inner_state

        masks, skipped, inner_state = jax.lax.cond(
            schedule.is_update(state.step), refresh, lambda *same: same, state.masks, state.skipped, state.inner_state
        )
        updates, inner_state = inner.update(masks.apply(updates), inner_state, params, **extra_args)
        proposed = _kernels(updates, layers)
        updates = update_paths(
            updates, {path: jnp.where(keep, proposed[path], -kernels[path]) for path, keep in _elements(masks).items()}
        )
        return updates, PruneState(state.step + 1, masks, skipped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def masks(opt_state: Any) -> Masks:
    """The masks in an optimizer's state, wherever `prune` stands in it.

    Args:
        opt_state: the state of any optimizer that contains `prune`; also the `opt_state` of an `nnx.Optimizer`.

    Returns:
        The masks in force; those of several `prune`s (different parts of a model) together.

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

    Under hard pruning the trained parameters are sparse already; averages of them (EMA) are not.

    Args:
        params: parameters of the tree that is trained.
        state: the optimizer's state.

    Raises:
        ValueError: the state holds no masks, or the parameters lack one of their layers.
    """
    return masks(state).apply(params)


def _kernels(tree: Any, layers: tuple[LayerSpec, ...]) -> dict[str, jax.Array]:
    leaves = path_leaves(tree)
    for spec in layers:
        if spec.path not in leaves:
            raise ValueError(
                f"prune: there is no {spec.path!r} among the parameters; pass those the specs were resolved from, and "
                f"let no outer `optax.masked` hide a layer that is pruned (they are {sorted(leaves)})"
            )
        if tuple(jnp.shape(leaves[spec.path])) != spec.shape:
            raise ValueError(
                f"prune: {spec.path!r} has shape {jnp.shape(leaves[spec.path])} but its spec says {spec.shape}; "
                "resolve the plan again for this model"
            )
    return {spec.path: leaves[spec.path] for spec in layers}


def _keep_all(spec: LayerSpec) -> Mask:
    """The mask that keeps everything, in the shapes that the pattern's own masks have."""
    (m, _), pattern = spec.matrix_shape, spec.pattern
    shapes = jax.eval_shape(pattern.mask, jax.ShapeDtypeStruct(spec.matrix_shape, jnp.float32), 1)
    rows = np.minimum(np.arange(shapes.rows.shape[-1], dtype=np.int32), m)
    rows = np.broadcast_to(rows, (*spec.batch_shape, *rows.shape))
    kept = jnp.ones((*spec.batch_shape, *shapes.kept.shape), bool)
    if shapes.order is None or shapes.choice is None:
        return Mask(jnp.asarray(rows), kept, m)
    order = np.minimum(np.arange(shapes.order.shape[-1], dtype=np.int32), spec.matrix_shape[1])
    order = jnp.broadcast_to(order, (*spec.batch_shape, *shapes.order.shape))
    return Mask(jnp.asarray(rows), kept, m, order, jnp.ones((*spec.batch_shape, *shapes.choice.shape), bool))


def _elements(masks: Masks) -> dict[str, jax.Array]:
    """Which weights are kept, in the shapes of the kernels."""
    return {spec.path: spec.from_matrix(masks[spec.path].elements()) for spec in masks.specs}


def _search(
    scores: dict[str, jax.Array],
    specs: dict[str, LayerSpec],
    previous: Masks,
    progress: jax.Array,
    allocation: str | Mapping[str, float],
) -> dict[str, Mask]:
    """New masks of all layers. Layers of one shape and pattern are searched together: one program, not one each."""
    counts, targets = (allocate(scores, specs, fraction, allocation) for fraction in (progress, 1.0))
    alike = collections.defaultdict(list)
    for path, spec in specs.items():
        alike[spec.pattern, spec.matrix_shape].append(path)
    found = {}
    for (pattern, shape), paths in alike.items():
        stacks = [
            _flatten((scores[p], previous[p]), specs[p].batch_shape)
            + jax.tree.map(
                lambda count, p=p: jnp.broadcast_to(count, specs[p].batch_shape).reshape(-1), (counts[p], targets[p])
            )
            for p in paths
        ]
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
        batch = min(stacked[0].shape[0], max(1, BATCH_WEIGHTS // int(np.prod(shape))))
        masks = _choose(pattern, *stacked, batch=batch)
        start = 0
        for path in paths:
            batch_shape = specs[path].batch_shape
            end = start + int(np.prod(batch_shape))
            found[path] = jax.tree.map(
                lambda a, start=start, end=end, shape=batch_shape: a[start:end].reshape(*shape, *a.shape[1:]), masks
            )
            start = end
    return found


def _flatten(tree: Any, batch_shape: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(batch_shape) :]), tree)


def _choose(pattern: Pattern, scores: jax.Array, previous: Mask, count: Any, target: Any, *, batch: int) -> Mask:
    """The new masks of a stack of matrices: scores (B, M, K), counts (B,), `batch` of them at a time."""
    if not isinstance(pattern, ShflBW):
        choose = functools.partial(jax.lax.map, lambda args: pattern.mask(args[0], args[2], args[1]), batch_size=batch)
        return choose((scores, previous, count))
    # Rows are grouped once, for the target, when a layer is first pruned: weights that were pruned in one company
    # would stay zero in another, and every change of company costs what had been learned since the last.
    free = previous.kept.all((-1, -2))
    search = functools.partial(jax.lax.map, lambda args: pattern.mask(*args).rows, batch_size=batch)
    found = jax.lax.cond(free.any(), search, lambda args: args[2].rows, (scores, target, previous))
    rows = jnp.where(free[:, None], found, previous.rows)
    return jax.lax.map(lambda args: pattern.mask_of_rows(*args), (scores, rows, count), batch_size=batch)


def _zero_moments(
    inner: optax.GradientTransformation, state: Any, params: optax.Params, keep: dict[str, jax.Array]
) -> Any:
    """Zeroes the inner optimizer's per-parameter arrays where a weight is not kept."""
    everything = update_paths(jax.tree.map(lambda _: True, params), keep)

    def zero(moment: Any, keep: Any) -> Any:
        if not hasattr(moment, "shape") or moment.shape != getattr(keep, "shape", None):
            return moment  # a parameter that is not pruned or hidden by a mask, or a factored moment
        return jnp.where(keep, moment, jnp.zeros((), moment.dtype))

    return optax.tree_utils.tree_map_params(
        inner.init, zero, state, everything, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
