"""2:4 inside row groups: which inputs share a four, and which two of every four a row keeps.

The order of a group's kept inputs is free, and every row of the group shares it. A good order gives each four inputs of
which every row can spare two.

An order is an (R, 4 * ceil(K / 4)) int32 array: the kept columns of a group, four after four, and the sentinel K in
every slot that holds none. All its fours are full but for one, if the kept columns are no multiple of four.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

# All ways to split eight columns into two fours; the first leaves them as they are. The first column stays in place.
_FIRSTS = np.array([(0, *rest) for rest in itertools.combinations(range(1, 8), 3)], np.int32)
SPLITS = np.array([[*first, *sorted({*range(8)} - {*first.tolist()})] for first in _FIRSTS], np.int32)


def order_columns(
    scores: jax.Array,
    rows: jax.Array,
    kept: jax.Array,
    group_size: int,
    *,
    rounds: int = 16,
    previous: jax.Array | None = None,
) -> jax.Array:
    """Searches an order in which 2:4 keeps much. Pure, of fixed shapes and steps, jit-able and vmap-able.

    Columns are dealt to the fours by their sums, so that no four gets all the large ones; a four of fewer columns, of
    which less is pruned, gets the largest. Then fours are refined two by two: of the 35 ways to split the eight columns
    of two fours the best is taken, which is never worse. Round t refines the fours j and t - j (modulo their number),
    for all j at once; after F rounds any two of F fours have met. Where a group's columns as given, or the fours of
    `previous` that are still whole and then the other columns, keep more than that, they stay.

    Args:
        scores: (M, K) floating, non-negative and finite.
        rows: (R * V,) int32, the row permutation with sentinels M.
        kept: (R, K) bool, the kept columns of every group.
        group_size: V.
        rounds: of refinement; 0 deals only.
        previous: an earlier order, (R, 4 * ceil(K / 4)) int32.

    Returns:
        The order, (R, 4 * ceil(K / 4)) int32: columns ascend within a four, fours by their first column.
    """
    groups, k = kept.shape
    num_fours = -(-k // 4)
    members = group_members(scores, rows, group_size)
    orders = [_dealt(members, kept), _in_order(kept)]
    if previous is not None:
        orders.append(_as_before(kept, previous))
    used = -(-kept.sum(1, dtype=jnp.int32) // 4)

    def search(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        members, orders, used = group
        refined = _refine(members, orders[0], used, rounds=rounds if num_fours > 1 else 0)
        orders = orders.at[0].set(refined)
        return orders[jnp.argmax(jax.lax.map(functools.partial(_value, members), orders))]

    # One group at a time: a round reads the members of a group 35 times, and they should stay in the cache.
    order = jax.lax.map(search, (members, jnp.stack(orders, axis=1), used))
    order = jnp.sort(order.reshape(groups, num_fours, 4), axis=2)
    first = jnp.argsort(order[:, :, 0], axis=1, stable=True)
    return jnp.take_along_axis(order, first[:, :, None], axis=1).reshape(groups, -1)


def _dealt(members: jax.Array, kept: jax.Array) -> jax.Array:
    """Columns dealt to the full fours by their sums; a four of fewer columns gets the largest."""
    k = kept.shape[1]
    ranked = jnp.argsort(-jnp.where(kept, members.sum(1), -1), axis=1, stable=True).astype(jnp.int32)
    count = kept.sum(1, dtype=jnp.int32)[:, None]
    full, rest = count // 4, count % 4
    slot = jnp.arange(-(-k // 4) * 4, dtype=jnp.int32)
    rank = jnp.where(slot < 4 * full, rest + slot % 4 * full + slot // 4, slot - 4 * full)
    return jnp.where(slot < count, jnp.take_along_axis(ranked, jnp.minimum(rank, k - 1), axis=1), k)


def _in_order(kept: jax.Array) -> jax.Array:
    """Kept columns as they come."""
    return _sorted_by(kept, jnp.broadcast_to(jnp.arange(kept.shape[1], dtype=jnp.int32), kept.shape))


def _as_before(kept: jax.Array, previous: jax.Array) -> jax.Array:
    """First the fours of an order that keep all their columns, then the others, in that order where it has them."""
    (groups, k), slots = kept.shape, previous.shape[1]
    stays = jnp.take_along_axis(kept, previous, axis=1, mode="fill", fill_value=False)
    whole = jnp.repeat(stays.reshape(groups, -1, 4).all(2), 4, axis=1)
    place = jnp.arange(slots, dtype=jnp.int32) + jnp.where(whole, 0, slots)
    keys = jnp.broadcast_to(2 * slots + jnp.arange(k, dtype=jnp.int32), kept.shape)
    keys = keys.at[jnp.arange(groups, dtype=jnp.int32)[:, None], previous].set(place, mode="drop")
    return _sorted_by(kept, keys)


def _sorted_by(kept: jax.Array, keys: jax.Array) -> jax.Array:
    """Kept columns by ascending keys (R, K), then sentinels."""
    k = kept.shape[1]
    columns = jnp.argsort(jnp.where(kept, keys, np.iinfo(np.int32).max), axis=1, stable=True).astype(jnp.int32)
    columns = jnp.where(jnp.arange(k, dtype=jnp.int32) < kept.sum(1, keepdims=True), columns, k)
    return jnp.pad(columns, ((0, 0), (0, -k % 4)), constant_values=k)


def choose_two(scores: jax.Array, rows: jax.Array, order: jax.Array, group_size: int) -> jax.Array:
    """The two highest-scoring weights of every four, ties to the lower column: (M, K) bool.

    Args:
        scores: (M, K) floating, non-negative.
        rows: (R * V,) int32, the row permutation with sentinels M.
        order: (R, 4 * ceil(K / 4)) int32.
        group_size: V.
    """
    m, k = scores.shape
    groups, slots = order.shape
    real = order < k
    fours = jnp.where(real[:, None], _ordered(group_members(scores, rows, group_size), order), -1)
    fours = fours.reshape(groups, group_size, slots // 4, 4)
    slot = jnp.arange(4)
    # A weight's rank is the number of those that beat it: the greater ones, and equal ones before it.
    greater = fours[..., None, :] > fours[..., :, None]
    before = (fours[..., None, :] == fours[..., :, None]) & (slot[None, :] < slot[:, None])
    chosen = (jnp.sum(greater | before, axis=-1) < 2).reshape(groups, group_size, slots) & real[:, None]
    slot_of = jnp.full((groups, k), slots, jnp.int32)
    slot_of = slot_of.at[jnp.arange(groups)[:, None], order].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")
    chosen = jnp.take_along_axis(chosen, slot_of[:, None], axis=2, mode="fill", fill_value=False)
    return chosen.reshape(-1, k)[jnp.argsort(rows)[:m]]


def spared_values(scores: jax.Array, rows: jax.Array, kept: jax.Array, group_size: int) -> jax.Array:
    """What every weight adds to what 2:4 can keep of its row: (M, K) float32.

    With an ideal order 2:4 keeps the better half of a row's scores s over the kept columns C, and that sum is
    min over t of |C| t / 2 + sum over C of max(s - t, 0), reached at their median. For t fixed there, a column adds
    max(s - t, 0) + t / 2 to a row, and the sum of that over the rows of a group ranks vectors of all groups alike.

    Args:
        scores: (M, K) floating, non-negative and finite.
        rows: (R * V,) int32, the row permutation with sentinels M.
        kept: (R, K) bool, the columns C of every group. A row of a group that keeps none has t = 0.
        group_size: V.
    """
    m, k = scores.shape
    scores = scores.astype(jnp.float32)
    group = jnp.zeros(m, jnp.int32).at[rows].set(jnp.arange(rows.shape[0], dtype=jnp.int32) // group_size, mode="drop")
    half = kept.sum(1, dtype=jnp.int32)[group] // 2
    ascending = jnp.sort(jnp.where(kept[group], scores, -1), axis=1)
    # Any number between the two middle scores is a median; with their mean fewer columns tie than with either of them.
    middle = jnp.stack([k - half, k - half - 1], axis=1)
    median = jnp.take_along_axis(ascending, jnp.clip(middle, 0, k - 1), axis=1)
    median = jnp.maximum(median, 0).mean(axis=1, keepdims=True)
    return jnp.maximum(scores - median, 0) + median / 2


def group_members(scores: jax.Array, rows: jax.Array, group_size: int) -> jax.Array:
    """The scores of every group's rows: (R, V, K) float32, zero for sentinel rows."""
    members = jnp.asarray(scores, jnp.float32).at[rows].get(mode="fill", fill_value=0)
    return members.reshape(-1, group_size, scores.shape[1])


def _ordered(members: jax.Array, order: jax.Array) -> jax.Array:
    """(R, V, K) in the order of the fours: (R, V, 4 * ceil(K / 4)), zero at sentinels."""
    return jnp.take_along_axis(members, order[:, None], axis=2, mode="fill", fill_value=0)


def _value(members: jax.Array, order: jax.Array) -> jax.Array:
    """What 2:4 keeps of one group: members (V, K), order (4 F,)."""
    planes = members.T.at[order.reshape(-1, 4).T].get(mode="fill", fill_value=0)
    return _best_two(planes).sum()


def _refine(members: jax.Array, order: jax.Array, used: jax.Array, *, rounds: int) -> jax.Array:
    """Refines one group: members (V, K), order (4 F,), of which the first `used` fours hold columns."""
    num_fours = order.shape[0] // 4
    meeting = jnp.arange(num_fours // 2, dtype=jnp.int32)
    splits = jnp.asarray(SPLITS)

    def play(t: jax.Array, fours: jax.Array) -> jax.Array:
        first, second = t // 2 + 1 + meeting, t - (t // 2 + 1 + meeting)
        meetings = jnp.where(t % 2, used // 2, (used - 1) // 2)
        first, second = (jnp.where(meeting < meetings, j % jnp.maximum(used, 1), num_fours) for j in (first, second))
        eight = jnp.concatenate([fours.at[j].get(mode="fill", fill_value=members.shape[1]) for j in (first, second)], 1)
        # (8, V, F / 2): the columns of a four are then four contiguous planes.
        planes = members.T.at[eight.T].get(mode="fill", fill_value=0).transpose(0, 2, 1)
        real = (eight < members.shape[1]).T

        def value(split: jax.Array) -> jax.Array:
            one, other = split[:4], split[4:]
            kept = _best_two(planes[one]).sum(0) + _best_two(planes[other]).sum(0)
            # Two fours of fewer columns would keep more weights than they may.
            return jnp.where(real[one].all(0) | real[other].all(0), kept, -1)

        best = splits[jnp.argmax(jax.lax.map(value, splits), axis=0)]
        eight = jnp.take_along_axis(eight, best, axis=1)
        return fours.at[first].set(eight[:, :4], mode="drop").at[second].set(eight[:, 4:], mode="drop")

    return jax.lax.fori_loop(0, rounds, play, order.reshape(num_fours, 4)).reshape(-1)


def _best_two(four: jax.Array) -> jax.Array:
    """The sum of the two largest along the leading axis of four."""
    a, b, c, d = four
    return jnp.maximum(jnp.maximum(a, b) + jnp.maximum(c, d), jnp.maximum(a + b, c + d))
