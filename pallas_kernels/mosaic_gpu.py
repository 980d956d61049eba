"""Row-grouped products as a Pallas-Mosaic kernel for Hopper GPUs; derivatives and everything else are Triton's."""

import functools

import jax

from pallas_kernels import hopper, mosaic_gpu_two_four, triton, triton_tiles
from pallas_kernels.mosaic_gpu_two_four import forward_two_four as forward_two_four
from pallas_kernels.mosaic_gpu_two_four import grad_values_two_four as grad_values_two_four
from pallas_kernels.mosaic_gpu_two_four import prepare_two_four as prepare_two_four

FEWEST_TOKENS = 257  # with fewer, most of a tile would be padding

grad_input = triton.grad_input
grad_values = triton.grad_values


def prepare(matrix):
    """Arranges the matrix as for Triton: segments padded to whole steps, groups sorted, heaviest first.

    Raises:
        NotImplementedError: a group size or dtype the kernel does not do.
    """
    hopper.check(matrix.topology, matrix.dtype)
    return triton.prepare(matrix)


def forward(matrix, x, bias, *, activation, layout, precision, config=None):
    """Computes activation(W x + bias) for W in the arrangement of `prepare`; see `matmul`, here 2-D.

    Args:
        matrix: prepared, or canonical with equal counts that are a multiple of 64.
        x: (N, K) token-major or (K, N) feature-major, bfloat16 or float16; N a multiple of 8 and above 256.
        bias: (M,) or None.
        activation: see `matmul`.
        layout: see `matmul`.
        precision: ignored: products of two-byte numbers are exact in the float32 sums.
        config: a `mosaic_gpu_forward.Config`; None takes the heuristic's.

    Raises:
        NotImplementedError: the matrix, the number of tokens, the GPU or the version of JAX is none the kernel does.
    """
    del precision
    topology = matrix.topology
    hopper.check(topology, x.dtype)
    if layout == "token_major":
        x = x.T
    n = x.shape[1]
    if n < FEWEST_TOKENS or n % triton_tiles.VECTOR:
        raise NotImplementedError(f"the Mosaic kernel needs more than 256 tokens, in multiples of 8, got {n}")
    kernel = hopper.kernel()
    config = heuristic(topology.group_size, n) if config is None else config
    used = config.shared_memory(topology.group_size)
    if used > kernel.SHARED_MEMORY:
        raise NotImplementedError(f"{config} takes {used} bytes of shared memory")
    if not triton_tiles.is_aligned(topology, kernel.BLOCK_K):
        raise NotImplementedError(f"the Mosaic kernel takes steps of {kernel.BLOCK_K} slots: `prepare` the matrix")
    product = functools.partial(
        kernel.product,
        m=topology.m,
        n=n,
        segments=topology.segments,
        activation=activation,
        config=config,
        multiprocessors=hopper.multiprocessors(),
    )
    args = (matrix.values, topology.columns, topology.rows, x) + (() if bias is None else (bias,))
    # Slices of a batch run one after the other: each fills the GPU.
    y = jax.custom_batching.sequential_vmap(
        lambda values, columns, rows, x, bias=None: product(values, columns, rows, x, bias)
    )(*args)
    return y.T if layout == "token_major" else y


def heuristic(group_size: int, tokens: int):
    """The config for a group size and a number of tokens; measured, see docs/kernels.md."""
    kernel = hopper.kernel()
    if group_size == 256:
        return kernel.Config(block_tokens=128, split="rows", band=4)
    if group_size == 128:
        return kernel.Config(block_tokens=256, split="rows", band=4)
    if tokens % 512 == 0:
        return kernel.Config(block_tokens=512, stages=3, split="tokens")
    return kernel.Config(block_tokens=256, stages=5, split="tokens")


def pays(matrix, x, layout) -> bool:
    """Whether there is a tile for every multiprocessor; with fewer, Triton's smaller tiles keep more of them busy."""
    if matrix.topology.pairs is not None:
        return mosaic_gpu_two_four.pays(matrix, x, layout)
    try:
        n = x.shape[0 if layout == "token_major" else 1]
        tiles = matrix.topology.num_groups * -(-n // heuristic(matrix.topology.group_size, n).block_tokens)
        return tiles >= hopper.multiprocessors()
    except NotImplementedError:
        return False
