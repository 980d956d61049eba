"""Row-grouped products as Pallas-Triton kernels for NVIDIA GPUs (on other platforms they are interpreted, slowly)."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels._matrix import RowGrouped, Topology
from pallas_kernels.triton._forward import forward as forward
from pallas_kernels.triton._grad import grad_input as grad_input
from pallas_kernels.triton._grad import grad_values as grad_values
from pallas_kernels.triton._tiles import check
from pallas_kernels.triton._two_four import forward_two_four as forward_two_four
from pallas_kernels.triton._two_four import grad_values_two_four as grad_values_two_four

SEGMENT = 64  # `prepare` pads segments to multiples of this, the longest step that pays with many tokens


def prepare(matrix: RowGrouped) -> RowGrouped:
    """Pads every segment to a multiple of `SEGMENT` slots and sorts the groups, heaviest first.

    Equal counts that are multiples already stay as they are. Stacked matrices do too: their slices differ.

    Raises:
        NotImplementedError: a group size or dtype the kernels do not do.
    """
    topology = matrix.topology
    check(topology, matrix.dtype)
    if matrix.values.ndim > 2:
        return matrix
    if topology.equal_counts and topology.max_count % SEGMENT == 0:
        return matrix
    # In NumPy: JAX would compile every slice.
    ptr, old_columns, old_values = map(np.asarray, (topology.group_ptr, topology.columns, matrix.values))
    counts = np.diff(ptr)
    order = np.argsort(-counts, kind="stable")
    lengths = -(-counts[order] // SEGMENT) * SEGMENT
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values = np.zeros((starts[-1], topology.group_size), matrix.dtype)
    columns = np.zeros(starts[-1], np.int32)
    for g, start, length in zip(order, starts[:-1], lengths, strict=True):
        segment = slice(ptr[g], ptr[g + 1])
        values[start : start + counts[g]] = old_values[segment]
        columns[start : start + length] = np.resize(old_columns[segment], length) if length else 0
    firsts = np.flatnonzero(np.diff(lengths, prepend=-1))
    runs = np.diff(np.append(firsts, len(lengths)))
    prepared = Topology(
        columns=jnp.asarray(columns),
        group_ptr=jnp.asarray(starts.astype(np.int32)),
        rows=jnp.asarray(np.asarray(topology.rows).reshape(-1, topology.group_size)[order].reshape(-1)),
        m=topology.m,
        k=topology.k,
        group_size=topology.group_size,
        max_count=int(lengths.max(initial=0)),
        counts=jnp.asarray(counts[order].astype(np.int32)),
        buckets=tuple((int(run), int(lengths[first])) for run, first in zip(runs, firsts, strict=True)),
    )
    return RowGrouped(jnp.asarray(values), prepared)
