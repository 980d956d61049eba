"""Vector-wise sparsity (VW): consecutive row groups with columns of their own."""

import dataclasses
from typing import ClassVar

import jax
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns._groups import Vectors, padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register


@register
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

    group_size: int = 64
    balanced: bool = False
    min_share: float = 0.0
    name: ClassVar[str] = "vw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "group_size")
        base.check_share(self, "min_share")

    @property
    @override
    def vectors(self) -> Vectors:
        """Of consecutive rows."""
        return Vectors(self.group_size, self.balanced, self.min_share)

    @override
    def units(self, shape: tuple[int, ...]) -> int:
        """R * K vectors."""
        return self.vectors.number(shape)

    @override
    def least(self, shape: tuple[int, ...]) -> int:
        """One vector, or one a group if balanced."""
        return self.vectors.step(shape)

    @override
    def step(self, shape: tuple[int, ...]) -> int:
        """One vector, or one a group if balanced."""
        return self.vectors.step(shape)

    @override
    def unit_keys(self, scores: jax.Array) -> jax.Array:
        """See `Pattern.unit_keys`: vectors of rows in their own order, for Shfl-BW too: a search would need the count.

        If balanced, the groups' best, second best and so on.
        """
        return self.vectors.keys(scores)

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one vector, vectors are numbered along K first."""
        base.check_shape(self, scores.shape)
        return self.mask_of_rows(scores, padded_rows(scores.shape[0], self.group_size), count)

    @override
    def mask_of_rows(
        self, scores: jax.Array, rows: jax.Array, count: jax.Array | int, previous: Mask | None = None
    ) -> Mask:
        """See `Pattern.mask_of_rows`."""
        return self.vectors.mask_of_rows(scores, rows, count)
