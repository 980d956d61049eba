"""What all pruning methods share: the state, the update of the masks inside jit, and exact zeros."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.patterns import Mask, Pattern, allocate
from shfl_jax.pruning._schedules import LayerSchedule, RowSchedule, Schedule
from shfl_jax.sparse import Masks

BATCH_WEIGHTS = 2**26
"""Weights of equal layers that one batch of the mask search takes: bounds its memory, and fills an accelerator."""

Matrices = dict[str, jax.Array]
"""path -> (*batch, M, K)."""

Find = Callable[[jax.Array, Any, Masks], dict[str, Mask]]
"""(step, path -> scores, masks in force) -> path -> new mask."""


class PruneState(NamedTuple):
    """State of every pruning method. Shapes and dtypes never change.

    Attributes:
        step: int32 scalar, updates done.
        masks: the masks in force.
        skipped: path -> int32 scalar, mask updates a layer has sat out because its weights or scores were not finite.
        inner_state: state of the inner optimizer.
        memory: what the method itself remembers; None for most.
    """

    step: jax.Array
    masks: Masks
    skipped: dict[str, jax.Array]
    inner_state: optax.OptState
    memory: Any = None


def layers_of(specs: Mapping[str, LayerSpec] | Iterable[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The specs that a method was given, either way."""
    return tuple(specs.values()) if isinstance(specs, Mapping) else tuple(specs)


def start(inner: optax.GradientTransformation, layers: tuple[LayerSpec, ...], params: optax.Params) -> PruneState:
    """The state before the first update: every mask keeps everything.

    Raises:
        ValueError: the parameters lack a layer or it has another shape than its spec.
    """
    # `optax.tree_utils.tree_map_params` calls init with a placeholder, a tree without leaves.
    if jax.tree.leaves(params):
        layer_kernels(params, layers)
    masks = Masks({spec.path: keep_all(spec) for spec in layers}, layers)
    skipped = {spec.path: jnp.zeros((), jnp.int32) for spec in layers}
    return PruneState(jnp.zeros((), jnp.int32), masks, skipped, inner.init(params))


def float32_like(params: optax.Params, layers: tuple[LayerSpec, ...]) -> Matrices:
    """Zeros in the shape of every kernel, and sharded like it: path -> float32."""
    leaves = path_leaves(params)
    return {
        spec.path: jnp.zeros_like(leaves[spec.path], jnp.float32)
        if spec.path in leaves
        else jnp.zeros(spec.shape, jnp.float32)
        for spec in layers
    }


def refresh(
    step: jax.Array, weights: Matrices, scores: Any, masks: Masks, skipped: dict[str, jax.Array], find: Find
) -> tuple[Masks, dict[str, jax.Array], dict[str, jax.Array]]:
    """New masks, except for layers whose weights or scores are not finite.

    Args:
        step: the step.
        weights: the kernels.
        scores: path -> whatever arrays `find` reads.
        masks: the masks in force.
        skipped: see `PruneState`.
        find: finds new masks from finite scores.

    Returns:
        The masks, the new `skipped`, and for every layer whether its numbers were finite.
    """
    finite = {}
    for path in weights:
        arrays = [weights[path], *jax.tree.leaves(scores[path])]
        finite[path] = jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()
    nothing = jax.tree.map(jnp.zeros_like, scores)
    found = find(step, {path: _choose(finite[path], scores[path], nothing[path]) for path in weights}, masks)
    chosen = {path: _choose(finite[path], found[path], masks[path]) for path in found}
    return Masks(chosen, masks.specs), {path: skipped[path] + ~finite[path] for path in skipped}, finite


def hard(
    inner: optax.GradientTransformation,
    layers: tuple[LayerSpec, ...],
    schedule: Schedule,
    *,
    scores: Callable[[Matrices, Matrices, Any], Any],
    find: Find,
    remember: Callable[[Matrices, Matrices, Any], Any] = lambda weights, gradients, memory: memory,
    memory: Callable[[optax.Params], Any] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """A method whose pruned weights are exactly zero after every update.

    Args:
        inner: the optimizer.
        layers: the layers.
        schedule: when masks are updated.
        scores: (kernels, their gradients, memory) -> path -> arrays that `find` reads.
        find: new masks.
        remember: (kernels, their gradients, memory) -> the memory, at every step and before the masks are updated.
        memory: parameters, or a placeholder without leaves, to the memory at first.
    """
    inner_update = optax.with_extra_args_support(inner).update

    def init(params: optax.Params) -> PruneState:
        return start(inner, layers, params)._replace(memory=memory(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError("prune needs the parameters: call update(grads, state, params)")
        kernels, gradients = layer_kernels(params, layers), layer_kernels(updates, layers)
        recalled = remember(kernels, gradients, state.memory)

        def renew(
            masks: Masks, skipped: dict[str, jax.Array], inner_state: Any
        ) -> tuple[Masks, dict[str, jax.Array], Any]:
            found = scores(kernels, gradients, recalled)
            new_masks, skipped, _ = refresh(state.step, kernels, found, masks, skipped, find)
            old, new = elements(masks), elements(new_masks)
            inner_state = zero_moments(inner, inner_state, params, {path: old[path] & new[path] for path in new})
            return new_masks, skipped, inner_state

        masks, skipped, inner_state = jax.lax.cond(
            schedule.is_update(state.step), renew, _leave, state.masks, state.skipped, state.inner_state
        )
        updates, inner_state = inner_update(masks.apply(updates), inner_state, params, **extra_args)
        proposed = layer_kernels(updates, layers)
        updates = update_paths(
            updates, {path: jnp.where(keep, proposed[path], -kernels[path]) for path, keep in elements(masks).items()}
        )
        return updates, PruneState(state.step + 1, masks, skipped, inner_state, recalled)

    return optax.GradientTransformationExtraArgs(init, update)


def soft(
    inner: optax.GradientTransformation,
    layers: tuple[LayerSpec, ...],
    schedule: Schedule,
    allocation: str | Mapping[str, float],
    *,
    adjust: Callable[[Matrices, Matrices, Masks], Matrices],
    target: Callable[[Matrices, Masks, Any], Matrices],
    remember: Callable[[Matrices, dict[str, jax.Array], Any], Any] = lambda target, finite, memory: memory,
    memory: Callable[[optax.Params], Any] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """A method that trains dense weights and keeps masks beside them.

    The masks that the state holds after an update are those of the new weights, for the next step's use: a step that
    the schedule names begins with new masks, step 0 too.

    Args:
        inner: the optimizer.
        layers: the layers.
        schedule: when masks are updated.
        allocation: how sparsity is spread over layers.
        adjust: (gradients, kernels, masks) -> gradients for the inner optimizer.
        target: (kernels, masks, memory) -> the arrays whose magnitudes choose the new masks, kernel-shaped float32.
        remember: (target, whether a layer was finite, memory) -> the memory after an update of the masks.
        memory: parameters, or a placeholder without leaves, to the memory at first.
    """
    inner_update = optax.with_extra_args_support(inner).update
    by_path = {spec.path: spec for spec in layers}

    def find(step: jax.Array, scores: Matrices, masks: Masks) -> dict[str, Mask]:
        return search(step, scores, by_path, masks, schedule, allocation)

    def renew(
        step: jax.Array, kernels: Matrices, masks: Masks, skipped: dict[str, jax.Array], recalled: Any
    ) -> tuple[Masks, dict[str, jax.Array], Any]:
        wanted = target(kernels, masks, recalled)
        scores = {path: jnp.abs(by_path[path].to_matrix(value)) for path, value in wanted.items()}
        masks, skipped, finite = refresh(step, kernels, scores, masks, skipped, find)
        return masks, skipped, remember(wanted, finite, recalled)

    def init(params: optax.Params) -> PruneState:
        state = start(inner, layers, params)._replace(memory=memory(params))
        with jax.ensure_compile_time_eval():
            due = bool(schedule.is_update(0))
        if not due or not jax.tree.leaves(params):
            return state
        kernels = layer_kernels(params, layers)
        masks, skipped, recalled = renew(state.step, kernels, state.masks, state.skipped, state.memory)
        return state._replace(masks=masks, skipped=skipped, memory=recalled)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError("a pruning method needs the parameters: call update(grads, state, params)")
        kernels = layer_kernels(params, layers)
        updates = update_paths(updates, adjust(layer_kernels(updates, layers), kernels, state.masks))
        updates, inner_state = inner_update(updates, state.inner_state, params, **extra_args)
        # What `optax.apply_updates` will make of them.
        moved = {
            path: (kernels[path] + step).astype(kernels[path].dtype)
            for path, step in layer_kernels(updates, layers).items()
        }
        step = state.step + 1
        masks, skipped, recalled = jax.lax.cond(
            schedule.is_update(step),
            functools.partial(renew, step, moved),
            _leave,
            state.masks,
            state.skipped,
            state.memory,
        )
        return updates, PruneState(step, masks, skipped, inner_state, recalled)

    return optax.GradientTransformationExtraArgs(init, update)


def search(
    step: jax.Array,
    scores: Matrices,
    specs: dict[str, LayerSpec],
    previous: Masks,
    schedule: Schedule,
    allocation: str | Mapping[str, float],
) -> dict[str, Mask]:
    """New masks of all layers, as far as the schedule says.

    Layers of one shape and pattern are searched together: one program, not one each.

    Raises:
        ValueError: a "global" allocation with a schedule that treats layers differently.
    """
    turns = None
    if isinstance(schedule, LayerSchedule):
        if allocation == "global":
            raise ValueError(
                f"allocation='global' ranks layers against one another, but {type(schedule).__name__} has them take "
                "turns; use 'uniform', 'erk' or path -> sparsity"
            )
        turns = schedule.turns(step, tuple(specs))
    progress = schedule(step) if turns is None else {path: turns[path].fraction for path in specs}
    anew = schedule.is_search(step) if isinstance(schedule, RowSchedule) else jnp.zeros((), bool)
    counts, targets = (allocate(scores, specs, fraction, allocation) for fraction in (progress, 1.0))
    alike = collections.defaultdict(list)
    for path, spec in specs.items():
        alike[spec.pattern, spec.matrix_shape].append(path)
    found = {}
    for (pattern, shape), paths in alike.items():
        stacks = [
            flatten((scores[p], previous[p]), specs[p].batch_shape)
            + jax.tree.map(functools.partial(_one_a_slice, specs[p]), (counts[p], targets[p]))
            for p in paths
        ]
        stacked = jax.tree.map(_concatenated, *stacks)
        batch = min(stacked[0].shape[0], max(1, BATCH_WEIGHTS // int(np.prod(shape))))
        masks = choose_masks(pattern, *stacked, anew, batch=batch)
        first = 0
        for path in paths:
            found[path] = jax.tree.map(functools.partial(_slices_from, specs[path], first), masks)
            first += int(np.prod(specs[path].batch_shape))
    if turns is None:
        return found
    return {path: _choose(turns[path].due, mask, previous[path]) for path, mask in found.items()}


def _choose(first: jax.Array, a: Any, b: Any) -> Any:
    """One of two trees of arrays alike, the first where the flag says so."""
    return jax.tree.map(functools.partial(jnp.where, first), a, b)


def _leave(*state: Any) -> tuple[Any, ...]:
    """What `jax.lax.cond` does in steps without an update of the masks."""
    return state


def _one_a_slice(spec: LayerSpec, count: jax.Array) -> jax.Array:
    return jnp.broadcast_to(count, spec.batch_shape).reshape(-1)


def _slices_from(spec: LayerSpec, first: int, stacked: jax.Array) -> jax.Array:
    slices = stacked[first : first + int(np.prod(spec.batch_shape))]
    return slices.reshape(*spec.batch_shape, *stacked.shape[1:])


def _concatenated(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate(arrays)


def layer_kernels(tree: Any, layers: tuple[LayerSpec, ...]) -> dict[str, jax.Array]:
    """The kernels of the layers: path -> array.

    Raises:
        ValueError: the tree lacks a layer or it has another shape than its spec.
    """
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


def keep_all(spec: LayerSpec) -> Mask:
    """The mask that keeps everything, in the shapes that the pattern's own masks have."""
    (m, _), pattern = spec.matrix_shape, spec.pattern
    shapes = _mask_shapes(pattern, spec.matrix_shape)
    rows = np.minimum(np.arange(shapes.rows.shape[-1], dtype=np.int32), m)
    rows = np.broadcast_to(rows, (*spec.batch_shape, *rows.shape))
    kept = jnp.ones((*spec.batch_shape, *shapes.kept.shape), bool)
    if shapes.order is None or shapes.choice is None:
        return Mask(jnp.asarray(rows), kept, m)
    order = np.minimum(np.arange(shapes.order.shape[-1], dtype=np.int32), spec.matrix_shape[1])
    order = jnp.broadcast_to(order, (*spec.batch_shape, *shapes.order.shape))
    return Mask(jnp.asarray(rows), kept, m, order, jnp.ones((*spec.batch_shape, *shapes.choice.shape), bool))


@functools.lru_cache(maxsize=256)
def _mask_shapes(pattern: Pattern, shape: tuple[int, int]) -> Mask:
    return jax.eval_shape(pattern.mask, jax.ShapeDtypeStruct(shape, jnp.float32), 1)


def elements(masks: Masks) -> dict[str, jax.Array]:
    """Which weights are kept, in the shapes of the kernels."""
    return {spec.path: spec.from_matrix(masks[spec.path].elements()) for spec in masks.specs}


def flatten(tree: Any, batch_shape: tuple[int, ...]) -> Any:
    """Makes one leading axis of the batch axes."""

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(-1, *array.shape[len(batch_shape) :])

    return jax.tree.map(flat, tree)


@functools.partial(jax.jit, static_argnames=("pattern", "batch"))
def choose_masks(
    pattern: Pattern, scores: jax.Array, previous: Mask, count: Any, target: Any, anew: jax.Array, *, batch: int
) -> Mask:
    """The new masks of a stack of matrices: scores (B, M, K), counts (B,), `batch` of them at a time."""

    def masks(layer: tuple[jax.Array, Any, Mask]) -> Mask:
        return pattern.mask(*layer)

    def rows(layer: tuple[jax.Array, Any, Mask]) -> jax.Array:
        return pattern.mask(*layer).rows

    def masks_of_rows(layer: tuple[jax.Array, jax.Array, Any, Mask]) -> Mask:
        return pattern.mask_of_rows(*layer)

    each = functools.partial(jax.lax.map, batch_size=batch)
    if not pattern.searches_rows:
        return each(masks, (scores, count, previous))
    # Rows are grouped, for the target sparsity, when a layer is first pruned, and again only when the schedule says so:
    # regrouping rows discards what weights had adapted to their group, and weights pruned before are still zero.
    free = previous.kept.all((-1, -2)) | anew
    found = jax.lax.cond(free.any(), lambda: each(rows, (scores, target, previous)), lambda: previous.rows)
    return each(masks_of_rows, (scores, jnp.where(free[:, None], found, previous.rows), count, previous))


def zero_moments(
    inner: optax.GradientTransformation, state: Any, params: optax.Params, keep: dict[str, jax.Array]
) -> Any:
    """Zeroes the inner optimizer's per-parameter arrays where a weight is not kept."""
    leaves, tree = jax.tree.flatten(params)
    everything = update_paths(jax.tree.unflatten(tree, [True] * len(leaves)), keep)

    def zero(moment: Any, keep: Any) -> Any:
        if not hasattr(moment, "shape") or moment.shape != getattr(keep, "shape", None):
            return moment  # a parameter that is not pruned or hidden by a mask, or a factored moment
        return jnp.where(keep, moment, jnp.zeros((), moment.dtype))

    return optax.tree_utils.tree_map_params(
        inner.init, zero, state, everything, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )
