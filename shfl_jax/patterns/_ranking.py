"""The ranked choice of units: integer keys, exact counts, and layers that are ranked together."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

ALWAYS = np.iinfo(np.int32).max
"""The rank key of a unit that is kept before all others."""

LARGEST = 24
"""The exponent that `normalised` gives the largest score. Sums of 2^31 squares stay finite, also scaled up from a small
group to a whole one, and scores down to 2^-87 of the largest still have squares."""

Scores = TypeVar("Scores", jax.Array, list[jax.Array])


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


def normalised(scores: Scores) -> Scores:
    """Scores times the power of two that brings the largest of them all to [2^24, 2^25).

    What is added up or squared next neither overflows nor vanishes, whatever unit the scores are in. The factor is
    exact, so sums of ordinary scores keep all their bits, up to the factor, and rank as before.

    Args:
        scores: floating, non-negative; an array, or those of layers that are ranked together.

    Returns:
        The same in float32. Zeros stay zero.
    """
    largest = jnp.stack([rank_keys(s).max() for s in jax.tree.leaves(scores)]).max()
    # A key is the bits of a float32 number, with its exponent above the 23 bits of the fraction.
    bias, highest = 127, 254
    exponent = jnp.clip(2 * bias + LARGEST - (largest >> 23), 1, highest)
    factor = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)

    def scale(array: jax.Array) -> jax.Array:
        return array.astype(jnp.float32) * factor

    return jax.tree.map(scale, scores)


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
