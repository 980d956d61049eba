"""Shuffled block-wise sparsity (Shfl-BW): vector-wise sparsity after a row permutation."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from shfl_jax.patterns import _base as base
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._vector import VW
from shfl_jax.patterns.search import _annealing as annealing
from shfl_jax.patterns.search import _kmeans as permutation

SEARCHES = ("annealing", "kmeans")


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
        if self.search not in SEARCHES:
            raise base.field_error(self, "search", f"be one of {', '.join(map(repr, SEARCHES))}")

    def num_groups(self, m: int) -> int:
        """R: every shard has whole groups and perhaps a smaller one."""
        if m % self.shards:
            raise ValueError(f"shards={self.shards} must divide the layer's {m} outputs; use a divisor of {m}")
        return self.shards * -(-m // self.shards // self.group_size)

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one vector. The search also starts from the permutation of `previous`."""
        base.check_shape(self, scores.shape)
        density = 2 * (jnp.asarray(count, jnp.int32) / self.units(scores.shape)).astype(jnp.float32)
        return self.mask_of_rows(scores, self.group_rows(scores, count, density, previous), count)

    def group_rows(
        self, scores: jax.Array, count: jax.Array | int, density: jax.Array, previous: Mask | None
    ) -> jax.Array:
        """Searches the row permutation.

        Args:
            scores: (M, K) floating.
            count: int32 scalar, the number of vectors to be kept.
            density: float32 scalar, of the binary mask that K-means clusters.
            previous: a mask whose permutation is one more start.

        Returns:
            (R * V,) int32 with sentinels M.
        """
        m, k = scores.shape
        groups, size = self.num_groups(m) // self.shards, m // self.shards
        offset = jnp.arange(self.shards, dtype=jnp.int32)[:, None, None] * size
        start = None
        if previous is not None:
            if previous.shape != (m, k) or previous.rows.shape != (groups * self.shards * self.group_size,):
                raise ValueError(
                    f"the previous mask, of shape {previous.shape} with groups of {previous.group_size}, does not fit "
                    f"scores of shape {(m, k)} with groups of {self.group_size}"
                )
            start = previous.rows.reshape(self.shards, groups, self.group_size)
            start = jnp.where(start == m, size, start - offset)
        key = jax.random.key(self.seed)
        found = _kmeans(self, scores, density, key, start)
        if self.search == "annealing":
            found = _annealing(self, scores, count, key, [found] if start is None else [found, start])
        return jnp.where(found == size, m, found + offset).reshape(-1)


def _kmeans(
    pattern: ShflBW, scores: jax.Array, density: jax.Array, key: jax.Array, start: jax.Array | None
) -> jax.Array:
    """The published search: groupings (S, R / S, V) of every shard's rows, numbered within the shard."""
    m, k = scores.shape
    binary = base.top(base.rank_keys(scores), base.scaled(m * k, density))
    shards = binary.reshape(pattern.shards, m // pattern.shards, k)

    def search(shard: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        rows, key, start = shard
        return permutation.kmeans(rows, pattern.group_size, key, start=start)

    # One shard after another, in one compiled loop.
    return jax.lax.map(search, (shards, jax.random.split(key, pattern.shards), start))


def _annealing(
    pattern: ShflBW, scores: jax.Array, count: jax.Array | int, key: jax.Array, starts: list[jax.Array]
) -> jax.Array:
    """The search for what is kept, from the rows in order and from other groupings (S, R / S, V)."""
    m, k = scores.shape
    size, groups = m // pattern.shards, pattern.num_groups(m)
    in_order = base.padded_rows(size, pattern.group_size).reshape(starts[0].shape[1:])
    in_order = jnp.broadcast_to(in_order, starts[0].shape)
    # As in VW, the sums of a smaller group are scaled up to V rows.
    factor = pattern.group_size / jnp.sum(in_order < size, axis=2, keepdims=True, dtype=jnp.float32)

    def choose(sums: jax.Array) -> jax.Array:
        return pattern.choose((sums * factor).reshape(groups, k), count, groups).reshape(sums.shape)

    shards = scores.reshape(pattern.shards, size, k)
    found = annealing.anneal(shards, choose, jnp.stack([in_order, *starts]), key)
    return jax.vmap(lambda shard: permutation.sort_groups(shard, size))(found)
