"""Tile-wise sparsity (TW)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import sums_of_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register


class TileCount(NamedTuple):
    """What a layer keeps when layers are ranked together: its outputs no longer follow from its number of weights.

    Attributes:
        outputs: int32, kept outputs.
        weights: int32, kept weights.
    """

    outputs: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The two stages of TW: which outputs make up the tiles, and which inputs every tile keeps.

    Attributes:
        size: V, surviving outputs of a tile.
        outputs: False prunes no outputs.
    """

    size: int
    outputs: bool

    def mask(self, scores: jax.Array, count: Any) -> Mask:
        """Both stages within one layer: scores (M, K); `count` is of weights, or a `TileCount`."""
        return self.mask_of_squares(ranking.normalised(scores) ** 2, count)

    def mask_of_squares(self, squares: jax.Array, count: Any) -> Mask:
        """As `mask`, from the squares of the scores."""
        m, k = squares.shape
        outputs, count = count if isinstance(count, TileCount) else (self._outputs((m, k), count), count)
        rows, keys, costs = self._inputs(squares, outputs)
        return Mask(rows, nearest(keys, jnp.asarray(count, jnp.int32), costs, keys == ranking.ALWAYS), m)

    def rank(self, scores: Sequence[jax.Array], limits: Sequence[ranking.Limits]) -> list[TileCount]:
        """See `Pattern.rank`. Both stages keep the same share of the weights."""
        squares = [s**2 for s in ranking.normalised(list(scores))]
        widths = [s.shape[2] for s in scores]
        shapes = [s.shape[1:] for s in scores]
        outputs = [jnp.full(s.shape[0], s.shape[1], jnp.int32) for s in scores]
        if self.outputs:
            keys = [ranking.rank_keys(s.sum(2) / k**2) for s, k in zip(squares, widths, strict=True)]
            whole = [
                ranking.Limits(-(-least // k) * k, self._outputs(shape, count) * k, -(-most // k) * k)
                for (least, count, most), shape, k in zip(limits, shapes, widths, strict=True)
            ]
            outputs = [w // k for w, k in zip(ranking.rank_together(keys, widths, whole), widths, strict=True)]
        tiles = [jax.vmap(self._inputs)(s, o) for s, o in zip(squares, outputs, strict=True)]
        left = [
            ranking.Limits(least, count, jnp.minimum(most, o * k))
            for (least, count, most), o, k in zip(limits, outputs, widths, strict=True)
        ]
        weights = ranking.rank_together([keys for _, keys, _ in tiles], [costs for *_, costs in tiles], left)
        return [TileCount(*counts) for counts in zip(outputs, weights, strict=True)]

    def _outputs(self, shape: tuple[int, ...], count: jax.Array | int) -> jax.Array:
        """The outputs of a layer that is pruned on its own: both dimensions keep the same share."""
        m, k = shape
        if not self.outputs:
            return jnp.int32(m)
        count = jnp.asarray(count, jnp.int32)
        outputs = jnp.round(m * jnp.sqrt(count.astype(jnp.float32) / (m * k))).astype(jnp.int32)
        return jnp.clip(jnp.maximum(outputs, -(-count // k)), 1, m)

    def _inputs(self, squares: jax.Array, outputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Regroups the best outputs into tiles: (M, K) squared scores to rows (R * V,), and keys and costs (R, K).

        The key of every tile's best input is `ranking.ALWAYS`, that of an input of no tile is -1 and its cost 0.
        """
        (m, k), v = squares.shape, self.size
        alive = ranking.top(ranking.rank_keys(squares.sum(1)), outputs) if self.outputs else jnp.ones(m, bool)
        groups = -(-m // v) + 1
        tiles = -(-outputs // v)
        slots = jnp.where(alive, jnp.cumsum(alive) - 1, tiles * v + jnp.cumsum(~alive) - 1)
        rows = jnp.full(groups * v, m, jnp.int32).at[slots].set(jnp.arange(m, dtype=jnp.int32))

        sizes = jnp.clip(outputs - jnp.arange(groups, dtype=jnp.int32) * v, 0, v)[:, None]
        # The square of norm / length, up to a common factor: the ranking is the same, and whole tiles stay exact.
        length = jnp.maximum(sizes, 1).astype(jnp.float32) / v
        norms = sums_of_rows(squares, rows, v) / length**2
        best = jnp.arange(k) == jnp.argmax(norms, axis=1)[:, None]
        keys = jnp.where(best, ranking.ALWAYS, ranking.rank_keys(norms))
        return rows, jnp.where(sizes > 0, keys, -1), jnp.broadcast_to(sizes, norms.shape)


def nearest(
    keys: jax.Array, budget: jax.Array | int, costs: jax.Array, always: jax.Array, *, longer_of_two: bool = False
) -> jax.Array:
    """The ranked prefix whose cost is nearest to the budget, the shorter of two unless asked; with all of `always`.

    Keys below zero belong to no unit; their cost is zero.
    """
    budget = jnp.maximum(budget, jnp.sum(jnp.where(always, costs, 0)))
    within = ranking.top(jnp.maximum(keys, 0), budget, costs) & (keys >= 0)
    rest = budget - jnp.sum(jnp.where(within, costs, 0))
    following = jnp.argmax(jnp.where(within, -1, keys))
    cost = costs.reshape(-1)[following]
    longer = (cost - rest < rest + longer_of_two) & (keys.reshape(-1)[following] >= 0) & ~within.reshape(-1)[following]
    return within | (longer & (jnp.arange(keys.size).reshape(keys.shape) == following))


@register
@dataclasses.dataclass(frozen=True)
class TW(base.Pattern):
    """Prunes whole outputs, regroups the survivors in order into tiles, and prunes the inputs of every tile.

    As in the code of `clevercool/TileSparsity` (`tiled_wise_2d` in `Pruning/VGG/prune_algo.py`), a unit's score is the
    L2 norm of its scores over its length, and each of the two dimensions loses a fraction 1 - sqrt(1 - sparsity). That
    code ranks the units of all layers together, as `rank` does: all outputs, then the inputs of all tiles. `mask` alone
    ranks within one layer. Unlike there, a tile's length counts only its surviving outputs, and because units differ in
    size, both cuts are made where the number of kept weights, not of units, meets the target. At least one output, and
    one input of every tile, is kept.

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
        super().__post_init__()
        base.check_sizes(self, "tile_size")

    @property
    def group_size(self) -> int:
        """V = tile_size."""
        return self.tile_size

    def mask(self, scores: jax.Array, count: Any, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; `count` is of weights (met to half a unit if the floors allow), or a `TileCount`."""
        base.check_shape(self, scores.shape)
        return self._tiles.mask(scores, count)

    @override
    def rank(self, scores: Sequence[jax.Array], limits: Sequence[ranking.Limits]) -> list[Any]:
        """See `Pattern.rank`; the counts are `TileCount`s of weights: units differ in size."""
        return self._tiles.rank(scores, limits)

    @property
    def _tiles(self) -> Tiles:
        return Tiles(self.tile_size, self.outputs)
