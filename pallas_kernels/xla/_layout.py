"""The layout that XLA reads fastest on a CPU: groups sorted, segments padded to a few lengths, values K-contiguous."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._matrix import RowGrouped

# Lengths that `prepare` pads segments to. XLA runs the products of a batch in parallel since JAX 0.11. Before that only
# several independent products use all cores where single ones are small, so there may be more of them.
MAX_RUNS = 8 if jax.__version_info__ >= (0, 11) else 16
# What one more run costs a call, in slots of padding.
RUN_SLOTS = 32


def prepare(matrix: RowGrouped) -> RowGrouped:
    """Sorts the groups, heaviest first, pads their segments to a few lengths known when tracing, and transposes them.

    `runs` are common to all slices of a stacked matrix: the r-th heaviest groups of all slices get the same length.
    """
    topology = matrix.topology
    v, k, r = topology.group_size, topology.k, topology.num_groups
    batch = topology.columns.shape[:-1]
    ptr, columns, rows = (np.asarray(a) for a in (topology.group_ptr, topology.columns, topology.rows))
    values = np.asarray(matrix.values)
    counts = np.diff(ptr)
    order = np.argsort(-counts, axis=-1, kind="stable")
    counts = np.take_along_axis(counts, order, -1)
    runs = _choose_runs(counts.reshape(-1, r).max(0))
    lengths = np.repeat([slots for _, slots in runs], [groups for groups, _ in runs])
    new_ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    new_columns = np.full((*batch, new_ptr[-1]), k, np.int32)
    new_values = np.zeros((*batch, new_ptr[-1], v), values.dtype)
    new_rows = np.zeros_like(rows)
    inverse_rows = np.zeros((*batch, topology.m + 1), np.int32)
    for b in np.ndindex(*batch):
        new_rows[b] = rows[b].reshape(r, v)[order[b]].reshape(-1)
        inverse_rows[b][new_rows[b]] = np.arange(r * v)
        live = new_rows[b].reshape(r, v) < topology.m
        for i, group in enumerate(order[b]):
            old = slice(ptr[b][group], ptr[b][group + 1])
            new_columns[b][new_ptr[i] : new_ptr[i] + counts[b][i]] = columns[b][old]
            segment = np.zeros((lengths[i], v), values.dtype)
            segment[: counts[b][i]] = np.where(live[i], values[b][old], 0)
            new_values[b][new_ptr[i] : new_ptr[i + 1]] = segment.T.reshape(-1, v)
    new = dataclasses.replace(
        topology,
        columns=jnp.asarray(new_columns),
        group_ptr=jnp.asarray(np.broadcast_to(new_ptr, (*batch, r + 1))),
        rows=jnp.asarray(new_rows),
        counts=jnp.asarray(counts.astype(np.int32)),
        inverse_rows=jnp.asarray(inverse_rows[..., : topology.m]),
        max_count=int(lengths.max(initial=0)),
        segments=runs,
        k_contiguous=True,
        sentinels=bool((new_columns == k).any()),
    )
    return RowGrouped(jnp.asarray(new_values), new)


def _choose_runs(counts: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Cuts descending counts into runs: least padding plus `RUN_SLOTS` a run, at most `MAX_RUNS` runs."""
    lengths, groups = np.unique(-counts, return_counts=True)
    runs = [(int(g), int(-s)) for g, s in zip(groups, lengths, strict=True)]
    while len(runs) > 1:
        # Joining a run with the next one pads the next one's groups.
        costs = [after[0] * (run[1] - after[1]) for run, after in itertools.pairwise(runs)]
        i = int(np.argmin(costs))
        if costs[i] > RUN_SLOTS and len(runs) <= MAX_RUNS:
            break
        runs[i : i + 2] = [(runs[i][0] + runs[i + 1][0], runs[i][1])]
    return tuple(runs)
