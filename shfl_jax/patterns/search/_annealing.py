"""Row-permutation search by annealed alternating maximisation: grouping rows for the scores that their groups keep.

A grouping is an (S, R, V) int32 array: for each of S blocks of rows the rows of its R groups, numbered within the
block, with the sentinel M / S in the slots that a smaller last group lacks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from shfl_jax.patterns.search import _tournament as tournament
from shfl_jax.patterns.search._kmeans import HIGHEST, place, ranks

COLD = 0.15
"""The last fraction of the steps, which add no noise."""

Choose = Callable[[jax.Array], jax.Array]
"""The kept columns for the sums of every group: (S, R, K) float32 to (S, R, K) bool."""


def anneal(
    scores: jax.Array,
    choose: Choose,
    starts: jax.Array,
    key: jax.Array,
    *,
    steps: int = 200,
    rounds: int = 16,
    noise: float = 0.25,
) -> jax.Array:
    """Searches the grouping whose kept columns hold the most. Pure, of fixed shapes and steps, jit-able and vmap-able.

    Two maximisations alternate: the kept columns of every group for given rows, and the rows of every group for given
    columns. For given columns a row has a gain in each group, the sum of its scores there; all gains are one matrix
    product. Groups then meet in pairs, R / 2 disjoint pairs a round, and the best balanced split of the 2 V rows of a
    pair is a sort by the difference of their two gains. What a layer keeps is a maximum over choices of columns, so it
    increases at least by what the rows gain for given columns.

    On its own this stops at the nearest of many local maxima, so normal noise is added to the gains, in proportion to
    their spread and falling linearly to zero.

    Args:
        scores: (S, M / S, K) floating, non-negative and finite, computed with in float32.
        choose: picks the columns, in proportion to which groups count.
        starts: (n, S, R, V) int32 groupings; the best one is annealed, and the result is never worse than any.
        key: of the noise.
        steps: how often columns are picked.
        rounds: of the pairing of groups in a step, at most R; the next step continues with the next pairs.
        noise: standard deviation at first, relative to that of the gains without the means of rows and groups.

    Returns:
        (S, R, V) int32. Of equally good groupings the first start wins, then the next.
    """
    scores = scores.astype(jnp.float32)
    count, *_, num_groups, _ = starts.shape
    if num_groups == 1:
        return starts[0]

    def step(t: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        grouping, best, most = state
        sums = group_sums(scores, grouping)
        columns = choose(sums)
        kept = jnp.sum(jnp.where(columns, sums, 0))
        best, most = jnp.where(kept > most, grouping, best), jnp.maximum(kept, most)

        gains = jnp.einsum("smk,srk->smr", scores, columns.astype(jnp.float32), precision=HIGHEST)
        centred = gains - gains.mean(1, keepdims=True)
        spread = jnp.std(centred - centred.mean(2, keepdims=True))
        warmth = noise * spread * jnp.clip(1 - (t - count) / ((1 - COLD) * steps), 0, 1)
        gains += warmth * jax.random.normal(jax.random.fold_in(key, t), gains.shape)
        exchanged = jax.vmap(_exchange, in_axes=(0, 0, None, None))(gains, grouping, t * rounds, rounds)
        # The starts are valued first, then the best of them is annealed: one loop compiles faster than two.
        grouping = jnp.where(t < count - 1, starts[jnp.minimum(t + 1, count - 1)], exchanged)
        return jnp.where(t == count - 1, best, grouping), best, most

    # A step values the grouping that it is given, so the last grouping takes one more step.
    return jax.lax.fori_loop(0, count + steps + 1, step, (starts[0], starts[0], jnp.float32(-1)))[1]


def group_sums(scores: jax.Array, grouping: jax.Array) -> jax.Array:
    """Sums of scores (S, M / S, K) over the rows of every group: (S, R, K)."""

    def sums(shard: jax.Array, rows: jax.Array) -> jax.Array:
        return shard.at[rows].get(mode="fill", fill_value=0).sum(1)

    return jax.vmap(sums)(scores, grouping)


def _exchange(gains: jax.Array, grouping: jax.Array, begin: jax.Array, rounds: int) -> jax.Array:
    """Some rounds of a round-robin tournament of groups: gains (M, R) and a grouping (R, V) to a grouping."""
    m, num_groups = gains.shape
    v = grouping.shape[1]
    grouping = tournament.enter(grouping, m)
    players = grouping.shape[0]
    gains = jnp.pad(gains, ((0, 0), (0, players - num_groups)))

    def play(i: jax.Array, grouping: jax.Array) -> jax.Array:
        first, second = tournament.match((begin + i) % (players - 1), players)
        rows = jnp.concatenate([grouping[first], grouping[second]], axis=1)
        loss = gains.at[rows, second[:, None]].get(mode="fill", fill_value=jnp.inf)
        loss -= gains.at[rows, first[:, None]].get(mode="fill", fill_value=0)
        rows = place(rows, ranks(loss))
        return grouping.at[first].set(rows[:, :v]).at[second].set(rows[:, v:])

    return jax.lax.fori_loop(0, min(rounds, players - 1), play, grouping)[:num_groups]
