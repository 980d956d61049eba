"""N:M sparsity along the inputs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from shfl_jax.patterns import _base as base
from shfl_jax.patterns import _ranking as ranking
from shfl_jax.patterns._groups import padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._registry import register


@register
@dataclasses.dataclass(frozen=True)
class NM(base.Pattern):
    """Keeps the n highest-scoring of every m consecutive inputs of every output (2:4 unless told otherwise).

    Partway through a schedule it keeps those n and then the best of the other weights, ranked over the whole layer, so
    that every step prunes a few more weights until exactly n of m are left. Where K is no multiple of m, the last
    inputs form a shorter run that keeps at most n as well.

    Attributes:
        n: weights kept.
        m: of as many consecutive inputs.
        sparsity: 1 - n / m, derived.
    """

    n: int = 2
    m: int = 4
    sparsity: float = dataclasses.field(init=False, repr=False, compare=False)
    name: ClassVar[str] = "nm"

    def __post_init__(self) -> None:
        base.check_sizes(self, "n", "m")
        if self.n > self.m:
            raise ValueError(f"NM cannot keep n={self.n} of every m={self.m} weights; n must not exceed m")
        object.__setattr__(self, "sparsity", 1 - self.n / self.m)

    @property
    def group_size(self) -> int:
        """V = 1: every row has its own columns."""
        return 1

    @property
    @override
    def min_sparsity(self) -> float:
        """Its only one."""
        return self.sparsity

    @property
    @override
    def max_sparsity(self) -> float:
        """Its only one."""
        return self.sparsity

    @override
    def least(self, shape: tuple[int, ...]) -> int:
        """The kept weights at full sparsity."""
        runs, rest = divmod(shape[1], self.m)
        return shape[0] * (runs * self.n + min(self.n, rest))

    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """See `Pattern.mask`; a unit is one weight, and never fewer than n of m are kept."""
        base.check_shape(self, scores.shape)
        rows, k = scores.shape
        keys = ranking.rank_keys(scores)
        # A run filled up with keys of -1 ranks its true members first.
        runs = jnp.pad(keys, ((0, 0), (0, -k % self.m)), constant_values=-1).reshape(rows, -1, self.m)
        rank = jnp.argsort(jnp.argsort(-runs, axis=-1, stable=True), axis=-1, stable=True)
        always = (rank < self.n).reshape(rows, -1)[:, :k]
        kept = ranking.top(jnp.where(always, ranking.ALWAYS, keys), jnp.maximum(count, self.least(scores.shape)))
        return Mask(padded_rows(rows, 1), kept, rows)
