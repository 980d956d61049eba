"""Shuffled block-wise sparsity (Shfl-BW): vector-wise sparsity after a row permutation."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import Vectors, padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register
from shfl_jax.patterns._vector import VW
from shfl_jax.patterns.search import _annealing as annealing
from shfl_jax.patterns.search import _kmeans as permutation

SEARCHES = ("annealing", "kmeans")


@dataclasses.dataclass(frozen=True)
class RowSearch:
    """The search of a row permutation, inside each shard.

    Attributes:
        vectors: what is chosen once rows are grouped.
        method: one of `SEARCHES`; see `ShflBW`.
        seed: of the search's random choices.
    """

    vectors: Vectors
    method: str
    seed: int

    def rows(self, scores: jax.Array, count: jax.Array | int, density: jax.Array, previous: Mask | None) -> jax.Array:
        """Searches the row permutation.

        Args:
            scores: (M, K) floating.
            count: int32 scalar, the number of vectors to be kept.
            density: float32 scalar, of the binary mask that K-means clusters.
            previous: a mask whose permutation is one more start.

        Returns:
            (R * V,) int32 with sentinels M.
        """
        (m, k), v, shards = scores.shape, self.vectors.group_size, self.vectors.shards
        groups, size = self.vectors.groups(m) // shards, m // shards
        offset = jnp.arange(shards, dtype=jnp.int32)[:, None, None] * size
        start = None
        if previous is not None:
            if previous.shape != (m, k) or previous.rows.shape != (groups * shards * v,):
                raise ValueError(
                    f"the previous mask, of shape {previous.shape} with groups of {previous.group_size}, does not fit "
                    f"scores of shape {(m, k)} with groups of {v}"
                )
            start = previous.rows.reshape(shards, groups, v)
            start = jnp.where(start == m, size, start - offset)
        key = jax.random.key(self.seed)
        found = self._kmeans(scores, density, key, start)
        if self.method == "annealing":
            found = self._annealing(scores, count, key, [found] if start is None else [found, start])
        return jnp.where(found == size, m, found + offset).reshape(-1)

    def _kmeans(self, scores: jax.Array, density: jax.Array, key: jax.Array, start: jax.Array | None) -> jax.Array:
        """The published search: groupings (S, R / S, V) of every shard's rows, numbered within the shard."""
        (m, k), shards = scores.shape, self.vectors.shards
        binary = ranking.top(ranking.rank_keys(scores), ranking.scaled(m * k, density))

        def search(shard: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
            rows, key, start = shard
            return permutation.kmeans(rows, self.vectors.group_size, key, start=start)

        # One shard after another, in one compiled loop.
        return jax.lax.map(search, (binary.reshape(shards, m // shards, k), jax.random.split(key, shards), start))

    def _annealing(
        self, scores: jax.Array, count: jax.Array | int, key: jax.Array, starts: list[jax.Array]
    ) -> jax.Array:
        """The search for what is kept, from the rows in order and from other groupings (S, R / S, V)."""
        (m, k), v, shards = scores.shape, self.vectors.group_size, self.vectors.shards
        size = m // shards
        in_order = padded_rows(size, v).reshape(starts[0].shape[1:])
        in_order = jnp.broadcast_to(in_order, starts[0].shape)
        # As in VW, the sums of a smaller group are scaled up to V rows.
        factor = v / jnp.sum(in_order < size, axis=2, keepdims=True, dtype=jnp.float32)

        def choose(sums: jax.Array) -> jax.Array:
            return self.vectors.choose((sums * factor).reshape(-1, k), count).reshape(sums.shape)

        def sort(shard: jax.Array) -> jax.Array:
            return permutation.sort_groups(shard, size)

        shards_of_scores = scores.reshape(shards, size, k)
        return jax.vmap(sort)(annealing.anneal(shards_of_scores, choose, jnp.stack([in_order, *starts]), key))


@register
@dataclasses.dataclass(frozen=True)
class ShflBW(VW):
    """VW after the best row permutation found, so that rows that keep the same columns share a group.

    `search="annealing"` (in `shfl_jax.patterns.search`) maximises what the groups keep, at any sparsity and for the
    counts that `balanced` and `min_share` ask for. It starts from the rows in order, from K-means' groups and from a
    previous mask, and is never worse than any of them.

    `search="kmeans"` is the published search as the code of `boone891214/GaP` has it (`block_row_permuted` in
    `Transformer/prune_utils`, taken to be that of Shfl-BW, Huang et al., DAC 2022): an unstructured binary mask at
    twice the target density, size-constrained K-means over its rows, then vectors chosen on the permuted scores. That
    code calls the package `k_means_constrained` on the host; here the clustering is `kmeans` in
    `shfl_jax.patterns.search`. At densities of 0.5 and above the binary mask keeps everything,
    and rows stay in their order.

    Attributes:
        sparsity: fraction of pruned vectors, in [0, 1).
        group_size: as in `VW`, like `balanced` and `min_share`.
        search: how rows are grouped: "annealing" or "kmeans".
        shards: the permutation stays inside each of this many equal blocks of rows; it must divide M.
        seed: of the search's random choices.
    """

    search: str = "annealing"
    shards: int = 1
    seed: int = 0
    name: ClassVar[str] = "shfl_bw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "shards")
        base.check_choice(self, "search", SEARCHES)

    @property
    @override
    def vectors(self) -> Vectors:
        """Of rows that stay in their shard."""
        return Vectors(self.group_size, self.balanced, self.min_share, self.shards)

    @property
    @override
    def searches_rows(self) -> bool:
        """It does."""
        return True

    @override
    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one vector. The search also starts from the permutation of `previous`."""
        base.check_shape(self, scores.shape)
        scores = ranking.normalised(scores)
        density = 2 * (jnp.asarray(count, jnp.int32) / self.units(scores.shape)).astype(jnp.float32)
        search = RowSearch(self.vectors, self.search, self.seed)
        return self.mask_of_rows(scores, search.rows(scores, count, density, previous), count)
