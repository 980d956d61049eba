"""Row groups: rows in their order, sums over the rows of every group, and which vectors a group keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._ranking import ALWAYS, normalised, rank_keys, scaled, top
from shfl_jax.patterns.search._fours import group_members


@dataclasses.dataclass(frozen=True)
class Vectors:
    """V x 1 vectors of row groups: how many a layer has, and which of them are kept.

    Attributes:
        group_size: V, rows of a group.
        balanced: every group keeps the same number of columns.
        min_share: every group keeps at least this fraction, in [0, 1], of the mean number of columns a group keeps.
        shards: groups stay inside each of this many equal blocks of rows; it must divide M.
    """

    group_size: int
    balanced: bool = False
    min_share: float = 0.0
    shards: int = 1

    def groups(self, m: int) -> int:
        """R of a layer with M outputs: every shard has whole groups and perhaps a smaller one."""
        if m % self.shards:
            raise ValueError(f"shards={self.shards} must divide the layer's {m} outputs; use a divisor of {m}")
        return self.shards * -(-m // self.shards // self.group_size)

    def rows_in_order(self, m: int) -> jax.Array:
        """Rows in their order, every shard filled up with the sentinel M to whole groups: (R * V,) int32."""
        size = m // self.shards
        in_shard = np.arange(self.groups(m) // self.shards * self.group_size, dtype=np.int32)
        offset = np.arange(self.shards, dtype=np.int32)[:, None] * size
        return jnp.asarray(np.where(in_shard < size, in_shard + offset, m).reshape(-1))

    def number(self, shape: tuple[int, ...]) -> int:
        """R * K vectors of a layer of shape (M, K)."""
        return self.groups(shape[0]) * shape[1]

    def step(self, shape: tuple[int, ...]) -> int:
        """The number that counts are multiples of: one vector, or one a group if balanced."""
        return self.groups(shape[0]) if self.balanced else 1

    def keys(self, scores: jax.Array) -> jax.Array:
        """Rank keys of the vectors of rows in their order; if balanced, of the groups' best, second best and so on.

        Args:
            scores: (M, K) floating.

        Returns:
            (R * K,) int32, or (K,) if balanced.
        """
        m = scores.shape[0]
        rows = jnp.minimum(jnp.arange(self.groups(m) * self.group_size, dtype=jnp.int32), m)
        sums = group_scores(scores, rows, self.group_size)
        if self.balanced:
            sums = jnp.sort(sums, axis=1, descending=True).mean(0)
        return rank_keys(sums).reshape(-1)

    def choose(self, sums: jax.Array, count: jax.Array | int) -> jax.Array:
        """The kept columns for the sums of every row group: (R, K) float32 to (R, K) bool."""
        if self.balanced:
            groups = sums.shape[0]
            return _top_of_groups(rank_keys(sums), (jnp.asarray(count, jnp.int32) + groups // 2) // groups)
        return top(self.keys_of_sums(sums, count), count)

    def keys_of_sums(self, sums: jax.Array, count: jax.Array | int) -> jax.Array:
        """Rank keys for the sums of every row group (R, K), `ALWAYS` for the floors of groups if `count` are kept."""
        keys, groups = rank_keys(sums), sums.shape[0]
        if not self.min_share:
            return keys
        floor = scaled(jnp.asarray(count, jnp.int32) // groups, self.min_share)
        return jnp.where(_top_of_groups(keys, floor), ALWAYS, keys)

    def mask_of_rows(self, scores: jax.Array, rows: jax.Array, count: jax.Array | int) -> Mask:
        """See `Pattern.mask_of_rows`."""
        sums = group_scores(normalised(scores), rows, self.group_size)
        return Mask(rows, self.choose(sums, count), scores.shape[0])


def _top_of_groups(keys: jax.Array, count: jax.Array | int) -> jax.Array:
    return jax.vmap(top, in_axes=(0, None))(keys, count)


def padded_rows(m: int, group_size: int) -> jax.Array:
    """Rows in their order, filled up with the sentinel M to whole groups: (R * V,) int32."""
    rows = np.arange(-(-m // group_size) * group_size, dtype=np.int32)
    return jnp.asarray(np.minimum(rows, m))


def sums_of_rows(scores: jax.Array, rows: jax.Array, group_size: int) -> jax.Array:
    """Sums of scores (M, K) over the rows of every group: (R, K) float32. `rows` (R * V,) may hold sentinels M."""
    return group_members(scores, rows, group_size).sum(1)


def group_scores(scores: jax.Array, rows: jax.Array, group_size: int) -> jax.Array:
    """As `sums_of_rows`, with the sums of a smaller group scaled up to V rows."""
    sizes = jnp.sum((rows < scores.shape[0]).reshape(-1, group_size), axis=1, dtype=jnp.float32)
    # The factor of a whole group is exactly 1: integer-valued scores stay exact.
    return sums_of_rows(scores, rows, group_size) * (group_size / jnp.maximum(sizes, 1))[:, None]
