"""Convolutions with a row-grouped filter matrix as a Pallas-Mosaic kernel for Hopper GPUs: implicit GEMM.

The product of `pallas_kernels.mosaic_gpu` with another gather: it addresses the slots' rows of the right side as
`pallas_kernels.triton_conv` does. Derivatives are Triton's.
"""

import dataclasses

from pallas_kernels import mosaic_gpu, triton_conv, triton_tiles

grad_input = triton_conv.grad_input
grad_values = triton_conv.grad_values
ADDS = True  # `forward` takes an addend


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
        config: a `mosaic_gpu_forward.Config`; None takes the heuristic's.

    Raises:
        NotImplementedError: the matrix, the images, the GPU or the version of JAX is none the kernel does.
    """
    del precision
    topology, batch = matrix.topology, x.shape[-1]
    mosaic_gpu.check(topology, x.dtype)
    triton_conv.check_window(window)
    if batch == 0 or batch % triton_tiles.VECTOR:
        raise NotImplementedError(f"the Mosaic kernel needs images in multiples of 8, got {batch}")
    config = heuristic(topology.group_size) if config is None else config
    ids, x = triton_conv.slot_places(topology, window).reshape(-1), x.reshape(-1, batch)
    return mosaic_gpu.call(matrix, ids, x, bias, addend, activation=activation, config=config, window=window)


def forward_two_four(matrix, x, bias, **kwargs):
    """Raises NotImplementedError: this backend has no kernel for 2:4."""
    raise NotImplementedError("the Mosaic kernel does no 2:4")


def heuristic(group_size: int):
    """The config for a group size; measured, see docs/kernels.md."""
    config = mosaic_gpu.heuristic(group_size, mosaic_gpu.FEWEST_TOKENS)
    return dataclasses.replace(config, ahead=2) if group_size == 64 else config


def pays(matrix, x, window) -> bool:
    """Whether there is a tile for every other multiprocessor; with fewer, Triton's smaller tiles keep more busy."""
    try:
        tokens = window.positions * x.shape[-1]
        tiles = matrix.topology.num_groups * -(-tokens // heuristic(matrix.topology.group_size).block_tokens)
        return 2 * tiles >= mosaic_gpu.multiprocessors()
    except NotImplementedError:
        return False
