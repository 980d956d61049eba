"""Unstructured (element-wise, EW) sparsity."""

import dataclasses
from typing import ClassVar

import jax

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register


@register
@dataclasses.dataclass(frozen=True)
class Unstructured(base.Pattern):
    """Keeps the highest-scoring weights of a layer, wherever they are. Upper anchor for accuracy; it has no kernel.

    Attributes:
        sparsity: fraction of pruned weights, in [0, 1).
    """

    name: ClassVar[str] = "unstructured"

    @property
    def group_size(self) -> int:
        """V = 1: every row has its own columns."""
        return 1

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one weight."""
        base.check_shape(self, scores.shape)
        m = scores.shape[0]
        return Mask(padded_rows(m, 1), ranking.top(ranking.rank_keys(scores), count), m)
