"""Tile-vector-wise sparsity: 2:4 inside the tiles of TW (TVW) and inside the row groups of Shfl-BW (Shfl-TVW)."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import Vectors, padded_rows, sums_of_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register
from shfl_jax.patterns._shuffled import SEARCHES, RowSearch
from shfl_jax.patterns._tile import Tiles, nearest
from shfl_jax.patterns.search import _fours as fours

MIN_SPARSITY = 0.5
"""That of 2:4 alone."""

PASSES = 2
"""How often columns are chosen: first by medians over all columns, then by medians over the chosen ones."""


@register
@dataclasses.dataclass(frozen=True)
class TVW(base.Pattern):
    """TW, then 2:4 along the inputs that a tile keeps (Guo et al., IEEE TC 2024, arXiv 2402.10876).

    Tiles keep twice the density, 2 (1 - sparsity), so that a sparsity of 0.75 is TW at 50% and then 2:4. Here outputs
    and inputs are chosen for what 2:4 will keep of them (`spared_values`) rather than for all they hold, tiles keep a
    multiple of four inputs (or all K), and the inputs of a tile are put into fours of which every row can spare two
    (`order_columns`, in `shfl_jax.patterns.search` like the other), never worse than in the order given or in that of a
    previous mask.

    Where K is no multiple of four, a tile that keeps all its inputs has one four of fewer, of which a row keeps at most
    two as well. A count of more than that of whole tiles (partway through a schedule) keeps them, two of every four
    weights, and the best of the others, ranked over the layer.

    Attributes:
        sparsity: fraction of pruned weights, in [0.5, 1).
        tile_size: V, as in `TW`.
        outputs: as in `TW`.
        rounds: of the search for the order of the inputs.
    """

    tile_size: int = 128
    outputs: bool = True
    rounds: int = 16
    name: ClassVar[str] = "tvw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "tile_size")
        _check(self)

    @property
    def group_size(self) -> int:
        """V = tile_size."""
        return self.tile_size

    @property
    @override
    def min_sparsity(self) -> float:
        """That of 2:4 alone."""
        return MIN_SPARSITY

    @override
    def least(self, shape: tuple[int, ...]) -> int:
        """Two weights of one row, or one if there is but one input."""
        return min(2, shape[1])

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; `count` is the number of weights to keep.

        It is met to `tile_size` weights, half a four of one tile, unless one four of every tile is more already.
        """
        base.check_shape(self, scores.shape)
        (m, k), v = scores.shape, self.tile_size
        scores = ranking.normalised(scores)
        # There are no tiles yet, so every row is a group of its own. The values stand for TW's squares.
        values = fours.spared_values(scores, padded_rows(m, 1), jnp.ones((m, k), bool), 1)
        tiles = Tiles(v, self.outputs).mask_of_squares(values, _doubled(count, m * k))
        sizes = jnp.sum((tiles.rows < m).reshape(-1, v), axis=1, dtype=jnp.int32)
        sizes = jnp.where(tiles.kept.any(1), sizes, 0)[:, None]
        length = jnp.maximum(sizes, 1).astype(jnp.float32) / v

        def choose(sums: jax.Array, widths: jax.Array) -> jax.Array:
            best = jnp.arange(widths.shape[0]) == 0
            keys = jnp.where(best, ranking.ALWAYS, ranking.rank_keys(sums / length**2))
            keys = jnp.where(sizes > 0, keys, -1)
            return nearest(keys, count, sizes * jnp.minimum(widths, 2), best & (sizes > 0))

        return _mask(self, scores, tiles.rows, tiles.kept.any(1)[:, None], count, choose, previous)


@register
@dataclasses.dataclass(frozen=True)
class ShflTVW(base.Pattern):
    """2:4 inside the row groups of Shfl-BW, a combination found in neither paper.

    Groups keep twice the density, 2 (1 - sparsity), of their vectors, chosen in fours over the whole layer for what 2:4
    will keep of them; the row permutation is searched on those values too, and where rows in their order or those of a
    previous mask keep more in the end, they stay. See `TVW` for the rest.

    Attributes:
        sparsity: fraction of pruned weights, in [0.5, 1).
        group_size: V, rows of a group.
        balanced: as in `ShflBW`, like `min_share`, `search`, `shards` and `seed`.
        rounds: of the search for the order of the columns.
    """

    group_size: int = 64
    balanced: bool = False
    min_share: float = 0.0
    search: str = "annealing"
    shards: int = 1
    seed: int = 0
    rounds: int = 16
    name: ClassVar[str] = "shfl_tvw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "group_size", "shards")
        base.check_share(self, "min_share")
        base.check_choice(self, "search", SEARCHES)
        _check(self)

    @property
    @override
    def searches_rows(self) -> bool:
        """It does, as Shfl-BW."""
        return True

    @property
    @override
    def min_sparsity(self) -> float:
        """That of 2:4 alone."""
        return MIN_SPARSITY

    @override
    def least(self, shape: tuple[int, ...]) -> int:
        """Two weights of one row, or one if there is but one input."""
        return min(2, shape[1])

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; `count` is the number of weights to keep.

        It is met to `group_size` weights, half a four of one group (to M if `balanced`), unless one four or what
        `min_share` asks for is more already.
        """
        base.check_shape(self, scores.shape)
        m, k = scores.shape
        scores = ranking.normalised(scores)
        values = fours.spared_values(scores, padded_rows(m, 1), jnp.ones((m, k), bool), 1)
        # K-means' binary mask gets the density of the vectors; at twice that it would keep everything from 50% on.
        share = _share(jnp.asarray(count, jnp.int32), m * k)
        vectors = self._groups.number(scores.shape)
        density = 2 * (jnp.asarray(ranking.scaled(vectors, share), jnp.int32) / vectors).astype(jnp.float32)
        kept = jnp.maximum(ranking.scaled(vectors, _share(_doubled(count, m * k), m * k)), 1)
        search = RowSearch(self._groups, self.search, self.seed)
        rows = [search.rows(values, kept, density, previous), self._groups.rows_in_order(m)]
        if previous is not None:
            rows.append(previous.rows)

        # The search knows estimates alone: what 2:4 keeps of the groups decides between it and its starts.
        def mask_of(rows: jax.Array) -> Mask:
            return self.mask_of_rows(scores, rows, count, previous)

        masks = jax.lax.map(mask_of, jnp.stack(rows))
        best = jnp.argmax(jnp.sum(jnp.where(masks.elements(), scores, 0), (1, 2)))

        def take(array: jax.Array) -> jax.Array:
            return array[best]

        return jax.tree.map(take, masks)

    @override
    def mask_of_rows(
        self, scores: jax.Array, rows: jax.Array, count: jax.Array | int, previous: Mask | None = None
    ) -> Mask:
        """See `Pattern.mask_of_rows`."""
        m, k = scores.shape
        scores = ranking.normalised(scores)
        groups = rows.shape[0] // self.group_size
        share = _share(_doubled(count, m * k), m * k)
        sizes = jnp.sum((rows < m).reshape(groups, -1), axis=1, dtype=jnp.int32)[:, None]

        def choose(sums: jax.Array, widths: jax.Array) -> jax.Array:
            costs = sizes * jnp.minimum(widths, 2)
            if self.balanced:
                # The first four of all groups is a unit, then the second.
                keys, costs = jnp.arange(widths.shape[0], 0, -1, dtype=jnp.int32), costs.sum(0)
            else:
                # As in VW, the sums of a smaller group are scaled up to V rows.
                sums *= self.group_size / jnp.maximum(sizes, 1)
                keys = self._groups.keys_of_sums(sums, ranking.scaled(sums.size, share))
            budget = jnp.maximum(count, costs.max())
            return jnp.broadcast_to(
                nearest(keys, budget, costs, keys == ranking.ALWAYS, longer_of_two=True), sums.shape
            )

        return _mask(self, scores, rows, jnp.ones((groups, 1), bool), count, choose, previous)

    @property
    def _groups(self) -> Vectors:
        """How the row groups choose among their columns, before 2:4."""
        return Vectors(self.group_size, self.balanced, self.min_share, self.shards)


def _check(pattern: TVW | ShflTVW) -> None:
    """Raises ValueError for fields that 2:4 cannot have."""
    if pattern.sparsity < MIN_SPARSITY:
        raise base.field_error(pattern, "sparsity", "be at least 0.5, which 2:4 alone reaches (use VW or TW below)")
    if not isinstance(pattern.rounds, int) or pattern.rounds < 0:
        raise base.field_error(pattern, "rounds", "be a non-negative integer")


def _doubled(count: jax.Array | int, units: int) -> jax.Array:
    """The weights of the groups before 2:4."""
    count = jnp.asarray(count, jnp.int32)
    return jnp.where(count > units // 2, units, 2 * jnp.minimum(count, units // 2))


def _share(count: jax.Array, units: int) -> jax.Array:
    return count.astype(jnp.float32) / units


def _mask(
    pattern: TVW | ShflTVW,
    scores: jax.Array,
    rows: jax.Array,
    live: jax.Array,
    count: jax.Array | int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    previous: Mask | None,
) -> Mask:
    """Chooses columns in fours, orders them, and keeps two of every four.

    Args:
        pattern: whose `group_size` and `rounds` count.
        scores: (M, K).
        rows: (R * V,) int32.
        live: (R, 1) bool, groups that keep anything.
        count: the weights to keep.
        choose: (sums (R, F) of each group's columns in descending order, four by four; the number of columns in each of
            the F fours (F,)) -> (R, F) bool, the kept fours, a prefix of every group's.
        previous: a mask whose order of columns is one more start.
    """
    (m, k), v = scores.shape, pattern.group_size
    num_fours = -(-k // 4)
    widths = jnp.minimum(4, k - 4 * jnp.arange(num_fours, dtype=jnp.int32))
    kept = jnp.broadcast_to(live, (rows.shape[0] // v, k))
    for _ in range(PASSES):
        sums = sums_of_rows(fours.spared_values(scores, rows, kept, v), rows, v)
        best_first = jnp.argsort(-sums, axis=1, stable=True)
        ranked = jnp.pad(jnp.take_along_axis(sums, best_first, axis=1), ((0, 0), (0, -k % 4)))
        used = choose(ranked.reshape(-1, num_fours, 4).sum(2), widths).sum(1, keepdims=True)
        kept = (jnp.argsort(best_first, axis=1) < 4 * used) & live
    before = None if previous is None else previous.order
    order = fours.order_columns(scores, rows, kept, v, rounds=pattern.rounds, previous=before)
    chosen = fours.choose_two(scores, rows, order, v)

    def with_others() -> jax.Array:
        return ranking.top(
            jnp.where(chosen, ranking.ALWAYS, ranking.rank_keys(scores)), jnp.maximum(count, chosen.sum())
        )

    whole = m * (k // 4 * 2 + min(k % 4, 2))
    elements = jax.lax.cond(jnp.asarray(count) > whole, with_others, lambda: chosen)
    return Mask(rows, kept, m, order, elements)
