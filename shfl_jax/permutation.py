"""Row-permutation search: which rows of a matrix form a group.

A grouping is an (R, V) int32 array: the rows of every group, with the sentinel M in the slots that a smaller last group
lacks.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def kmeans(
    features: jax.Array,
    group_size: int,
    key: jax.Array,
    *,
    start: jax.Array | None = None,
    restarts: int = 2,
    sweeps: int = 12,
) -> jax.Array:
    """Size-constrained K-means: groups of exactly V rows with the least squared distance to the groups' means.

    Every restart seeds R centres (k-means++), assigns rows greedily under the capacity V, and refines the grouping by
    2-means on pairs of groups: for the centres of a pair, the best balanced split of its 2 V rows is a sort. A sweep
    visits every pair once, R / 2 disjoint pairs at a time, so the objective never rises; a sweep that moves no row ends
    the search early.

    Args:
        features: (M, D) floating. Memory is a few copies of it, computed in float32.
        group_size: V; if it does not divide M, the last group is smaller.
        key: of the random seeds.
        start: (R, V) int32, a grouping that is refined as one more start.
        restarts: number of seeded starts.
        sweeps: the most sweeps over all pairs of one start.

    Returns:
        (R, V) int32, rows ascending within a group, groups ascending by their first row (a smaller one last).
    """
    features = features.astype(jnp.float32)
    num_groups = -(-features.shape[0] // group_size)
    if num_groups == 1:
        return _grouping(jnp.zeros(features.shape[0], jnp.int32), 1, group_size)

    def seeded(key: jax.Array) -> jax.Array:
        centers = _spread_rows(features, num_groups, key)
        return _assign_greedily(features, features[centers], group_size)

    starts = jax.lax.map(seeded, jax.random.split(key, restarts))
    if start is not None:
        starts = jnp.concatenate([start[None], starts])
    groupings = jax.lax.map(lambda grouping: _exchange(features, grouping, sweeps), starts)
    costs = jax.lax.map(lambda grouping: inertia(features, grouping), groupings)
    return sort_groups(groupings[jnp.argmin(costs)], features.shape[0])


def inertia(features: jax.Array, grouping: jax.Array) -> jax.Array:
    """The K-means objective: the sum of squared distances of rows (M, D) to their group's mean, float32 scalar."""
    members, real = _members(features.astype(jnp.float32), grouping)
    distance = jnp.where(real[..., None], members - _mean(members, real)[:, None], 0)
    return jnp.sum(jnp.sum(distance**2, axis=(1, 2)))


def sort_groups(grouping: jax.Array, m: int) -> jax.Array:
    """The canonical order: rows ascending within a group, groups by their first row, a smaller group last."""
    grouping = jnp.sort(grouping, axis=1)
    first = jnp.where(grouping[:, -1] == m, m, grouping[:, 0])
    return grouping[jnp.argsort(first, stable=True)]


def _members(features: jax.Array, grouping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of every group, zero in empty slots: (..., V, D), and which slots are real: (..., V)."""
    return features.at[grouping].get(mode="fill", fill_value=0), grouping < features.shape[0]


def _mean(members: jax.Array, real: jax.Array) -> jax.Array:
    return members.sum(-2) / jnp.maximum(real.sum(-1), 1)[..., None]


def _grouping(labels: jax.Array, num_groups: int, group_size: int) -> jax.Array:
    """(M,) int32 labels, at most V alike, to an (R, V) grouping. The groups that are not full get the sentinels."""
    m = labels.shape[0]
    order = jnp.argsort(labels, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_groups, jnp.int32).at[labels].add(1)
    starts = jnp.cumsum(sizes) - sizes
    slot = jnp.arange(group_size)
    grouping = order.at[starts[:, None] + slot].get(mode="fill", fill_value=m)
    return jnp.where(slot < sizes[:, None], grouping, m)


def _spread_rows(features: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """k-means++ seeds: rows drawn with a chance proportional to the squared distance to those already drawn."""
    m = features.shape[0]
    norms = jnp.sum(features**2, axis=1)
    noise = jax.random.gumbel(key, (count, m))

    def draw(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, distance = state
        # Log of a distance of zero is -inf: a row equal to a seed is drawn only if all are, and then by index.
        row = jnp.argmax(noise[i] + jnp.log(distance)).astype(jnp.int32)
        product = jnp.matmul(features, features[row], precision=HIGHEST)
        return rows.at[i].set(row), jnp.minimum(distance, jnp.maximum(norms - 2 * product + norms[row], 0))

    rows = jnp.zeros(count, jnp.int32)
    return jax.lax.fori_loop(0, count, draw, (rows, jnp.ones(m, jnp.float32)))[0]


def _assign_greedily(features: jax.Array, centers: jax.Array, group_size: int) -> jax.Array:
    """Gives every row its nearest centre that has room, rows with the most to lose first: (R, V) grouping."""
    m, num_groups = features.shape[0], centers.shape[0]
    distance = jnp.sum(centers**2, axis=1) - 2 * jnp.matmul(features, centers.T, precision=HIGHEST)
    two_nearest = -jax.lax.top_k(-distance, 2)[0]
    order = jnp.argsort(two_nearest[:, 0] - two_nearest[:, 1], stable=True)
    # The last group is the smaller one.
    room = jnp.full(num_groups, group_size, jnp.int32).at[-1].add(m - num_groups * group_size)

    def assign(room: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        group = jnp.argmin(jnp.where(room > 0, distance[row], jnp.inf)).astype(jnp.int32)
        return room.at[group].add(-1), group

    _, groups = jax.lax.scan(assign, room, order)
    return _grouping(jnp.zeros(m, jnp.int32).at[order].set(groups), num_groups, group_size)


def _exchange(features: jax.Array, grouping: jax.Array, sweeps: int) -> jax.Array:
    """Refines a grouping by 2-means on pairs of groups, sweep after sweep until none moves a row."""
    m, (num_groups, v) = features.shape[0], grouping.shape
    # An odd number of groups plays against an empty one; a round-robin has one round fewer than it has players.
    players = num_groups + num_groups % 2
    grouping = jnp.pad(grouping, ((0, players - num_groups), (0, 0)), constant_values=m)
    seat = jnp.arange(1, players // 2)

    def play(i: jax.Array, grouping: jax.Array) -> jax.Array:
        left, right = (i + seat) % (players - 1), (i - seat) % (players - 1)
        # The last player meets the one that is left over. The smaller group is always second, so that sentinels,
        # which sort last, stay with it.
        first = jnp.concatenate([i[None], jnp.minimum(left, right)])
        second = jnp.concatenate([jnp.full(1, players - 1, first.dtype), jnp.maximum(left, right)])
        rows = jnp.concatenate([grouping[first], grouping[second]], axis=1)
        members, real = _members(features, rows)
        axis = _mean(members[:, :v], real[:, :v]) - _mean(members[:, v:], real[:, v:])
        pull = jnp.einsum("gvd,gd->gv", members, axis, precision=HIGHEST)
        order = jnp.argsort(jnp.where(real, -pull, jnp.inf), axis=1, stable=True)
        rows = jnp.take_along_axis(rows, order, axis=1)
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
