"""Convolutions with a row-grouped filter matrix as Pallas-Triton kernels: implicit GEMM.

The product is that of `_forward` with N tokens that are output positions times images: a program
computes the rows of one group times a tile of tokens. A slot's row of the right side is stored nowhere but addressed:
the address splits into a part of the slot (its channel and tap) and a part of the token (the output position's corner
and the image). A table of one number a slot, made before the kernel, leaves one addition inside it. Borders are a bit
mask of the token (which filter rows and columns are inside of the image) against the bits of the slot's tap.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _devices as devices
from pallas_kernels import _two_four as two_four
from pallas_kernels._matrix import RowGrouped, Topology, expand
from pallas_kernels._tables import Op
from pallas_kernels._window import Window
from pallas_kernels.gpu import _layout as layout
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton import _matmul as triton
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._grad import decompress
from pallas_kernels.triton._tiles import (
    VECTOR,
    check,
    problem,
)
from pallas_kernels.xla._conv import dense_grad_input


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
        NotImplementedError: a group size, dtype or filter size not supported by the kernel.
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
        NotImplementedError: a group size, dtype or filter size not supported by the kernel.
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

    def gather(refs, slots, live):
        *table_refs, x_ref = refs
        used = table_refs if window.is_padded else table_refs[:1]
        found = [plgpu.load(ref.at[slots], mask=live, other=None if live is None else 0) for ref in used]

        def load(tokens, live_tokens):
            return _load_windows(x_ref, *found, places=_places(tokens, live_tokens, window, x_ref.shape[1]), live=live)

        return load

    operands = *layout.slot_tables(topology, window), x.reshape(-1, x.shape[-1])
    return _product.grad_values(
        gather, topology, operands, dy, config=config, precision=precision, name="row_grouped_conv_grad_values"
    )


def grad_input(matrix, dy, *, window, precision):
    """Computes the gradient of x, (C, H, W, B): the filters are decompressed, the convolution that follows is dense.

    Raises:
        NotImplementedError: a group size or dtype not supported by the kernel.
    """
    if window.is_matmul:
        dx = triton.grad_input(matrix, dy, layout="feature_major", precision=precision)
        return dx.reshape(window.channels, *window.image, -1)
    check(matrix.topology, dy.dtype)
    return dense_grad_input(decompress(matrix), dy, window, precision)


def _check(topology: Topology, dtype, window: Window) -> None:
    check(topology, dtype)
    layout.check_window(window)


def _config(op: Op, topology: Topology, x: jax.Array, window: Window) -> Config:
    """The config of the product that the convolution is, with one output position and image a token."""
    tokens = window.output_pixels * x.shape[-1]
    return configs.config(problem(op, topology, jax.ShapeDtypeStruct((topology.k, tokens), x.dtype)), devices.kind())


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


def _forward(matrix: RowGrouped, x, bias, window: Window, activation, precision, config: Config):
    topology, batch = matrix.topology, x.shape[-1]

    def walk(tile, values_ref, pixels_ref, bits_ref, x_ref):
        places = _places(tile.tokens, tile.live_tokens, window, batch)

        def load_slots(step):
            slots, live = tile.slots(step)
            refs = (pixels_ref, bits_ref) if window.is_padded else (pixels_ref,)
            return tuple(plgpu.load(ref.at[slots], mask=live, other=None if live is None else 0) for ref in refs)

        def gather(found, live):
            return _load_windows(x_ref, *found, places=places, live=live)

        return load_slots, _product.product(tile, values_ref, gather, flip=config.flip, precision=precision)

    # Counting in pixels tells the compiler that addresses are multiples of the batch.
    operands = matrix.values, *layout.slot_tables(topology, window), x.reshape(-1, batch)
    n = window.output_pixels * batch
    return _product.forward(
        walk, topology, operands, bias, n, dtype=x.dtype, activation=activation, config=config, name="row_grouped_conv"
    )  # fmt: skip


def _places(tokens, live_tokens, window: Window, batch: int):
    """Where tokens are: their position's corner in pixels of channel 0, their image, and the bits of the taps inside.

    Without borders the last is `live_tokens`: which tokens exist, None for all.
    """
    position, image = lax.div(tokens, batch), lax.rem(tokens, batch)
    p, q = lax.div(position, window.outputs[1]), lax.rem(position, window.outputs[1])
    row = p * window.strides[0] - window.padding[0][0]
    column = q * window.strides[1] - window.padding[1][0]
    if not window.is_padded:
        return row * window.image[1] + column, image, live_tokens
    bits = jnp.zeros_like(tokens)
    for first, start, taps, d, size in (
        (0, row, window.kernel[0], window.dilation[0], window.image[0]),
        (window.kernel[0], column, window.kernel[1], window.dilation[1], window.image[1]),
    ):
        for tap in range(taps):
            at = start + tap * d
            bits |= jnp.where((at >= 0) & (at < size), 1 << (first + tap), 0)
    if live_tokens is not None:
        bits = jnp.where(live_tokens, bits, 0)
    return row * window.image[1] + column, image, bits


def _load_windows(x_ref, pixels, bits=None, *, places, live):
    """Loads a (slots, tokens) tile of the implicit matrix; zeros outside of the images and where a slot is not live."""
    corners, images, inside = places
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
