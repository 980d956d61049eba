"""The geometry of a convolution: which pixel of the input each tap of the filter meets at each output position."""

import dataclasses
from collections.abc import Iterable, Sequence

from jax import lax

Pair = tuple[int, int]
Padding = str | Sequence[tuple[int, int]]
PADDINGS = ("SAME", "SAME_LOWER", "VALID")


@dataclasses.dataclass(frozen=True)
class Window:
    """A convolution's sizes, all known when tracing. Static: it may be an argument of jit.

    Column (i * kw + j) * C + c of a filter matrix is tap (i, j) of channel c: the channel runs fastest, as in a Flax
    kernel (kh, kw, C, C_out) whose first three axes are flattened. At output (p, q) the tap reads input pixel
    (p * strides[0] + i * dilation[0] - padding[0][0], q * strides[1] + j * dilation[1] - padding[1][0]), zero outside.

    Attributes:
        image: (H, W) of the input.
        channels: C of the input.
        kernel: (kh, kw) of the filters.
        strides: of the output positions.
        dilation: distance of neighbouring taps.
        padding: ((top, bottom), (left, right)), in pixels.
    """

    image: Pair
    channels: int
    kernel: Pair
    strides: Pair
    dilation: Pair
    padding: tuple[Pair, Pair]

    @property
    def extent(self) -> Pair:
        """Height and width that the taps span."""
        return self._pair((size - 1) * d + 1 for size, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def outputs(self) -> Pair:
        """(H, W) of the output."""
        return self._pair(
            (size + sum(pads) - extent) // stride + 1
            for size, pads, extent, stride in zip(self.image, self.padding, self.extent, self.strides, strict=True)
        )

    @property
    def output_pixels(self) -> int:
        """Pixels H' W' of the output."""
        return self.outputs[0] * self.outputs[1]

    @property
    def features(self) -> int:
        """Columns K = kh * kw * C of the filter matrix."""
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def is_matmul(self) -> bool:
        """Whether the convolution is one product over all pixels: one tap, every pixel, no border."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not self.is_padded

    @property
    def is_padded(self) -> bool:
        """Whether some tap may read outside of the image."""
        return any(any(pads) for pads in self.padding)

    @staticmethod
    def _pair(sizes: Iterable[int]) -> Pair:
        height, width = sizes
        return height, width


def window(
    image: Pair, channels: int, kernel_size: Pair, strides: int | Pair, padding: Padding, dilation: int | Pair
) -> Window:
    """Builds a `Window`, with padding names resolved.

    Raises:
        ValueError: a size below 1, negative or unknown padding, or filters larger than the padded image.
    """
    pairs = {"kernel_size": _pair(kernel_size), "strides": _pair(strides), "dilation": _pair(dilation)}
    for name, pair in pairs.items():
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{name} must be two sizes of at least 1, got {pair}")
    kernel, steps, dilations = (Window._pair(pair) for pair in pairs.values())
    extent = [(size - 1) * d + 1 for size, d in zip(kernel, dilations, strict=True)]
    if isinstance(padding, str):
        if padding.upper() not in PADDINGS:  # `lax` takes lower case too, and so does a dense Flax layer
            raise ValueError(f"padding must be one of {PADDINGS} or ((top, bottom), (left, right)), got {padding!r}")
        padding = lax.padtype_to_pads(image, extent, steps, padding.upper())
    try:
        (top, bottom), (left, right) = padding
        pads = (int(top), int(bottom)), (int(left), int(right))
    except (TypeError, ValueError):
        pads = (-1, -1), (-1, -1)
    if min(min(pair) for pair in pads) < 0:
        raise ValueError(f"padding must be ((top, bottom), (left, right)) in pixels, none negative, got {padding!r}")
    if any(size + sum(pair) < span for size, pair, span in zip(image, pads, extent, strict=True)):
        raise ValueError(f"filters that span {tuple(extent)} pixels do not fit an image of {image} padded by {pads}")
    return Window(image, channels, kernel, steps, dilations, pads)


def _pair(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes, sizes) if isinstance(sizes, int) else tuple(int(size) for size in sizes)
