"""Row-permutation search: which rows of a matrix form a group.

A grouping is an (R, V) int32 array: the rows of every group, with the sentinel M in the slots that a smaller last group
lacks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from shfl_jax.patterns.search import _tournament as tournament

HIGHEST = jax.lax.Precision.HIGHEST
GRAM_ROWS = 16384
"""Up to this many rows all inner products are computed once and kept (1 GiB at most), beyond it as they are needed."""
CANDIDATES = 8
"""Rows of each side considered for a swap."""

Products = Callable[[jax.Array, jax.Array], jax.Array]
"""Inner products of rows: indices (..., A) and (..., B) to (..., A, B) float32; 0 for the sentinel."""


@functools.partial(jax.jit, static_argnames=("group_size", "seeds", "restarts", "sweeps", "swaps"))
def kmeans(
    features: jax.Array,
    group_size: int,
    key: jax.Array,
    *,
    start: jax.Array | None = None,
    seeds: int | None = None,
    restarts: int = 2,
    sweeps: int = 8,
    swaps: int = 4,
) -> jax.Array:
    """Size-constrained K-means: groups of exactly V rows with the least squared distance to the groups' means.

    R centres are seeded (k-means++) and rows assigned greedily under the capacity V, several times; all groupings are
    refined on pairs of groups for two sweeps, the best ones to the end. For the means of a pair the best balanced split
    of its 2 V rows is a sort (2-means); then single rows are swapped where that lowers the true objective. A sweep
    visits every pair once, R / 2 disjoint pairs at a time, and never raises the objective; one that moves no row ends
    the search early.

    Args:
        features: (M, D) floating, computed with in float32.
        group_size: V; if it does not divide M, the last group is smaller.
        key: of the random seeds.
        start: (R, V) int32, one more grouping to refine; the result is never worse.
        seeds: number of seeded groupings; 16 for up to 256 rows, fewer for more, at least 4, unless given.
        restarts: how many of them, the best, are refined to the end.
        sweeps: the most sweeps over all pairs of one start.
        swaps: the most swaps of single rows in a pair a sweep.

    Returns:
        (R, V) int32, rows ascending within a group, groups ascending by their first row (a smaller one last).
    """
    features = jnp.asarray(features, jnp.float32)
    m = features.shape[0]
    num_groups = -(-m // group_size)
    if num_groups == 1:
        return _grouping(jnp.zeros(m, jnp.int32), 1, group_size)
    seeds = min(16, max(4, 4096 // m)) if seeds is None else seeds
    products = _products(features)
    norms = jnp.sum(features**2, axis=1)

    def seeded(key: jax.Array) -> jax.Array:
        centers = _spread_rows(products, norms, num_groups, key)
        distance = norms[centers] - 2 * products(jnp.arange(m), centers)
        return _assign_greedily(distance, group_size)

    groupings = jax.lax.map(seeded, jax.random.split(key, seeds))
    if start is not None:
        groupings = jnp.concatenate([start[None], groupings])
    count = groupings.shape[0]

    def refine(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        # First all of them for two sweeps, then the best to the end: one loop, because the refinement compiles slowly.
        groupings, costs, ended = state
        which = jnp.where(i < count, i, jnp.argmin(jnp.where(ended, jnp.inf, costs)))
        refined = _exchange(products, groupings[which], m, jnp.where(i < count, 2, sweeps), swaps)
        groupings, costs = groupings.at[which].set(refined), costs.at[which].set(inertia(features, refined))
        return groupings, costs, ended.at[which].set(i >= count)

    state = groupings, jnp.zeros(count, jnp.float32), jnp.zeros(count, bool)
    groupings, costs, _ = jax.lax.fori_loop(0, count + min(restarts, count), refine, state)
    return sort_groups(groupings[jnp.argmin(costs)], m)


def inertia(features: jax.Array, grouping: jax.Array) -> jax.Array:
    """The K-means objective: the sum of squared distances of rows (M, D) to their group's mean, float32 scalar."""
    features = jnp.asarray(features, jnp.float32)
    members, real = features.at[grouping].get(mode="fill", fill_value=0), (grouping < features.shape[0])[..., None]
    mean = members.sum(1, keepdims=True) / jnp.maximum(real.sum(1, keepdims=True), 1)
    return jnp.sum(jnp.sum(jnp.where(real, members - mean, 0) ** 2, axis=(1, 2)))


def sort_groups(grouping: jax.Array, m: int) -> jax.Array:
    """The canonical order: rows ascending within a group, groups by their first row, a smaller group last."""
    grouping = jnp.sort(grouping, axis=1)
    first = jnp.where(grouping[:, -1] == m, m, grouping[:, 0])
    return grouping[jnp.argsort(first, stable=True)]


def ranks(keys: jax.Array) -> jax.Array:
    """The places (G, N) int32 of keys (G, N) in a stable sort, by counting those before: faster for small N."""
    slot, mine, other = jnp.arange(keys.shape[1]), keys[:, None, :], keys[:, :, None]
    before = jnp.where(slot[:, None] < slot, other <= mine, other < mine)
    return before.sum(1, dtype=jnp.int32)


def place(values: jax.Array, places: jax.Array) -> jax.Array:
    """Values (G, N), each at its place (G, N) of the row."""
    return jnp.zeros_like(values).at[jnp.arange(len(values))[:, None], places].set(values, unique_indices=True)


def _products(features: jax.Array) -> Products:
    if features.shape[0] <= GRAM_ROWS:
        gram = jnp.matmul(features, features.T, precision=HIGHEST)
        return lambda a, b: gram.at[a[..., :, None], b[..., None, :]].get(mode="fill", fill_value=0)

    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        left, right = (features.at[rows].get(mode="fill", fill_value=0) for rows in (a, b))
        return jnp.einsum("...ad,...bd->...ab", left, right, precision=HIGHEST)

    return products


def _grouping(labels: jax.Array, num_groups: int, group_size: int) -> jax.Array:
    """(M,) int32 labels, at most V equal ones, to an (R, V) grouping. Groups that are not full get the sentinels."""
    m = labels.shape[0]
    order = jnp.argsort(labels, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_groups, jnp.int32).at[labels].add(1)
    starts = jnp.cumsum(sizes) - sizes
    slot = jnp.arange(group_size)
    grouping = order.at[starts[:, None] + slot].get(mode="fill", fill_value=m)
    return jnp.where(slot < sizes[:, None], grouping, m)


def _spread_rows(products: Products, norms: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """k-means++ seeds: rows drawn with a chance proportional to the squared distance to those already drawn."""
    every = jnp.arange(norms.shape[0], dtype=jnp.int32)
    noise = jax.random.gumbel(key, (count, norms.shape[0]))

    def draw(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, distance = state
        # The log of a distance of zero is -inf: a row equal to a seed is drawn only if all are.
        row = jnp.argmax(noise[i] + jnp.log(distance)).astype(jnp.int32)
        to_row = norms - 2 * products(every, row[None])[:, 0] + norms[row]
        return rows.at[i].set(row), jnp.minimum(distance, jnp.maximum(to_row, 0))

    rows = jnp.zeros(count, jnp.int32)
    return jax.lax.fori_loop(0, count, draw, (rows, jnp.ones_like(norms)))[0]


def _assign_greedily(distance: jax.Array, group_size: int) -> jax.Array:
    """Gives every row its nearest centre that has room, rows with the most to lose first: (M, R) to a grouping."""
    m, num_groups = distance.shape
    two_nearest = -jax.lax.top_k(-distance, 2)[0]
    order = jnp.argsort(two_nearest[:, 0] - two_nearest[:, 1], stable=True)
    # The last group is the smaller one.
    room = jnp.full(num_groups, group_size, jnp.int32).at[-1].add(m - num_groups * group_size)

    def assign(room: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        group = jnp.argmin(jnp.where(room > 0, distance[row], jnp.inf)).astype(jnp.int32)
        return room.at[group].add(-1), group

    _, groups = jax.lax.scan(assign, room, order)
    return _grouping(jnp.zeros(m, jnp.int32).at[order].set(groups), num_groups, group_size)


def _exchange(products: Products, grouping: jax.Array, m: int, sweeps: jax.Array, swaps: int) -> jax.Array:
    """Refines a grouping on pairs of groups, sweep after sweep until none moves a row."""
    num_groups, v = grouping.shape
    grouping = tournament.enter(grouping, m)
    players = grouping.shape[0]

    def play(i: jax.Array, grouping: jax.Array) -> jax.Array:
        first, second = tournament.match(i, players)
        rows = jnp.concatenate([grouping[first], grouping[second]], axis=1)
        real = rows < m
        chosen = _split(products(rows, rows), real, v, swaps)
        rows = place(rows, ranks(jnp.where(chosen, 0, jnp.where(real, 1, 2))))
        return grouping.at[first].set(rows[:, :v]).at[second].set(rows[:, v:])

    def sweep(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        grouping, done, _ = state
        after = jax.lax.fori_loop(0, players - 1, play, grouping)
        moved = jnp.any(jnp.sort(after, axis=1) != jnp.sort(grouping, axis=1))
        return after, done + 1, moved

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[1] < sweeps) & state[2]

    grouping, _, _ = jax.lax.while_loop(unfinished, sweep, (grouping, jnp.int32(0), jnp.bool_(True)))
    return grouping[:num_groups]


def _split(gram: jax.Array, real: jax.Array, v: int, swaps: int) -> jax.Array:
    """Splits the rows of pairs of groups anew.

    Args:
        gram: (G, 2V, 2V) inner products; the first V slots are those of a pair's first group.
        real: (G, 2V) bool, False in empty slots.
        v: V.
        swaps: the most swaps of single rows.

    Returns:
        (G, 2V) bool, True for rows of the first group, as many as before.
    """
    slot, pair = jnp.arange(2 * v), jnp.arange(gram.shape[0])[:, None]
    first = real & (slot < v)
    size = first.sum(1, keepdims=True)
    weights = 1 / jnp.maximum(size, 1), 1 / jnp.maximum(real.sum(1, keepdims=True) - size, 1)

    def pull(first: jax.Array) -> jax.Array:
        """Inner product of every row with the difference of the two means."""
        signed = jnp.where(first, weights[0], jnp.where(real, -weights[1], 0))
        return jnp.einsum("gab,gb->ga", gram, signed, precision=HIGHEST)

    first = ranks(jnp.where(real, -pull(first), jnp.inf)) < size

    # Exchanging row a of the first group for b changes the sum of squared distances by
    # -2 <b - a, difference of the means> - |b - a|^2 (1/n + 1/n').
    norms = jnp.diagonal(gram, axis1=1, axis2=2)
    both = weights[0] + weights[1]
    few = min(CANDIDATES, v)
    least = 1e-5 * norms.max(1) * both[:, 0]

    def swap(_: jax.Array, first: jax.Array) -> jax.Array:
        p = pull(first)
        out_gain, out = jax.lax.top_k(jnp.where(first, norms * both - 2 * p, -jnp.inf), few)
        in_gain, into = jax.lax.top_k(jnp.where(real & ~first, norms * both + 2 * p, -jnp.inf), few)
        between = gram[pair[..., None], out[:, :, None], into[:, None, :]]
        gain = out_gain[:, :, None] + in_gain[:, None, :] - 2 * both[..., None] * between
        gain = gain.reshape(-1, few * few)
        best = jnp.argmax(gain, axis=1)[:, None]
        leaving, coming = (jnp.take_along_axis(x, i, axis=1) for x, i in ((out, best // few), (into, best % few)))
        worth = jnp.take_along_axis(gain, best, axis=1) > least[:, None]
        return first ^ (worth & ((slot == leaving) | (slot == coming)))

    return jax.lax.fori_loop(0, swaps, swap, first)
