"""Vector-wise sparsity (VW): consecutive row groups with columns of their own."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from shfl_jax.patterns import _base as base
from shfl_jax.patterns._mask import Mask


@dataclasses.dataclass(frozen=True)
class VW(base.Pattern):
    """Keeps V x 1 vectors of consecutive rows by the sum of their scores.

    One threshold over the whole layer, so the counts of the row groups differ, unless `balanced`. Where M is no
    multiple of V the last group is smaller; its sums are scaled up to V rows, because its plain sums would rank last.

    Attributes:
        sparsity: fraction of pruned vectors, in [0, 1).
        group_size: V, rows of a group.
        balanced: every group keeps the same number of columns. Counts are then multiples of the number of groups R:
            `count` gives such a number, `mask` rounds any other to the nearest.
        min_share: every group keeps at least this fraction, in [0, 1], of the mean number of columns a group keeps.
    """

    group_size: int = 64  # pyrefly: ignore[bad-override]
    balanced: bool = False
    min_share: float = 0.0
    name: ClassVar[str] = "vw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "group_size")
        if not 0 <= self.min_share <= 1:
            raise base.field_error(self, "min_share", "lie in [0, 1]")

    def num_groups(self, m: int) -> int:
        """R, the number of row groups of a layer with M outputs."""
        return -(-m // self.group_size)

    def units(self, shape: tuple[int, ...]) -> int:
        """R * K vectors."""
        return self.num_groups(shape[0]) * shape[1]

    def least(self, shape: tuple[int, ...]) -> int:
        """One vector, or one a group if balanced."""
        return self.num_groups(shape[0]) if self.balanced else 1

    def step(self, shape: tuple[int, ...]) -> int:
        """One vector, or one a group if balanced."""
        return self.least(shape)

    def unit_keys(self, scores: jax.Array) -> jax.Array:
        """See `Pattern.unit_keys`: vectors of consecutive rows; if balanced, the groups' best, second best and so on.

        Shfl-BW also ranks vectors of rows in their own order: a search would need the count.
        """
        m = scores.shape[0]
        rows = jnp.minimum(jnp.arange(self.num_groups(m) * self.group_size, dtype=jnp.int32), m)
        sums = base.group_scores(scores, rows, self.group_size)
        if self.balanced:
            sums = jnp.sort(sums, axis=1, descending=True).mean(0)
        return base.rank_keys(sums).reshape(-1)

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one vector, vectors are numbered along K first."""
        base.check_shape(self, scores.shape)
        m = scores.shape[0]
        return self.mask_of_rows(scores, base.padded_rows(m, self.group_size), count)

    def mask_of_rows(self, scores: jax.Array, rows: jax.Array, count: jax.Array | int) -> Mask:
        """The mask for a given row permutation: scores (M, K), rows (R * V,) int32 with sentinels M."""
        groups = rows.shape[0] // self.group_size
        sums = base.group_scores(scores, rows, self.group_size)
        return Mask(rows, self.choose(sums, count, groups), scores.shape[0])

    def choose(self, sums: jax.Array, count: jax.Array | int, groups: int) -> jax.Array:
        """The kept columns for the sums of every row group: (R, K) float32 to (R, K) bool."""
        keys = base.rank_keys(sums)
        top_of_groups = jax.vmap(base.top, in_axes=(0, None))
        if self.balanced:
            return top_of_groups(keys, (jnp.asarray(count, jnp.int32) + groups // 2) // groups)
        if self.min_share:
            floor = base.scaled(jnp.asarray(count, jnp.int32) // groups, self.min_share)
            keys = jnp.where(top_of_groups(keys, floor), base.ALWAYS, keys)
        return base.top(keys, count)
