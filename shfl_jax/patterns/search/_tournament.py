"""A round-robin tournament of row groups: a round has disjoint pairs, and over all rounds each pair meets once."""

import jax
import jax.numpy as jnp


def enter(grouping: jax.Array, empty: jax.Array | int) -> jax.Array:
    """The players: the groups (R, V), and where R is odd one more that holds `empty` alone."""
    return jnp.pad(grouping, ((0, grouping.shape[0] % 2), (0, 0)), constant_values=empty)


def match(i: jax.Array, players: int) -> tuple[jax.Array, jax.Array]:
    """Who meets whom in round i, 0 <= i < players - 1: two (players / 2,) int32.

    A smaller group, which is the last, comes second in its pair, so that the sentinels, which sort last, stay with it.
    """
    seat = jnp.arange(1, players // 2)
    left, right = (i + seat) % (players - 1), (i - seat) % (players - 1)
    first = jnp.concatenate([i[None], jnp.minimum(left, right)])
    second = jnp.concatenate([jnp.full(1, players - 1, first.dtype), jnp.maximum(left, right)])
    return first, second
