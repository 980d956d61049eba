"""The two stages of pruning: how many units every layer keeps, and which."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from shfl_jax.masks import Mask
from shfl_jax.patterns import Pattern

if TYPE_CHECKING:
    from shfl_jax.plan import LayerSpec


def allocate(
    scores: Mapping[str, jax.Array],
    specs: "Mapping[str, LayerSpec]",
    fraction: float | jax.Array = 1.0,
    method: str = "uniform",
) -> dict[str, jax.Array]:
    """Gives every layer its number of kept units. Pure and jit-able.

    Args:
        scores: path to (..., M, K) saliency scores of every layer to prune.
        specs: path to the layer's `LayerSpec`, whose pattern holds the target sparsity.
        fraction: scales every sparsity (a schedule's progress), in [0, 1]; may be traced.
        method: "uniform": every layer meets its own pattern's sparsity.

    Returns:
        Path to an int32 scalar, the units kept in each slice of the layer.

    Raises:
        ValueError: the method is unknown, a layer has no spec, or its scores have another shape.
    """
    if method != "uniform":
        raise ValueError(f"unknown allocation method {method!r}; use 'uniform'")
    counts = {}
    for path, layer in scores.items():
        if path not in specs:
            raise ValueError(f"{path}: scores without a spec; the specs are of {', '.join(specs) or 'no layer'}")
        spec = specs[path]
        if layer.shape[-2:] != tuple(spec.matrix_shape):
            raise ValueError(f"{path}: scores of shape {layer.shape} for a layer of (M, K) = {spec.matrix_shape}")
        counts[path] = spec.pattern.count(spec.matrix_shape, fraction=fraction)
    return counts


def mask(
    scores: jax.Array,
    pattern: Pattern,
    count: jax.Array | int | None = None,
    previous: Mask | None = None,
) -> Mask:
    """Chooses the kept units of one layer, or of every slice of a stacked one. Pure and jit-able.

    Args:
        scores: (..., M, K) floating, non-negative and finite.
        pattern: the units.
        count: int32, the number of kept units, a scalar or one a slice (...); may be traced. The pattern's own sparsity
            decides unless given.
        previous: an earlier mask of the layer with the same leading axes, from which patterns that search may start.

    Returns:
        The mask, with the leading axes of the scores.

    Raises:
        ValueError: the scores are no floating matrices.
    """
    if scores.ndim < 2 or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"scores must be a floating (..., M, K) array, got {scores.dtype} of shape {scores.shape}")
    count = pattern.count(scores.shape[-2:]) if count is None else jnp.asarray(count, jnp.int32)
    return _mask(scores, pattern, jnp.broadcast_to(count, scores.shape[:-2]), previous)


@functools.partial(jax.jit, static_argnames="pattern")
def _mask(scores: jax.Array, pattern: Pattern, counts: jax.Array, previous: Mask | None) -> Mask:
    if scores.ndim == 2:
        return pattern.mask(scores, counts, previous)
    return jax.vmap(lambda s, c, p: _mask(s, pattern, c, p))(scores, counts, previous)
