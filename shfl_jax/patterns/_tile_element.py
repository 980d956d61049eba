"""Tile-element-wise sparsity (TEW)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register
from shfl_jax.patterns._tile import TileCount, Tiles


class TileElementCount(NamedTuple):
    """What a layer keeps where layers are ranked together.

    Attributes:
        tiles: what its tiles keep.
        weights: int32, kept weights, the restored ones included.
    """

    tiles: TileCount
    weights: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class TEW(base.Pattern):
    """TW at a slightly higher sparsity; then the best of the pruned weights are restored one by one.

    The overlay of Guo et al., SC 2020 (arXiv 2008.13006), as in the code of `clevercool/TileSparsity`
    (`tiled_wise_2d_mix` in `Pruning/VGG/prune_algo.py`): TW prunes sparsity + restored, and `restored` of all weights
    come back by their own scores. No storage holds tiles and single weights together, so its masks are element-wise,
    in groups of one row, and `compress` leaves such a layer dense.

    Attributes:
        sparsity: fraction of pruned weights in the end, in [0, 1).
        tile_size: surviving outputs of a tile.
        outputs: False prunes no outputs, only the inputs of every tile.
        restored: fraction of the weights that are restored; with the sparsity less than 1.
    """

    tile_size: int = 128
    outputs: bool = True
    restored: float = 0.01
    name: ClassVar[str] = "tew"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "tile_size")
        if not 0 <= self.restored < 1 - self.sparsity:
            raise base.field_error(self, "restored", f"lie in [0, 1 - sparsity) = [0, {1 - self.sparsity:g})")

    @property
    def group_size(self) -> int:
        """V = 1: a restored weight shares its column with no other row."""
        return 1

    def mask(self, scores: jax.Array, count: Any, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; `count` is a number of weights or a `TileElementCount`."""
        base.check_shape(self, scores.shape)
        tiles, count = count if isinstance(count, TileElementCount) else (self._in_tiles(scores.shape, count), count)
        keys, m = self._keys(scores, tiles), scores.shape[0]
        return Mask(padded_rows(m, 1), ranking.top(keys, jnp.maximum(count, jnp.sum(keys == ranking.ALWAYS))), m)

    @override
    def rank(self, scores: Sequence[jax.Array], limits: Sequence[ranking.Limits]) -> list[Any]:
        """See `Pattern.rank`; the counts are `TileElementCount`s. Restored weights are ranked over all layers too."""
        shapes = [s.shape[1:] for s in scores]
        in_tiles = [
            ranking.Limits(*(self._in_tiles(shape, number) for number in limit))
            for limit, shape in zip(limits, shapes, strict=True)
        ]
        tiles = self._tiles.rank(scores, in_tiles)
        keys = [jax.vmap(self._keys)(*both) for both in zip(scores, tiles, strict=True)]
        weights = ranking.rank_together(keys, [1] * len(keys), limits)
        return [TileElementCount(*counts) for counts in zip(tiles, weights, strict=True)]

    @property
    def _tiles(self) -> Tiles:
        return Tiles(self.tile_size, self.outputs)

    def _keys(self, scores: jax.Array, tiles: Any) -> jax.Array:
        """Rank keys of single weights (M, K), all those in tiles before the others."""
        return jnp.where(self._tiles.mask(scores, tiles).elements(), ranking.ALWAYS, ranking.rank_keys(scores))

    def _in_tiles(self, shape: tuple[int, ...], count: jax.Array | int) -> jax.Array:
        """How many of the kept weights the tiles keep."""
        restored = ranking.scaled(self.units(shape), self.restored)
        return jnp.maximum(jnp.asarray(count, jnp.int32) - restored, self.least(shape))
