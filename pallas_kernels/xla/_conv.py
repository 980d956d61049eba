"""Convolutions with a row-grouped filter matrix in plain XLA.

A tap of a channel is a window of the image: what it meets at all output positions is one block of pixels. So a slot's
row of the implicit matrix is one such block, gathered where a product needs it, a few row groups at a time as
`_matmul` does; the whole matrix (im2col) never exists. With strides the image is split first into one
image for each remainder of the pixel's place, so that a block is contiguous whatever the stride.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._window import Window
from pallas_kernels.xla import _matmul as xla
from pallas_kernels.xla._layout import CPULayout


def forward(
    values: jax.Array, layout: CPULayout, x: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Computes filters * x, (C, H, W, B) to (M, H' W' B)."""
    return xla.gathered_product(values, layout, _gather(x, window), window.output_pixels * x.shape[-1], precision)


def grad_values(
    layout: CPULayout, x: jax.Array, dy: jax.Array, window: Window, precision: lax.PrecisionLike
) -> jax.Array:
    """Computes the gradient of the values, (P, V) in their arrangement; zero on padding and sentinel rows."""
    return xla.gathered_gradient(layout, _gather(x, window), dy.astype(x.dtype), precision)


def dense_grad_input(weight: jax.Array, dy: jax.Array, window: Window, precision: lax.PrecisionLike) -> jax.Array:
    """The transposed convolution of dy, (M, H' W' B), with dense filters (M, K)."""
    dy = dy.reshape(weight.shape[0], *window.outputs, -1)
    x = jax.ShapeDtypeStruct((window.channels, *window.image, dy.shape[-1]), dy.dtype)
    convolve = functools.partial(dense, weight.astype(dy.dtype), window=window, precision=precision)
    transposed = jax.linear_transpose(convolve, x)
    return transposed(dy)[0]


def dense(weight: jax.Array, x: jax.Array, window: Window, precision: lax.PrecisionLike = None) -> jax.Array:
    """The convolution of x (C, H, W, B) with dense filters (M, K), to (M, H', W', B)."""
    kernel = weight.reshape(-1, *window.kernel, window.channels)
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=("CHWN", "OHWI", "CHWN"),
        precision=precision,
    )


def _gather(x: jax.Array, window: Window) -> xla.Gather:
    """Makes rows of the implicit (K, H' W' B) matrix from their columns' ids."""
    (kh, kw), channels, (height, width) = window.kernel, window.channels, window.outputs
    tall, high = _remainders(kh, window.dilation[0], window.strides[0])
    wide, across = _remainders(kw, window.dilation[1], window.strides[1])
    # Rows and columns of the split images: those of the last tap's block.
    size = [
        ((k - 1) * d) // s + extent
        for k, d, s, extent in zip(window.kernel, window.dilation, window.strides, window.outputs, strict=True)
    ]
    spatial = zip(window.padding, window.strides, size, window.image, strict=True)
    pads = [(low, stride * count - low - image, 0) for (low, _), stride, count, image in spatial]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    (sh, sw), batch = window.strides, x.shape[-1]
    images = jnp.concatenate([padded[:, i::sh, j::sw] for i, j in itertools.product(tall, wide)])
    # Per tap: which split image, and the block's first row and column there.
    corners = [
        ((tall.index(i * window.dilation[0] % sh) * len(wide) + wide.index(j * window.dilation[1] % sw)) * channels,
         high[i], across[j])
        for i, j in itertools.product(range(kh), range(kw))
    ]  # fmt: skip

    def gather(columns: jax.Array, sentinels: bool) -> jax.Array:
        tap, channel = jnp.divmod(jnp.minimum(columns, window.features - 1), channels)
        starts = jnp.asarray(corners, jnp.int32)[tap].at[..., 0].add(channel)
        if sentinels:
            starts = jnp.where((columns < window.features)[..., None], starts, images.shape[0])
        blocks = lax.gather(
            images,
            starts,
            lax.GatherDimensionNumbers(tuple(range(columns.ndim, columns.ndim + 3)), (0,), (0, 1, 2)),
            (1, height, width, batch),
            mode="fill" if sentinels else "promise_in_bounds",
            fill_value=0,
        )
        return blocks.reshape(*columns.shape, height * width * batch)  # also where there are no columns

    return gather


def _remainders(taps: int, dilation: int, stride: int) -> tuple[list[int], list[int]]:
    """The remainders modulo the stride of the places of a filter's taps along one axis, and the taps' quotients."""
    places = [tap * dilation for tap in range(taps)]
    return sorted({place % stride for place in places}), [place // stride for place in places]
