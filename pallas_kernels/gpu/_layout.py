"""The layout that both GPU backends read: segments padded to whole steps, groups sorted by their number of slots.

For a convolution it also says where the slots point, one number or two a slot.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._matrix import INT32_MAX, RowGrouped, Topology, slot_is_real
from pallas_kernels._window import Window

SEGMENT = 64  # segments are padded to multiples of this, the longest step that pays with many tokens
MAX_TAPS = 30  # rows plus columns of a filter, whose bits share an int32


def prepare(matrix: RowGrouped) -> RowGrouped:
    """Pads every segment to a multiple of `SEGMENT` slots and sorts the groups, heaviest first.

    Equal counts that are multiples already stay as they are. Stacked matrices do too: their slices differ.
    """
    topology = matrix.topology
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
        segments=tuple((int(run), int(lengths[first])) for run, first in zip(runs, firsts, strict=True)),
    )
    return RowGrouped(jnp.asarray(values), prepared)


def slot_tables(topology: Topology, window: Window) -> tuple[jax.Array, jax.Array]:
    """Where the slots point: two (P,) int32.

    Returns:
        The distance in pixels of (C, H, W) from an output position's corner (its first tap) in channel 0, and the bits
        of the tap: i and kh + j for tap (i, j). A slot without a column has all bits, which no position has.
    """
    (kh, kw), (height, width) = window.kernel, window.image
    tap, channel = jnp.divmod(jnp.minimum(topology.columns, window.features - 1), window.channels)
    i, j = jnp.divmod(tap, kw)
    pixels = (channel * height + i * window.dilation[0]) * width + j * window.dilation[1]
    bits = jnp.where(topology.columns < window.features, (1 << i) | (1 << (kh + j)), -1)
    return pixels.astype(jnp.int32), bits.astype(jnp.int32)


def slot_places(topology: Topology, window: Window) -> jax.Array:
    """Where the slots point, in one array: (P, 2) int32 of `slot_tables`, padding as slots without a column.

    Where no tap can be outside of the image and no slot is padding, (P,) of the first table is enough.
    """
    if topology.places is not None and topology.window == window:
        return topology.places
    if topology.counts is not None:
        columns = jnp.where(slot_is_real(topology), topology.columns, topology.k)
        topology = dataclasses.replace(topology, columns=columns)
    pixels, bits = slot_tables(topology, window)
    return jnp.stack([pixels, bits], axis=-1) if window.is_padded or topology.counts is not None else pixels


def check_window(window: Window) -> None:
    """Raises NotImplementedError for filters and images that `slot_tables` cannot describe."""
    if sum(window.kernel) > MAX_TAPS:
        raise NotImplementedError(
            f"the GPU kernels do filters of at most {MAX_TAPS} rows and columns together, got {window.kernel}"
        )
    if window.channels * window.image[0] * window.image[1] > INT32_MAX:
        raise NotImplementedError(
            f"the GPU kernels do images of at most 2^31 numbers, got {window.channels} channels of {window.image}"
        )
