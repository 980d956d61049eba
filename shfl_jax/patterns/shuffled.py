"""Shuffled block-wise sparsity (Shfl-BW): vector-wise sparsity after a row permutation."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from shfl_jax import permutation
from shfl_jax.masks import Mask
from shfl_jax.patterns import base
from shfl_jax.patterns.vector import VW


@dataclasses.dataclass(frozen=True)
class ShflBW(VW):
    """VW after the best row permutation found, so that rows that keep the same columns share a group.

    `search="kmeans"` is the published search as the code of `boone891214/GaP` has it (`block_row_permuted` in
    `Transformer/prune_utils`, taken to be that of Shfl-BW, Huang et al., DAC 2022): an unstructured binary mask at
    twice the target density, size-constrained K-means over its rows, then vectors chosen on the permuted scores. That
    code calls the package `k_means_constrained` on the host; here the clustering is `shfl_jax.permutation.kmeans`.
    From half density on the binary mask keeps everything, and rows stay in their order.

    Attributes:
        sparsity: fraction of pruned vectors, in [0, 1).
        group_size: V, rows of a group.
        balanced: every group keeps the same number of columns (see `VW`).
        min_share: every group keeps at least this fraction, in [0, 1], of the mean number of columns a group keeps.
        search: how rows are grouped: "kmeans".
        shards: the permutation stays inside each of this many equal blocks of rows; it must divide M.
        seed: of the search's random choices.
    """

    search: str = "kmeans"
    shards: int = 1
    seed: int = 0
    name: ClassVar[str] = "shfl_bw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "shards")
        if self.search not in _SEARCHES:
            raise base.field_error(self, "search", f"be one of {', '.join(map(repr, _SEARCHES))}")

    def num_groups(self, m: int) -> int:
        """R: every shard has whole groups and perhaps a smaller one."""
        if m % self.shards:
            raise ValueError(f"shards={self.shards} must divide the layer's {m} outputs; use a divisor of {m}")
        return self.shards * -(-m // self.shards // self.group_size)

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one vector. The search also starts from the permutation of `previous`."""
        base.check_shape(self, scores.shape)
        m, k = scores.shape
        groups, size = self.num_groups(m) // self.shards, m // self.shards
        start = None
        if previous is not None:
            if previous.shape != (m, k) or previous.rows.shape != (groups * self.shards * self.group_size,):
                raise ValueError(
                    f"the previous mask, of shape {previous.shape} with groups of {previous.group_size}, does not fit "
                    f"scores of shape {(m, k)} with groups of {self.group_size}"
                )
            offset = jnp.arange(self.shards, dtype=jnp.int32)[:, None, None] * size
            start = previous.rows.reshape(self.shards, groups, self.group_size)
            start = jnp.where(start == m, size, start - offset)
        found = _SEARCHES[self.search](self, scores, count, jax.random.key(self.seed), start)
        rows = jnp.where(found == size, m, found + jnp.arange(self.shards, dtype=jnp.int32)[:, None, None] * size)
        return self.mask_of_rows(scores, rows.reshape(-1), count)


def _kmeans(
    pattern: ShflBW, scores: jax.Array, count: jax.Array | int, key: jax.Array, start: jax.Array | None
) -> jax.Array:
    """The published search: groupings (S, R / S, V) of every shard's rows, numbered within the shard."""
    m, k = scores.shape
    doubled = 2 * (jnp.asarray(count, jnp.int32) / pattern.units((m, k))).astype(jnp.float32)
    binary = base.top(base.rank_keys(scores), base.scaled(m * k, doubled))
    shards = binary.reshape(pattern.shards, m // pattern.shards, k)

    def search(shard: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        rows, key, start = shard
        return permutation.kmeans(rows, pattern.group_size, key, start=start)

    # One shard after another, in one compiled loop.
    return jax.lax.map(search, (shards, jax.random.split(key, pattern.shards), start))


_SEARCHES = {"kmeans": _kmeans}
