"""Convolutions with a row-grouped filter matrix as Pallas-Triton kernels: implicit GEMM.

The product is that of `_forward` with N tokens that are output positions times images: a program
computes the rows of one group times a tile of tokens. A slot's row of the right side is stored nowhere but addressed:
the address splits into a part of the slot (its channel and tap) and a part of the token (the output position's corner
and the image). A table of one number a slot, made before the kernel, leaves one addition inside it. Borders are a bit
mask of the token (which filter rows and columns are inside of the image) against the bits of the slot's tap.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._layout import MatrixLayout, Prepared
from pallas_kernels._window import Window
from pallas_kernels.gpu import _layout as layouts
from pallas_kernels.gpu._layout import VECTOR
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config


class Operands(NamedTuple):
    """What the kernels read beside dY: arrays, or references to them; `bits` is None without borders."""

    values: Any
    pixels: Any
    bits: Any
    x: Any

    def load(self, slots: jax.Array, live: jax.Array | None) -> tuple[jax.Array, ...]:
        """Where slots point."""
        refs = [ref for ref in (self.pixels, self.bits) if ref is not None]
        return tuple(plgpu.load(ref.at[slots], mask=live, other=None if live is None else 0) for ref in refs)


def _operands(values: jax.Array | None, layout: MatrixLayout, x: jax.Array, window: Window) -> Operands:
    pixels, bits = layouts.slot_tables(layout, window)
    # Counting in pixels tells the compiler that addresses are multiples of the batch.
    return Operands(values, pixels, bits if window.is_padded else None, x.reshape(-1, x.shape[-1]))


def forward(
    matrix: Prepared, x: jax.Array, bias: jax.Array | None, *, window: Window, activation: str | None,
    precision: lax.PrecisionLike, config: Config,
) -> jax.Array:  # fmt: skip
    """Computes activation(filters * x + bias), (C, H, W, B) to (M, H' W' B)."""
    batch = x.shape[-1]
    x = _pad_batch(x)
    padded = x.shape[-1]

    def walk(tile: _product.Tile, refs: Operands) -> Any:
        places = _places(tile.tokens, tile.live_tokens, window, padded)

        def load_slots(step: Any) -> tuple[jax.Array, ...]:
            return refs.load(*tile.slots(step))

        def gather(found: tuple[jax.Array, ...], live: jax.Array | None) -> jax.Array:
            return _load_windows(refs.x, *found, places=places, live=live)

        return load_slots, _product.product(tile, refs.values, gather, flip=config.flip, precision=precision)

    y = _product.forward(
        walk, matrix.layout, _operands(matrix.values, matrix.layout, x, window), bias, window.output_pixels * padded,
        dtype=x.dtype, activation=activation, config=config, name="row_grouped_conv",
    )  # fmt: skip
    return y if padded == batch else y.reshape(len(y), -1, padded)[..., :batch].reshape(len(y), -1)


def grad_values(
    layout: MatrixLayout, x: jax.Array, dy: jax.Array, *, window: Window, precision: lax.PrecisionLike, config: Config
) -> jax.Array:
    """Computes dValues (P, V) from x (C, H, W, B) and dy (M, H' W' B), zero on padding and on sentinel rows."""
    dy = _pad_batch(dy.reshape(layout.m, -1, x.shape[-1])).reshape(layout.m, -1)
    x = _pad_batch(x)
    batch = x.shape[-1]

    def gather(refs: Operands, slots: jax.Array, live: jax.Array | None) -> Any:
        found = refs.load(slots, live)

        def load(tokens: jax.Array, live_tokens: jax.Array | None) -> jax.Array:
            return _load_windows(refs.x, *found, places=_places(tokens, live_tokens, window, batch), live=live)

        return load

    return _product.grad_values(
        gather, layout, _operands(None, layout, x, window), dy, config=config, precision=precision,
        name="row_grouped_conv_grad_values",
    )  # fmt: skip


def padded_batch(batch: int) -> int:
    """The batch that kernels see: padded, unless it is small, so that runs of it can be loaded 16 bytes at a time."""
    return batch if batch < VECTOR else -(-batch // VECTOR) * VECTOR


def _pad_batch(x: jax.Array) -> jax.Array:
    more = padded_batch(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def _places(
    tokens: jax.Array, live_tokens: jax.Array | None, window: Window, batch: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
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


def _load_windows(
    x_ref: Any, pixels: jax.Array, bits: jax.Array | None = None,
    *, places: tuple[jax.Array, jax.Array, jax.Array | None], live: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Loads a (slots, tokens) tile of the implicit matrix; zeros outside of the images and where a slot is not live."""
    corners, images, inside = places
    mask = None if inside is None else inside[None, :]
    if bits is not None and inside is not None:
        mask = (inside[None, :] & bits[:, None]) == bits[:, None]
    if live is not None:
        mask = live[:, None] if mask is None else mask & live[:, None]
    shape = (pixels.size, images.size)
    index = x_ref.at[pixels[:, None] + corners[None, :], jnp.broadcast_to(images[None, :], shape)]
    if mask is None:
        return plgpu.load(index)
    return plgpu.load(index, mask=jnp.broadcast_to(mask, shape), other=0)
