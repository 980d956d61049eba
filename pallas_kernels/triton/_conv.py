"""Convolutions with a row-grouped filter matrix as Pallas-Triton kernels: implicit GEMM.

The product is that of `pallas_kernels.triton_forward` with N tokens that are output positions times images: a program
computes the rows of one group times a tile of tokens. A slot's row of the right side is stored nowhere but addressed:
the address splits into a part of the slot (its channel and tap) and a part of the token (the output position's corner
and the image). A table of one number a slot, made before the kernel, leaves one addition inside it. Borders are a bit
mask of the token (which filter rows and columns are inside of the image) against the bits of the slot's tap.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _two_four as two_four
from pallas_kernels._matrix import INT32_MAX, RowGrouped, Topology, expand, slot_is_real
from pallas_kernels._tables import Op
from pallas_kernels._window import Window
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton import _matmul as triton
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._forward import ACTIVATIONS, FAST_ACTIVATIONS
from pallas_kernels.triton._grad import decompress, real_counts
from pallas_kernels.triton._tiles import (
    VECTOR,
    call,
    check,
    contract,
    device_kind,
    is_aligned,
    load_tile,
    loop,
    problem,
    split_steps,
    static_length,
    store_tile,
)
from pallas_kernels.xla._conv import dense_grad_input

MAX_TAPS = 30  # rows plus columns of a filter, whose bits share an int32


def forward(matrix, x, bias, *, window, activation, precision, config=None):
    """Computes activation(filters * x + bias), (C, H, W, B) to (M, H' W' B); see `conv2d` for the arguments.

    Args:
        matrix: canonical or prepared.
        x: (C, H, W, B).
        bias: (M,) or None.
        window: the geometry.
        activation: see `matmul`.
        precision: see `matmul`.
        config: None looks one up, as for the product of the same sizes.

    Raises:
        NotImplementedError: a group size, dtype or filter size the kernel does not do.
    """
    topology, batch = matrix.topology, x.shape[-1]
    if window.is_matmul:
        flat = x.reshape(topology.k, -1)
        return triton.forward(
            matrix, flat, bias, activation=activation, layout="feature_major", precision=precision, config=config
        )
    _check(topology, x.dtype, window)
    if batch == 0:
        return jnp.zeros((topology.m, 0), x.dtype)
    x = _pad_batch(x)
    if config is None:
        config = _config("forward", topology, x, window)
    y = _forward(matrix, x, bias, window, activation, precision, config)
    return _unpad_batch(y, x.shape[-1], batch)


def forward_two_four(matrix, x, bias, *, window, **kwargs):
    """`forward` for a 2:4 matrix: the packed product where it is one.

    Else it is expanded. Slots without a column repeat one of their four, with zero values.
    """
    if window.is_matmul:
        flat = x.reshape(matrix.topology.k, -1)
        return triton.forward_two_four(matrix, flat, bias, layout="feature_major", **kwargs)
    filled = two_four.fill(dataclasses.replace(matrix.topology, pairs=None))
    return forward(RowGrouped(expand(matrix).values, filled), x, bias, window=window, **kwargs)


def grad_values_two_four(topology, x, dy, **kwargs):
    """`grad_values` of a 2:4 matrix: all of the kept columns, of which the stored slots are taken."""
    filled = two_four.fill(dataclasses.replace(topology, pairs=None))
    return two_four.select(topology, grad_values(filled, x, dy, **kwargs))


def grad_values(topology, x, dy, *, window, precision, config=None):
    """Computes dValues (P, V), zero on padding and on sentinel rows.

    Raises:
        NotImplementedError: a group size, dtype or filter size the kernel does not do.
    """
    if window.is_matmul:
        flat = x.reshape(topology.k, -1)
        return triton.grad_values(topology, flat, dy, layout="feature_major", precision=precision, config=config)
    _check(topology, x.dtype, window)
    if x.shape[-1] == 0:
        return jnp.zeros((topology.num_slots, topology.group_size), x.dtype)
    dy = _pad_batch(dy.astype(x.dtype).reshape(topology.m, -1, x.shape[-1])).reshape(topology.m, -1)
    x = _pad_batch(x)
    if config is None:
        config = _config("grad_values", topology, x, window)
    c, p, v = config, topology.num_slots, topology.group_size
    exact = topology.counts is None and topology.segments is not None and topology.max_count % c.block_rows == 0
    tiles = pl.cdiv(topology.max_count, c.block_rows)
    kernel = functools.partial(
        _grad_values_kernel, config=c, v=v, m=topology.m, window=window, tiles=tiles, exact=exact,
        real_rows=topology.num_groups * v == topology.m, precision=precision,
    )  # fmt: skip
    grid, shape, dtype = (topology.num_groups * tiles,), (p, v), x.dtype
    if c.split > 1:
        grid, shape, dtype = (*grid, c.split), (c.split, *shape), jnp.float32
    tables = slot_tables(topology, window)
    args = *tables, topology.group_ptr, real_counts(topology), topology.rows, _pixels(x), dy
    d = call(kernel, jax.ShapeDtypeStruct(shape, dtype), grid, c, *args, name="row_grouped_conv_grad_values")
    d = d.sum(0).astype(x.dtype) if c.split > 1 else d
    if topology.segments is None:  # slots behind the last group, which no program writes
        d = jnp.where((jnp.arange(p) < topology.group_ptr[-1])[:, None], d, 0)
    return d


def grad_input(matrix, dy, *, window, precision):
    """Computes the gradient of x, (C, H, W, B): the filters are decompressed, the convolution that follows is dense.

    Raises:
        NotImplementedError: a group size or dtype the kernel does not do.
    """
    if window.is_matmul:
        dx = triton.grad_input(matrix, dy, layout="feature_major", precision=precision)
        return dx.reshape(window.channels, *window.image, -1)
    check(matrix.topology, dy.dtype)
    return dense_grad_input(decompress(matrix), dy, window, precision)


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


def _check(topology: Topology, dtype, window: Window) -> None:
    check(topology, dtype)
    check_window(window)


def _config(op: Op, topology: Topology, x: jax.Array, window: Window) -> Config:
    """The config of the product that the convolution is, with one output position and image a token."""
    tokens = window.positions * x.shape[-1]
    return configs.config(problem(op, topology, jax.ShapeDtypeStruct((topology.k, tokens), x.dtype)), device_kind())


def _pad_batch(x: jax.Array) -> jax.Array:
    """Pads a batch that is not small to a multiple of `VECTOR`, so that runs of it can be loaded 16 bytes at a time."""
    batch = x.shape[-1]
    if batch < VECTOR or batch % VECTOR == 0:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -batch % VECTOR)])


def _unpad_batch(y: jax.Array, padded: int, batch: int) -> jax.Array:
    if padded == batch:
        return y
    return y.reshape(y.shape[0], -1, padded)[..., :batch].reshape(y.shape[0], -1)


def _pixels(x: jax.Array) -> jax.Array:
    """(C, H, W, B) as (C H W, B): counting in pixels tells the compiler that addresses are multiples of B."""
    return x.reshape(-1, x.shape[-1])


def _forward(matrix: RowGrouped, x, bias, window: Window, activation, precision, config: Config):
    topology, c = matrix.topology, config
    groups, v, n = topology.num_groups, topology.group_size, window.positions * x.shape[-1]
    rows = min(c.block_rows, v)
    kernel = functools.partial(
        _forward_kernel,
        config=c,
        groups=groups,
        v=v,
        block_rows=rows,
        window=window,
        length=static_length(topology, c.block_k),
        ragged=not is_aligned(topology, c.block_k),
        has_bias=bias is not None,
        activation=activation,
        precision=precision,
    )
    grid = (groups * (v // rows) * pl.cdiv(n, c.block_tokens),)
    shape, dtype = (topology.m, n), x.dtype
    if c.split > 1:
        grid, shape, dtype = (*grid, c.split), (c.split, *shape), jnp.float32
    args = [matrix.values, *slot_tables(topology, window), topology.group_ptr, topology.rows, _pixels(x)]
    args += [] if bias is None else [bias]
    y = call(kernel, jax.ShapeDtypeStruct(shape, dtype), grid, c, *args, name="row_grouped_conv")
    if c.split > 1:
        y = y.sum(0)
        y = y if bias is None else y + bias[:, None].astype(y.dtype)
        y = ACTIVATIONS[activation](y).astype(x.dtype)
    return y


def _forward_kernel(
    values_ref, pixels_ref, bits_ref, ptr_ref, rows_ref, x_ref, *refs,
    config, groups, v, block_rows, window, length, ragged, has_bias, activation, precision,
    interpret,
):  # fmt: skip
    *bias_ref, y_ref = refs
    c, n, m = config, y_ref.shape[-1], y_ref.shape[-2]
    parts, tiles = groups * (v // block_rows), pl.cdiv(n, c.block_tokens)
    program = pl.program_id(0)
    if c.tokens_first:
        part, tile = lax.div(program, tiles), lax.rem(program, tiles)
    else:
        part, tile = lax.rem(program, parts), lax.div(program, parts)
    group, first_row = lax.div(part, v // block_rows), lax.rem(part, v // block_rows) * block_rows
    step_slots, lanes = jnp.arange(c.block_k), first_row + jnp.arange(block_rows)
    tokens = tile * c.block_tokens + jnp.arange(c.block_tokens)
    corners, images, inside = _places(tokens, window, x_ref.shape[1], n)
    if length is None:
        begin, end = ptr_ref[group], ptr_ref[group + 1]
        if not ragged:
            begin = pl.multiple_of(begin, c.block_k)
    else:
        begin, end = group * length, (group + 1) * length
    steps = pl.cdiv(end - begin, c.block_k) if length is None else length // c.block_k
    first, last = split_steps(steps, c.split)

    def load_slots(step):
        slots = begin + step * c.block_k + step_slots
        mask, other = (slots < end, 0) if ragged else (None, None)
        pixels = plgpu.load(pixels_ref.at[slots], mask=mask, other=other)
        if not window.is_padded:
            return (pixels,)
        return pixels, plgpu.load(bits_ref.at[slots], mask=mask, other=other)

    def multiply(step, found, acc):
        slots = begin + step * c.block_k + step_slots
        live = slots < end if ragged else None
        gathered = _load_windows(x_ref, *found, corners=corners, images=images, inside=inside, live=live)
        weights = load_tile(values_ref, slots, lanes, live, None)
        a, b = (gathered, weights) if c.flip else (weights, gathered)
        return acc + contract(a, b, (0, 0), precision)

    shape = (c.block_tokens, block_rows) if c.flip else (block_rows, c.block_tokens)
    acc = loop(first, last, load_slots, multiply, jnp.zeros(shape, jnp.float32), prefetch=c.prefetch)
    rows = plgpu.load(rows_ref.at[group * v + lanes])
    y, live_tokens = acc.T if c.flip else acc, tokens < n if n % c.block_tokens else None
    if c.split > 1:
        store_tile(y_ref, rows, tokens, y, rows < m, live_tokens, pl.program_id(1))
        return
    if has_bias:
        y += plgpu.load(bias_ref[0].at[rows], mask=rows < m, other=0).astype(jnp.float32)[:, None]
    functions = ACTIVATIONS if interpret or y_ref.dtype == jnp.float32 else FAST_ACTIVATIONS
    y = functions[activation](y).astype(y_ref.dtype)
    store_tile(y_ref, rows, tokens, y, None if groups * v == m else rows < m, live_tokens)


def _places(tokens, window: Window, batch: int, n: int):
    """Where tokens are: their position's corner in pixels of channel 0, their image, and the bits of the taps inside.

    Without borders the bits are a mask of the tokens behind the last, or None where there is none.
    """
    position, image = lax.div(tokens, batch), lax.rem(tokens, batch)
    p, q = lax.div(position, window.outputs[1]), lax.rem(position, window.outputs[1])
    row = p * window.strides[0] - window.padding[0][0]
    column = q * window.strides[1] - window.padding[1][0]
    live = tokens < n
    if not window.is_padded:
        return row * window.image[1] + column, image, live if n % tokens.size else None
    bits = jnp.zeros_like(tokens)
    for first, start, taps, d, size in (
        (0, row, window.kernel[0], window.dilation[0], window.image[0]),
        (window.kernel[0], column, window.kernel[1], window.dilation[1], window.image[1]),
    ):
        for tap in range(taps):
            at = start + tap * d
            bits |= jnp.where((at >= 0) & (at < size), 1 << (first + tap), 0)
    if n % tokens.size:
        bits = jnp.where(live, bits, 0)
    return row * window.image[1] + column, image, bits


def _load_windows(x_ref, pixels, bits=None, *, corners, images, inside, live):
    """Loads a (slots, tokens) tile of the implicit matrix; zeros outside of the images and where a slot is not live."""
    mask = None if inside is None else inside[None, :]
    if bits is not None:
        mask = (inside[None, :] & bits[:, None]) == bits[:, None]
    if live is not None:
        mask = live[:, None] if mask is None else mask & live[:, None]
    shape = (pixels.size, images.size)
    index = x_ref.at[pixels[:, None] + corners[None, :], jnp.broadcast_to(images[None, :], shape)]
    if mask is None:
        return plgpu.load(index)
    return plgpu.load(index, mask=jnp.broadcast_to(mask, shape), other=0)


def _grad_values_kernel(
    pixels_ref, bits_ref, ptr_ref, counts_ref, rows_ref, x_ref, dy_ref, d_ref,
    *, config, v, m, window, tiles, exact, real_rows, precision, interpret,
):  # fmt: skip
    del interpret
    c, n = config, dy_ref.shape[1]
    program = pl.program_id(0)
    group, tile = lax.div(program, tiles), lax.rem(program, tiles)
    begin, end, count = ptr_ref[group], ptr_ref[group + 1], counts_ref[group]
    local = tile * c.block_rows + jnp.arange(c.block_rows)
    slots, lanes = begin + local, jnp.arange(v)
    live = None if exact else local < count
    other = None if live is None else 0
    found = [plgpu.load(pixels_ref.at[slots], mask=live, other=other)]
    if window.is_padded:
        found.append(plgpu.load(bits_ref.at[slots], mask=live, other=other))
    rows = rows_ref[group * v + lanes]
    live_rows = None if real_rows else rows < m
    first, last = split_steps(pl.cdiv(n, c.block_tokens), c.split)
    if not exact:  # tiles behind the end of a shorter segment have nothing to do
        last = jnp.where(tile * c.block_rows < count, jnp.int32(last), jnp.int32(first))

    def body(step, acc):
        tokens = step * c.block_tokens + jnp.arange(c.block_tokens)
        corners, images, inside = _places(tokens, window, x_ref.shape[1], n)
        xs = _load_windows(x_ref, *found, corners=corners, images=images, inside=inside, live=live)
        dys = load_tile(dy_ref, rows, tokens, live_rows, tokens < n if n % c.block_tokens else None)
        return acc + contract(xs, dys, (1, 1), precision)

    acc = lax.fori_loop(first, last, body, jnp.zeros((c.block_rows, v), jnp.float32))
    leading = (pl.program_id(1),) if c.split > 1 else ()
    # Padding slots are written too: their masked rows of x made them zero.
    store_tile(d_ref, slots, lanes, acc.astype(d_ref.dtype), None if exact else slots < end, None, *leading)
