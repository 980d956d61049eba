"""Tile-wise sparsity (TW)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from shfl_jax.masks import Mask
from shfl_jax.patterns import base


@dataclasses.dataclass(frozen=True)
class TW(base.Pattern):
    """Prunes whole outputs, regroups the survivors in order into tiles, and prunes the inputs of every tile.

    As in the code of `clevercool/TileSparsity` (`tiled_wise_2d` in `Pruning/VGG/prune_algo.py`), a unit's score is the
    L2 norm of its scores over its length, and each of the two dimensions loses a fraction 1 - sqrt(1 - sparsity). Here
    units are ranked within one layer, a tile's length counts its surviving outputs only, and because the last tile is
    smaller the inputs are cut where the kept weights come nearest to the target. At least one output, and one input of
    every tile, is kept.

    Its masks hold the tiles first (the last one filled up with sentinels), then the pruned outputs in groups that keep
    no column; R is ceil(M / V) + 1 whatever the scores.

    Attributes:
        sparsity: fraction of pruned weights, in [0, 1).
        tile_size: V, surviving outputs of a tile.
        outputs: False prunes no outputs, only the inputs of every tile.
    """

    tile_size: int = 128
    outputs: bool = True
    name: ClassVar[str] = "tw"

    def __post_init__(self) -> None:
        base.check_sparsity(self.sparsity)
        base.check_sizes(self, "tile_size")

    @property
    def group_size(self) -> int:
        """V = tile_size."""
        return self.tile_size

    def units(self, shape: tuple[int, ...]) -> int:
        """M * K weights: units differ in size, so counts are of weights."""
        return shape[0] * shape[1]

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; `count` is the number of weights to keep, met to half a unit if the floors allow."""
        base.check_shape(self, scores.shape)
        (m, k), v = scores.shape, self.tile_size
        count = jnp.asarray(count, jnp.int32)
        squares = scores.astype(jnp.float32) ** 2
        if self.outputs:
            outputs = jnp.round(m * jnp.sqrt(count.astype(jnp.float32) / (m * k))).astype(jnp.int32)
            outputs = jnp.clip(jnp.maximum(outputs, -(-count // k)), 1, m)
            alive = base.top(base.rank_keys(squares.sum(1)), outputs)
        else:
            outputs, alive = jnp.int32(m), jnp.ones(m, bool)
        groups = -(-m // v) + 1
        tiles = -(-outputs // v)
        slots = jnp.where(alive, jnp.cumsum(alive) - 1, tiles * v + jnp.cumsum(~alive) - 1)
        rows = jnp.full(groups * v, m, jnp.int32).at[slots].set(jnp.arange(m, dtype=jnp.int32))

        sizes = jnp.clip(outputs - jnp.arange(groups, dtype=jnp.int32) * v, 0, v)[:, None]
        # The square of norm / length, up to one factor for all: it ranks alike, and whole tiles stay exact.
        length = jnp.maximum(sizes, 1).astype(jnp.float32) / v
        norms = base.sums_of_rows(squares, rows, v) / length**2
        costs = jnp.broadcast_to(sizes, norms.shape)
        best = jnp.arange(k) == jnp.argmax(norms, axis=1)[:, None]
        keys = jnp.where(best, base.ALWAYS, base.rank_keys(norms))
        keys = jnp.where(sizes > 0, keys, -1)
        return Mask(rows, nearest(keys, count, costs, best & (sizes > 0)), m)


def nearest(keys: jax.Array, budget: jax.Array, costs: jax.Array, always: jax.Array) -> jax.Array:
    """The ranked prefix whose cost is nearest to the budget, the shorter of two; with all of `always`.

    Keys below zero belong to no unit; their cost is zero.
    """
    budget = jnp.maximum(budget, jnp.sum(jnp.where(always, costs, 0)))
    within = base.top(jnp.maximum(keys, 0), budget, costs) & (keys >= 0)
    rest = budget - jnp.sum(jnp.where(within, costs, 0))
    following = jnp.argmax(jnp.where(within, -1, keys))
    cost = costs.reshape(-1)[following]
    longer = (cost - rest < rest) & (keys.reshape(-1)[following] >= 0) & ~within.reshape(-1)[following]
    return within | (longer & (jnp.arange(keys.size).reshape(keys.shape) == following))
