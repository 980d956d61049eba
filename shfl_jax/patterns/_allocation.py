"""The two stages of pruning: how many units every layer keeps, and which."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shfl_jax._layers import LayerSpec
from shfl_jax.patterns._base import Pattern
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._ranking import Limits, scaled

ALLOCATIONS = ("uniform", "global", "erk")
"""What `allocate` may be asked for by name."""


def allocate(
    scores: Mapping[str, jax.Array],
    specs: Mapping[str, LayerSpec],
    fraction: float | jax.Array | Mapping[str, Any] = 1.0,
    method: str | Mapping[str, float] = "uniform",
    min_share: float = 0.1,
) -> dict[str, Any]:
    """Gives every layer its number of kept units. Pure and jit-able.

    With every method, layers of equal patterns together keep as many units as their patterns say, to within one unit:
    sparsity never moves between layers with different patterns.

    Args:
        scores: path to (*batch, M, K) saliency scores of every layer to prune. Only "global" reads them.
        specs: path to the layer's `LayerSpec`, whose pattern holds the target sparsity.
        fraction: scales every sparsity (a schedule's progress), in [0, 1]; may be traced. Path to fraction where layers
            differ, which "global" cannot rank.
        method: how sparsity is spread over layers:
            "uniform": every layer meets its own pattern's sparsity.
            "global": units are ranked over all layers by their scores per weight, slices of a stacked layer as layers
                of their own; ties go to the earlier shape, layer and slice. TW and TEW rank outputs and then inputs.
            "erk": densities are proportional to (M + K) / (M K), as in Erdos-Renyi-Kernel (Evci et al., ICML 2020,
                arXiv 1911.11134); a layer that would exceed density 1 stays dense, and the others share what it does
                not take. A convolution counts as the matrix that its spec reads it as.
            path -> sparsity, such as `Sensitivity.allocation` finds: taken as it is.
        min_share: "global": every slice keeps at least this share, in [0, 1], of what it would keep under "uniform".
            One threshold for all may otherwise empty a layer.

    Returns:
        Path to the units kept in each slice of the layer: an int32 scalar, or (*batch,) of "global" (for TW and TEW
        named tuples of such). `mask` takes them as they are.

    Raises:
        ValueError: the method is unknown, a layer has no spec, its scores have another shape, a given sparsity is
            missing or one that its pattern cannot have, or "global" was given a fraction for each layer.
    """
    for path, layer in scores.items():
        if path not in specs:
            raise ValueError(f"{path}: scores without a spec; the specs are of {', '.join(specs) or 'no layer'}")
        spec = specs[path]
        if layer.shape != (*spec.batch_shape, *spec.matrix_shape):
            raise ValueError(
                f"{path}: scores of shape {layer.shape} for a layer of (M, K) = {spec.matrix_shape} with leading axes "
                f"{spec.batch_shape}"
            )
    layers = [specs[path] for path in scores]
    if method == "global":
        if isinstance(fraction, Mapping):
            raise ValueError("method='global' ranks layers against one another: give it one fraction for all of them")
        return _globally({path: jnp.asarray(layer) for path, layer in scores.items()}, layers, fraction, min_share)
    if method == "uniform":
        sparsities: Mapping[str, float] = {spec.path: spec.pattern.sparsity for spec in layers}
    elif method == "erk":
        sparsities = _erk(layers)
    elif isinstance(method, Mapping):
        sparsities = method
        for spec in layers:
            if spec.path not in method:
                raise ValueError(f"{spec.path}: the allocation gives it no sparsity, only {', '.join(method)}")
            if not spec.pattern.min_sparsity <= method[spec.path] < 1:
                raise ValueError(f"{spec.path}: {spec.pattern!r} cannot have a sparsity of {method[spec.path]}")
    else:
        raise ValueError(
            f"unknown allocation method {method!r}; use {', '.join(map(repr, ALLOCATIONS))} or path -> sparsity"
        )
    fractions = fraction if isinstance(fraction, Mapping) else dict.fromkeys(scores, fraction)
    return {s.path: s.pattern.count(s.matrix_shape, sparsities[s.path], fractions[s.path]) for s in layers}


def alike(specs: Iterable[LayerSpec]) -> list[list[LayerSpec]]:
    """Layers of equal patterns, which share one budget."""
    found: dict[Pattern, list[LayerSpec]] = defaultdict(list)
    for spec in specs:
        found[spec.pattern].append(spec)
    return list(found.values())


def kept_units(spec: LayerSpec) -> int:
    """The units that all slices of a layer keep under "uniform"."""
    with jax.ensure_compile_time_eval():
        return _slices(spec) * int(spec.pattern.count(spec.matrix_shape))


def all_units(spec: LayerSpec) -> int:
    """The units of all slices of a layer."""
    return _slices(spec) * spec.pattern.units(spec.matrix_shape)


def to_sparsities(layers: Sequence[LayerSpec], densities: Sequence[float]) -> dict[str, float]:
    """Rounds densities of layers of equal patterns to whole units.

    Args:
        layers: of equal patterns.
        densities: one for each, within what its pattern can have; the layers together keep what their patterns say.

    Returns:
        path -> sparsity; the layers still keep that number, to within one step of one layer.
    """
    steps = [spec.pattern.step(spec.matrix_shape) for spec in layers]
    whole = np.array([s.pattern.units(s.matrix_shape) // step for s, step in zip(layers, steps, strict=True)])
    ideal = np.asarray(densities) * whole
    # A number that is whole up to rounding errors must not lose a unit.
    counts = np.floor(ideal + 1e-6).astype(int)
    costs = [_slices(spec) * step for spec, step in zip(layers, steps, strict=True)]
    rest = sum(map(kept_units, layers)) - int(np.dot(counts, costs))
    for i in np.argsort(counts - ideal, kind="stable"):
        if counts[i] < ideal[i] and costs[i] <= rest:
            counts[i] += 1
            rest -= costs[i]
    kept = [int(count) * step for count, step in zip(counts, steps, strict=True)]
    return {s.path: 1 - n / s.pattern.units(s.matrix_shape) for s, n in zip(layers, kept, strict=True)}


def _slices(spec: LayerSpec) -> int:
    return int(np.prod(spec.batch_shape))


def _erk(specs: Sequence[LayerSpec]) -> dict[str, float]:
    sparsities: dict[str, float] = {}
    for layers in alike(specs):
        sizes, kept = (np.array([number(spec) for spec in layers], float) for number in (all_units, kept_units))
        shapes = np.array([spec.matrix_shape for spec in layers], float)
        raw = shapes.sum(1) / shapes.prod(1)
        least = np.array([s.pattern.least(s.matrix_shape) / s.pattern.units(s.matrix_shape) for s in layers])
        most = 1 - layers[0].pattern.min_sparsity
        # The kept units grow with the common factor, in straight lines between those at which a layer meets a bound.
        factors = np.sort(np.concatenate([least / raw, most / raw]))
        densities = [np.clip(factor * raw, least, most) for factor in factors]
        factor = np.interp(kept.sum(), [sizes @ density for density in densities], factors)
        sparsities |= to_sparsities(layers, np.clip(factor * raw, least, most))
    return sparsities


def _globally(
    scores: dict[str, jax.Array], specs: Sequence[LayerSpec], fraction: float | jax.Array, min_share: float
) -> dict[str, Any]:
    counts = {}
    for layers in alike(specs):
        pattern = layers[0].pattern
        # Slices of one shape are ranked in one array: the program grows with the number of shapes, not of layers.
        shapes = defaultdict(list)
        for spec in layers:
            shapes[spec.matrix_shape].append(spec)
        stacks = [jnp.concatenate([scores[s.path].reshape(-1, *shape) for s in same]) for shape, same in shapes.items()]
        limits = [_limits(pattern, shape, fraction, min_share) for shape in shapes]
        for same, found in zip(shapes.values(), _rank(pattern, stacks, limits), strict=True):
            first = 0
            for spec in same:
                counts[spec.path] = jax.tree.map(functools.partial(_slices_from, spec, first), found)
                first += _slices(spec)
    return {path: counts[path] for path in scores}


def _slices_from(spec: LayerSpec, first: int, counts: jax.Array) -> jax.Array:
    """A layer's own counts (*batch,) among those of all slices."""
    return counts[first : first + _slices(spec)].reshape(spec.batch_shape)


def _limits(pattern: Pattern, shape: tuple[int, int], fraction: float | jax.Array, min_share: float) -> Limits:
    count, most = (pattern.count(shape, sparsity, fraction) for sparsity in (None, pattern.min_sparsity))
    step = pattern.step(shape)
    return Limits(jnp.maximum(scaled(count // step, min_share) * step, pattern.least(shape)), count, most)


@functools.partial(jax.jit, static_argnums=0)
def _rank(pattern: Pattern, scores: list[jax.Array], limits: list[Limits]) -> list[Any]:
    return pattern.rank(scores, limits)


def mask(
    scores: jax.Array,
    pattern: Pattern,
    count: Any = None,
    previous: Mask | None = None,
) -> Mask:
    """Chooses the kept units of one layer, or of every slice of a stacked one. Pure and jit-able.

    Args:
        scores: (..., M, K) floating, non-negative and finite.
        pattern: the units.
        count: int32, the number of kept units, a scalar or one a slice (...), or what `allocate` found; may be traced.
            The pattern's own sparsity decides unless given.
        previous: an earlier mask of the layer with the same leading axes, from which patterns that search may start.

    Returns:
        The mask, with the leading axes of the scores.

    Raises:
        ValueError: the scores are no floating matrices.
    """
    if scores.ndim < 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be a floating (..., M, K) array, got {scores.dtype} of shape {scores.shape}")
    count = pattern.count(scores.shape[-2:]) if count is None else count

    def one_a_slice(n: jax.Array | int) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(n, jnp.int32), scores.shape[:-2])

    return _mask(scores, pattern, jax.tree.map(one_a_slice, count), previous)


@functools.partial(jax.jit, static_argnames="pattern")
def _mask(scores: jax.Array, pattern: Pattern, counts: Any, previous: Mask | None) -> Mask:
    if scores.ndim == 2:
        return pattern.mask(scores, counts, previous)
    return jax.vmap(_mask, in_axes=(0, None, 0, 0))(scores, pattern, counts, previous)
