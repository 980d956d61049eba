"""Convolutions with a row-grouped filter matrix as a Pallas-Mosaic kernel for Hopper GPUs: implicit GEMM.

The product of `pallas_kernels.mosaic._matmul` with another gather: it addresses the slots' rows of the right side as
`pallas_kernels.gpu._layout` says. With one tap for each pixel it is that product. Derivatives are Triton's.
"""

from pallas_kernels._tables import FEW_TOKENS
from pallas_kernels.gpu import _layout as layout
from pallas_kernels.mosaic import _matmul as mosaic_gpu
from pallas_kernels.mosaic import _support as hopper
from pallas_kernels.triton import _conv as triton_conv
from pallas_kernels.triton import _tiles as triton_tiles

grad_input = triton_conv.grad_input
grad_values = triton_conv.grad_values
grad_values_two_four = triton_conv.grad_values_two_four
ADDS = True  # `forward` takes an addend
NARROW = 0.6  # what a tile of 128 tokens takes, of the time of one of 256


def forward(matrix, x, bias, *, window, activation, precision, addend=None, config=None):
    """Computes activation(filters * x + bias + addend), (C, H, W, B) to (M, H' W' B); see `conv2d` for the arguments.

    Args:
        matrix: prepared, or canonical with equal counts that are a multiple of 64.
        x: (C, H, W, B) bfloat16 or float16, B a multiple of 8.
        bias: (M,) or None.
        window: the geometry.
        activation: see `matmul`.
        precision: ignored, as in `mosaic_gpu.forward`.
        addend: (M, H' W' B) of x's dtype, or None.
        config: a `_forward.Config`; None takes the heuristic's.

    Raises:
        NotImplementedError: the matrix, the images, the GPU or the version of JAX is not supported by the kernel.
    """
    del precision
    topology, batch = matrix.topology, x.shape[-1]
    hopper.check(topology, x.dtype)
    layout.check_window(window)
    if batch == 0 or batch % triton_tiles.VECTOR:
        raise NotImplementedError(f"the Mosaic kernel needs images in multiples of 8, got {batch}")
    config = heuristic(topology, window, batch) if config is None else config
    # Padding is not read, as a product would: where filters have few columns it is most of a step.
    if window.is_matmul and topology.counts is None:
        ids, x, window = topology.columns, x.reshape(topology.k, -1), None
    else:
        ids, x = layout.slot_places(topology, window).reshape(-1), x.reshape(-1, batch)
    return mosaic_gpu.call(matrix, ids, x, bias, addend, activation=activation, config=config, window=window)


def forward_two_four(matrix, x, bias, *, window, **kwargs):
    """`forward` for a 2:4 matrix, where the convolution is a product.

    Raises:
        NotImplementedError: it is none, or as `mosaic_gpu.forward_two_four`.
    """
    if not window.is_matmul:
        raise NotImplementedError("the Mosaic kernel does no convolutions with 2:4 filters of several taps or steps")
    flat = x.reshape(matrix.topology.k, -1)
    return mosaic_gpu.forward_two_four(matrix, flat, bias, layout="feature_major", **kwargs)


def heuristic(topology, window, batch: int):
    """The config for some filters and images."""
    kernel, v = hopper.kernel(), topology.group_size
    if v == 256:
        return mosaic_gpu.heuristic(v, FEW_TOKENS + 1)
    # How many tiles a program gets; one that is cut off by the last token counts for as much as it has.
    multiprocessors, work = hopper.multiprocessors(), topology.num_groups * window.output_pixels * batch
    narrow, wide = (-(-work // (tokens * multiprocessors)) for tokens in (128, 256))
    small = NARROW * narrow < wide
    if v == 128:
        return kernel.Config(block_tokens=128 if small else 256, stages=6 if small else 4, ahead=2, split="rows")
    if small:
        return kernel.Config(block_tokens=128, stages=8, ahead=2)
    return kernel.Config(block_tokens=256, stages=5, ahead=2)


def pays(matrix, x, window) -> bool:
    """Whether this kernel is faster than Triton's: with a tile for every fourth multiprocessor or more."""
    if matrix.topology.pairs is not None:
        return window.is_matmul and mosaic_gpu.pays(matrix, x.reshape(matrix.topology.k, -1), "feature_major")
    try:
        tiles = matrix.topology.num_groups * -(-window.output_pixels * x.shape[-1] // 128)
        return 4 * tiles >= hopper.multiprocessors()
    except NotImplementedError:
        return False
