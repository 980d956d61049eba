"""The layout that both GPU backends read: segments padded to whole steps, groups sorted by their number of slots.

For a convolution it also says where the slots point, one number or two a slot.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._layout import DATA, META, MatrixLayout, Prepared, canonical_layout, slot_is_real
from pallas_kernels._matrix import INT32_MAX, RowGrouped
from pallas_kernels._pairs import pack, pack_bits, unpack, unpack_bits, wide_pairs
from pallas_kernels._window import Window

SEGMENT = 64  # segments are padded to multiples of this, the longest step that pays with many tokens
VECTOR = 8  # tokens in a 16-byte load of two-byte activations: rows of x must be multiples of it
WORD = 16  # slots whose pairs a word of two bytes holds
MAX_TAPS = 30  # rows plus columns of a filter, whose bits share an int32


@functools.partial(jax.tree_util.register_dataclass, data_fields=[*DATA, "places"], meta_fields=[*META, "window"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvLayout(MatrixLayout):
    """The layout of filters for one convolution, of images of one size.

    Attributes:
        places: where the slots point, see `slot_places`.
        window: the geometry of the convolution.
    """

    places: jax.Array
    window: Window


def prepare(matrix: RowGrouped, window: Window | None = None) -> Prepared:
    """Pads every segment to a multiple of `SEGMENT` slots and sorts the groups, heaviest first.

    Equal counts that are multiples already stay as they are. Stacked matrices do too: their slices differ.

    Args:
        matrix: a canonical matrix.
        window: of the convolution that it is for; where its slots point is then worked out here.
    """
    prepared = _padded(matrix)
    layout = prepared.layout
    if window is None or (window.is_matmul and layout.counts is None):
        return prepared
    places = jax.jit(slot_places, static_argnums=1)(layout, window)
    fields = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    return Prepared(prepared.values, ConvLayout(**fields, places=places, window=window))


def _padded(matrix: RowGrouped) -> Prepared:
    topology, v = matrix.topology, matrix.topology.group_size
    layout = canonical_layout(topology)
    if matrix.values.ndim > 2:
        return Prepared(matrix.values, layout)
    # In NumPy: JAX would compile every slice.
    ptr, old_columns = np.asarray(topology.group_ptr), np.asarray(topology.columns)
    layout = dataclasses.replace(
        layout, sentinels=topology.pairs is not None and bool((old_columns == topology.k).any())
    )
    if topology.equal_counts and topology.max_count % SEGMENT == 0:
        return Prepared(matrix.values, layout)
    counts = np.diff(ptr)
    order = np.argsort(-counts, kind="stable")
    lengths = -(-counts[order] // SEGMENT) * SEGMENT
    starts = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.zeros(starts[-1], np.int32)
    for g, start, length in zip(order, starts[:-1], lengths, strict=True):
        columns[start : start + length] = np.resize(old_columns[ptr[g] : ptr[g + 1]], length) if length else 0
    source = _sources(ptr, order, starts)
    values, pairs, chosen = np.asarray(matrix.values), None, None
    if topology.pairs is None:
        values = _taken(values, source, 0)
    else:
        fours = source[::4] // 4
        values = _taken(values.reshape(-1, 2, v), fours, 0).reshape(-1, v)
        old_pairs = unpack(np.asarray(topology.pairs), matrix.values.shape[0]).reshape(-1, 2, v)
        ascending = np.arange(2, dtype=np.uint8)[:, None]  # those of padding ascend too
        pairs = jnp.asarray(wide_pairs(pack(_taken(old_pairs, fours, ascending).reshape(-1, v))))
        if topology.chosen is not None:
            old = unpack_bits(np.asarray(topology.chosen), matrix.values.shape[0]).reshape(-1, 2, v)
            chosen = jnp.asarray(pack_bits(_taken(old, fours, 0).reshape(-1, v)))
    firsts = np.flatnonzero(np.diff(lengths, prepend=-1))
    runs = np.diff(np.append(firsts, len(lengths)))
    prepared = dataclasses.replace(
        layout,
        columns=jnp.asarray(columns),
        group_ptr=jnp.asarray(starts.astype(np.int32)),
        rows=jnp.asarray(np.asarray(topology.rows).reshape(-1, v)[order].reshape(-1)),
        counts=jnp.asarray(counts[order].astype(np.int32)),
        pairs=pairs,
        chosen=chosen,
        order=jnp.asarray(order.astype(np.int32)),
        max_count=int(lengths.max(initial=0)),
        segments=tuple((int(run), int(lengths[first])) for run, first in zip(runs, firsts, strict=True)),
    )
    return Prepared(jnp.asarray(values), prepared)


def _sources(ptr: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For every new slot the old one that it holds, -1 on padding."""
    source = np.full(starts[-1], -1)
    for g, start in zip(order, starts[:-1], strict=True):
        source[start : start + ptr[g + 1] - ptr[g]] = np.arange(ptr[g], ptr[g + 1])
    return source


def _taken(array: np.ndarray, source: np.ndarray, padding: np.ndarray | int) -> np.ndarray:
    """Rows of an array, `padding` where the source is negative."""
    padded = np.concatenate([array, np.broadcast_to(np.asarray(padding, array.dtype), (1, *array.shape[1:]))])
    return padded[source]


def slot_tables(layout: MatrixLayout, window: Window) -> tuple[jax.Array, jax.Array]:
    """Where the slots point: two (P,) int32.

    Returns:
        The distance in pixels of (C, H, W) from an output position's corner (its first tap) in channel 0, and the bits
        of the tap: i and kh + j for tap (i, j). A slot without a column has all bits, which no position has.
    """
    (kh, kw), (height, width) = window.kernel, window.image
    tap, channel = jnp.divmod(jnp.minimum(layout.columns, window.features - 1), window.channels)
    i, j = jnp.divmod(tap, kw)
    pixels = (channel * height + i * window.dilation[0]) * width + j * window.dilation[1]
    bits = jnp.where(layout.columns < window.features, (1 << i) | (1 << (kh + j)), -1)
    return pixels.astype(jnp.int32), bits.astype(jnp.int32)


def slot_places(layout: MatrixLayout, window: Window) -> jax.Array:
    """Where the slots point, in one array: (P, 2) int32 of `slot_tables`, padding as slots without a column.

    Where no tap can be outside of the image and no slot is padding, (P,) of the first table is enough.
    """
    if isinstance(layout, ConvLayout) and layout.window == window:
        return layout.places
    if layout.counts is not None:
        columns = jnp.where(slot_is_real(layout), layout.columns, layout.k)
        layout = dataclasses.replace(layout, columns=columns)
    pixels, bits = slot_tables(layout, window)
    return jnp.stack([pixels, bits], axis=-1) if window.is_padded or layout.counts is not None else pixels


def why_no_window(window: Window) -> list[str]:
    """Why `slot_tables` cannot describe filters and images; empty where it can."""
    reasons = []
    if sum(window.kernel) > MAX_TAPS:
        reasons.append(f"its filters have at most {MAX_TAPS} rows and columns together, got {window.kernel}")
    if window.channels * window.image[0] * window.image[1] > INT32_MAX:
        reasons.append(f"its images have at most 2^31 numbers, got {window.channels} channels of {window.image}")
    return reasons


def static_length(layout: MatrixLayout, block_k: int) -> int | None:
    """The length of all segments, where it is one, known when tracing and a multiple of a step."""
    segments = layout.segments
    if segments is not None and len(segments) == 1 and segments[0][1] % block_k == 0:
        return segments[0][1]
    return None


def is_aligned(layout: MatrixLayout, block_k: int) -> bool:
    """Whether every segment is known to be a multiple of a step, so that no load needs a mask."""
    return layout.multiple % block_k == 0


def pad_tokens(x: jax.Array) -> jax.Array:
    """Pads the tokens of feature-major x, unless it is one, so that its rows can be loaded 16 bytes at a time."""
    n = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, -n % VECTOR))) if n > 1 and n % VECTOR else x
