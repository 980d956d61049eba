"""Block-wise sparsity (BW)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import group_scores, padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register


@register
@dataclasses.dataclass(frozen=True)
class BW(base.Pattern):
    """Keeps whole b x b blocks by the sum of their scores.

    A block cut short by the edge of the matrix is ranked by its sum scaled up to a whole block; ranked by the plain sum
    it would always be pruned first.

    Attributes:
        sparsity: fraction of pruned blocks, in [0, 1).
        block_size: b, the sides of a block.
    """

    block_size: int = 32
    name: ClassVar[str] = "bw"

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_sizes(self, "block_size")

    @property
    def group_size(self) -> int:
        """V = b."""
        return self.block_size

    @override
    def units(self, shape: tuple[int, ...]) -> int:
        """Blocks, those at the edges included."""
        return -(-shape[0] // self.block_size) * -(-shape[1] // self.block_size)

    @override
    def unit_keys(self, scores: jax.Array) -> jax.Array:
        """See `Pattern.unit_keys`: blocks, by their sums."""
        rows, columns = (padded_rows(size, self.block_size) for size in scores.shape)
        strips = group_scores(scores, rows, self.block_size)
        return ranking.rank_keys(group_scores(strips.T, columns, self.block_size).T).reshape(-1)

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one block, blocks are numbered along K first."""
        base.check_shape(self, scores.shape)
        m, k = scores.shape
        kept = ranking.top(self.unit_keys(ranking.normalised(scores)), count).reshape(-(-m // self.block_size), -1)
        rows = padded_rows(m, self.block_size)
        return Mask(rows, jnp.repeat(kept, self.block_size, axis=1)[:, :k], m)
