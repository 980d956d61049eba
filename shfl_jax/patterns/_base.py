"""What all patterns share: their interface, exact unit counts and the ranked choice of units."""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns.search._fours import group_members

ALWAYS = np.iinfo(np.int32).max
"""The rank key of a unit that is kept before all others."""


class Limits(NamedTuple):
    """How many units every slice of a layer keeps; int32 scalars, traced or not.

    Attributes:
        least: the fewest.
        count: when pruned on its own; layers that are ranked together share the sum of their counts.
        most: the most.
    """

    least: jax.Array
    count: jax.Array
    most: jax.Array


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """Which units of a layer may be pruned together.

    Attributes:
        sparsity: target fraction of pruned weights, in [0, 1).
        name: the pattern's name in tables and results files.
        group_size: V of the masks.
    """

    sparsity: float
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the fraction of pruned weights and must lie in [0, 1), got {self.sparsity}")

    @property
    @abc.abstractmethod
    def group_size(self) -> int:
        """V, rows of a group of the masks."""

    @abc.abstractmethod
    def units(self, shape: tuple[int, ...]) -> int:
        """The number of units in a layer of shape (M, K)."""

    @abc.abstractmethod
    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """Chooses the kept units of one layer. Pure, of fixed shapes, jit-able and vmap-able.

        Args:
            scores: (M, K) floating, non-negative and finite.
            count: int32 scalar, the number of kept units; may be traced.
            previous: an earlier mask of the layer, from which patterns that search may start.

        Returns:
            The mask. Ties go to the lower index.
        """

    @property
    def min_sparsity(self) -> float:
        """The lowest sparsity of a layer that is pruned to this pattern."""
        return 0.0

    def least(self, shape: tuple[int, ...]) -> int:
        """The smallest number of units that a mask keeps, whatever the sparsity."""
        return min(1, self.units(shape))

    def step(self, shape: tuple[int, ...]) -> int:
        """The number that counts of kept units are multiples of."""
        return 1

    def unit_keys(self, scores: jax.Array) -> jax.Array:
        """What `rank` ranks the units of one layer by, comparable between all layers of this pattern.

        Args:
            scores: (M, K) floating, non-negative and finite.

        Returns:
            int32 rank keys, flat: one for every `step` units. Weight by weight unless a pattern says otherwise.
        """
        return rank_keys(scores).reshape(-1)

    def rank(self, scores: Sequence[jax.Array], limits: Sequence[Limits]) -> list[Any]:
        """How many units each of several layers keeps when the units of all are ranked together.

        Args:
            scores: (B, M, K) of each layer, of B slices that are ranked as layers of their own.
            limits: of each layer.

        Returns:
            For each layer, the counts of its slices (B,) as `mask` takes them. Their sum is that of the layers' own
            counts, less at most one unit (`step` units), unless the limits prevent it.
        """
        keys = [jax.vmap(self.unit_keys)(s) for s in scores]
        return rank_together(keys, [self.step(s.shape[1:]) for s in scores], limits)

    def count(
        self,
        shape: tuple[int, ...],
        sparsity: float | jax.Array | None = None,
        fraction: float | jax.Array = 1.0,
    ) -> jax.Array:
        """The number of kept units, to the nearest multiple of `step`, for every size below 2^31 and without x64.

        Args:
            shape: (M, K) of the layer.
            sparsity: target sparsity, the pattern's own unless given; may be traced.
            fraction: scales the sparsity (the progress of a schedule), in [0, 1]; may be traced. 0 keeps everything, 1
                prunes exactly as many units as no fraction at all.

        Returns:
            int32 scalar. At least one unit is kept.

        Raises:
            ValueError: the layer has no weights, or too many for 32-bit indices.
        """
        check_shape(self, shape)
        units = self.units(shape)
        pruned = scaled(scaled(units, self.sparsity if sparsity is None else sparsity), fraction)
        kept = jnp.maximum(units - jnp.asarray(pruned, jnp.int32), self.least(shape))
        return (kept + self.step(shape) // 2) // self.step(shape) * self.step(shape)


def check_sizes(pattern: Pattern, *names: str) -> None:
    """Raises ValueError unless the named fields of the pattern are integers of at least 1."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(pattern).__name__}'s {name} must be an integer of at least 1, got {value!r}")


def check_shape(pattern: Pattern, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the shape is that of a non-empty matrix with 32-bit indices."""
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{type(pattern).__name__} prunes a non-empty (M, K) matrix, got shape {tuple(shape)}")
    if math.prod(shape) > ALWAYS:
        raise ValueError(f"a layer of shape {tuple(shape)} has 2^31 weights or more; split it")


def scaled(number: int | jax.Array, factor: float | jax.Array) -> int | jax.Array:
    """The integer nearest to `number * factor`, to within one, where float32 would be off by more.

    Args:
        number: an integer in [0, 2^31); may be traced.
        factor: a number in [0, 1]; may be traced, and is clipped then.

    Returns:
        A Python int if neither is traced (computed in float64), otherwise an int32 scalar.
    """
    if not isinstance(number, jax.Array) and not isinstance(factor, jax.Array):
        return round(number * float(factor))
    # 32.32-bit fixed point: float32 holds 24 bits of the factor, the product needs 55.
    fixed = jnp.round(jnp.clip(jnp.asarray(factor, jnp.float32), 0, 1) * 2**30).astype(jnp.uint32)
    number = jnp.asarray(number, jnp.uint32)
    (n_high, n_low), (f_high, f_low) = ((x >> 16, x & 0xFFFF) for x in (number, fixed))
    low = n_low * f_low
    middle = n_high * f_low + (low >> 16)
    middle_low = (middle & 0xFFFF) + n_low * f_high
    high = n_high * f_high + (middle >> 16) + (middle_low >> 16)
    rest = ((middle_low & 0xFFFF) << 16) | (low & 0xFFFF)
    return ((high << 2) + (rest >> 30) + ((rest >> 29) & 1)).astype(jnp.int32)


def rank_keys(scores: jax.Array) -> jax.Array:
    """Integers that rank as the scores do: float32 of any shape, non-negative, to int32. NaN ranks above infinity."""
    return jax.lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)


@jax.jit
def top(keys: jax.Array, budget: jax.Array | int, costs: jax.Array | None = None) -> jax.Array:
    """The longest ranked prefix whose cost stays within a budget.

    Two bisections, of the key and of the index, instead of a sort: linear time, no memory beyond masks.

    Args:
        keys: int32 of any shape, non-negative; larger is better, ties go to the lower (row-major) index.
        budget: int32 scalar; may be traced.
        costs: int32 of the same shape, positive; 1 each unless given.

    Returns:
        bool of the same shape.
    """
    index = jnp.arange(keys.size, dtype=jnp.int32).reshape(keys.shape)
    budget = jnp.asarray(budget, jnp.int32)

    def cost(chosen: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen, 1 if costs is None else costs, 0), dtype=jnp.int32)

    threshold = _largest(31, lambda key: cost(keys >= key) > budget)
    above, ties = keys > threshold, keys == threshold
    rest = budget - cost(above)
    return above | (ties & (index < _largest(keys.size.bit_length(), lambda end: cost(ties & (index < end)) <= rest)))


def _largest(bits: int, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest int32 of so many bits for which a condition holds, 0 if none; it must hold for all smaller ones."""

    def try_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        larger = found | (1 << (bits - 1 - i))
        return jnp.where(holds(larger), larger, found)

    return jax.lax.fori_loop(0, bits, try_bit, jnp.int32(0))


def rank_together(
    keys: Sequence[jax.Array], costs: Sequence[int | jax.Array], limits: Sequence[Limits]
) -> list[jax.Array]:
    """What each of several layers keeps of the longest ranked prefix, over all of them, within their joint budget.

    Args:
        keys: (B, ...) int32 of each layer's units; larger is better, ties go to the earlier layer and slice.
        costs: of a unit of each layer; an integer, or int32 in the shape of its keys.
        limits: of each layer, in cost; scalars, or (B,) for its slices. The counts add up to the budget.

    Returns:
        (B,) int32 of each layer: the cost of its units in the prefix, clipped to the limits.
    """
    slices = [k.shape[0] for k in keys]

    def joined(values: Sequence[int | jax.Array]) -> jax.Array:
        parts = zip(values, slices, strict=True)
        return jnp.concatenate([jnp.broadcast_to(jnp.asarray(value, jnp.int32), b) for value, b in parts])

    least, counts, most = (joined(values) for values in zip(*limits, strict=True))

    def cost(chosen: Sequence[jax.Array]) -> jax.Array:
        parts = [jnp.where(c, price, 0).reshape(b, -1) for c, price, b in zip(chosen, costs, slices, strict=True)]
        return jnp.clip(jnp.concatenate([part.sum(1, dtype=jnp.int32) for part in parts]), least, most)

    threshold = _largest(31, lambda key: _clipped_sum(cost([k >= key for k in keys]) - counts) > 0)
    above = cost([k > threshold for k in keys])
    ties = cost([k >= threshold for k in keys]) - above
    rest = jnp.maximum(-_clipped_sum(above - counts), 0)
    _, taken = jax.lax.scan(lambda rest, tie: (jnp.maximum(rest - tie, 0), jnp.minimum(rest, tie)), rest, ties)
    steps = joined([price if isinstance(price, int) else 1 for price in costs])
    kept = above + taken // steps * steps
    return jnp.split(kept, np.cumsum(slices)[:-1])


def _clipped_sum(parts: jax.Array) -> jax.Array:
    """The sum of int32 numbers, clipped to their range: a model may have more weights than they count."""
    # A sum of int32 numbers wraps around silently; one of float32 numbers shows when it does.
    size = jnp.sum(parts.astype(jnp.float32))
    exact = jnp.sum(parts, dtype=jnp.int32)
    return jnp.where(jnp.abs(size) < 2**31 - 2**20, exact, jnp.where(size > 0, ALWAYS, -ALWAYS))


def padded_rows(m: int, group_size: int) -> jax.Array:
    """Rows in their order, filled up with the sentinel M to whole groups: (R * V,) int32."""
    rows = np.arange(-(-m // group_size) * group_size, dtype=np.int32)
    return jnp.asarray(np.minimum(rows, m))


def field_error(pattern: Pattern, field: str, rule: str) -> ValueError:
    """The error for a field of a pattern that breaks a rule."""
    return ValueError(f"{type(pattern).__name__}'s {field} must {rule}, got {getattr(pattern, field)!r}")


def sums_of_rows(scores: jax.Array, rows: jax.Array, group_size: int) -> jax.Array:
    """Sums of scores (M, K) over the rows of every group: (R, K) float32. `rows` (R * V,) may hold sentinels M."""
    return group_members(scores, rows, group_size).sum(1)


def group_scores(scores: jax.Array, rows: jax.Array, group_size: int) -> jax.Array:
    """As `sums_of_rows`, with the sums of a smaller group scaled up to V rows."""
    sizes = jnp.sum((rows < scores.shape[0]).reshape(-1, group_size), axis=1, dtype=jnp.float32)
    # The factor of a whole group is exactly 1: integer-valued scores stay exact.
    return sums_of_rows(scores, rows, group_size) * (group_size / jnp.maximum(sizes, 1))[:, None]
