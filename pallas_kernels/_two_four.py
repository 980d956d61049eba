"""2:4 inside row groups: building the packed form."""

import numpy as np
from jaxtyping import Bool, Float, Int32

from pallas_kernels._matrix import HostArray, RowGrouped, row_grouped
from pallas_kernels._pairs import pack, pack_bits


def from_dense_two_four(
    weight: Float[HostArray, "*batch M K"],
    rows: Int32[HostArray, "*batch R*V"],
    order: Int32[HostArray, "*batch R S"],
    choice: Bool[HostArray, "*batch M K"],
) -> RowGrouped:
    """Compresses a matrix to its packed 2:4 form. On the host, because the number of slots depends on the data.

    Args:
        weight: (..., M, K) floating.
        rows: (..., R * V) int32, the row permutation with sentinels M.
        order: (..., R, S) int32, S a multiple of four: the kept columns of every group, four after four; the sentinel K
            where a four has fewer than four columns, and in fours that are not used.
        choice: (..., M, K) bool, the kept weights: at most two of a row in every four.

    Returns:
        The matrix in canonical form. Weights that are not chosen are dropped, whatever they hold.

    Raises:
        ValueError: shapes disagree, a row keeps more than two of a four or a weight outside its group's columns, or
            `rows` or `order` are not what they must be.
    """
    weight, rows, order, choice = np.asarray(weight), np.asarray(rows), np.asarray(order), np.asarray(choice)
    batch, (m, k), (r, s) = weight.shape[:-2], weight.shape[-2:], order.shape[-2:]
    if order.shape[:-2] != batch or rows.shape[:-1] != batch or choice.shape != weight.shape or s % 4 or r == 0:
        raise ValueError(
            f"rows {rows.shape}, order {order.shape} and choice {choice.shape} do not fit a weight of {weight.shape}"
        )
    if rows.shape[-1] % r or (rows.size and not 0 <= rows.min() <= rows.max() <= m):
        raise ValueError(f"rows must hold 0..{m - 1} and the sentinel {m} in whole groups, got shape {rows.shape}")
    if order.size and not 0 <= order.min() <= order.max() <= k:
        raise ValueError(f"order must hold 0..{k - 1} and the sentinel {k}")
    v = rows.shape[-1] // r
    fours = np.sort(order.reshape(*batch, r, -1, 4), axis=-1)
    used = (fours[..., 0] < k).sum(-1)
    group_ptr = np.zeros((*batch, r + 1), np.int32)
    np.cumsum(4 * used, axis=-1, out=group_ptr[..., 1:])
    p = int(group_ptr.max(initial=0))
    # One more four where some slices are ragged and the fullest is not: equal counts must show in the shapes.
    p += 4 * int(p == 4 * r * used.max(initial=0) and (used < used.max(initial=0)).any())
    values = np.zeros((*batch, p // 4, 2, v), weight.dtype)
    pairs = np.broadcast_to(np.arange(2, dtype=np.uint8)[:, None], (*batch, p // 4, 2, v)).copy()
    columns = np.full((*batch, p // 4, 4), k, np.int32)
    kept = np.ones((*batch, p // 4, 2, v), bool)
    for b in np.ndindex(*batch):
        group, four = np.nonzero(fours[b][..., 0] < k)
        column = fours[b][group, four][:, :, None]
        row = rows[b].reshape(r, v)[group][:, None]
        real = (row < m) & (column < k)
        at = np.minimum(row, m - 1), np.minimum(column, k - 1)
        chosen = choice[b][at] & real
        if (chosen.sum(1) > 2).any() or chosen.sum() != choice[b].sum():
            raise ValueError("choice must keep at most two weights of a row in every four, and only kept columns")
        # Chosen slots first, then real ones, then the others: the first two, in order, are stored.
        preference = np.where(chosen, 0, np.where(column < k, 1, 2))
        two = np.sort(np.argsort(preference, axis=1, kind="stable")[:, :2], axis=1)
        columns[b][: len(column)] = column[:, :, 0]
        pairs[b][: len(column)] = two
        picked = np.where(chosen, weight[b][at], 0)
        values[b][: len(column)] = np.take_along_axis(picked, two, axis=1)
        kept[b][: len(column)] = np.take_along_axis(chosen | ~real, two, axis=1)
    return row_grouped(
        values.reshape(*batch, p // 2, v),
        columns.reshape(*batch, p),
        group_ptr,
        rows.astype(np.int32),
        pack(pairs.reshape(*batch, p // 2, v)),
        None if kept.all() else pack_bits(kept.reshape(*batch, p // 2, v)),
        m=m,
        k=k,
    )
