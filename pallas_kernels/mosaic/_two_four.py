"""Products of packed 2:4 matrices on Hopper's sparse tensor cores: the Mosaic backend's half for the packed form."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _two_four as two_four
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._pairs import wide_pairs
from pallas_kernels.mosaic import _support as hopper
from pallas_kernels.triton import _matmul as triton
from pallas_kernels.triton import _tiles as triton_tiles

FEW_TOKENS = 64
"""Up to so many the product is bound by reading the weights, and one tile takes all tokens."""

grad_values_two_four = triton.grad_values_two_four


def prepare_two_four(matrix: RowGrouped) -> RowGrouped:
    """Arranges the packed matrix as for Triton, whose wide pairs the sparse tensor cores read too.

    Raises:
        NotImplementedError: a group size or dtype the kernel does not support.
    """
    hopper.check(matrix.topology, matrix.dtype)
    prepared = two_four.call(triton, "prepare", matrix)
    if prepared.values.ndim > 2:
        return prepared
    sentinels = bool((np.asarray(prepared.topology.columns) == prepared.topology.k).any())
    return RowGrouped(prepared.values, dataclasses.replace(prepared.topology, sentinels=sentinels))


def forward_two_four(matrix, x, bias, *, activation, layout, precision, config=None):
    """Computes activation(W x + bias) for a packed W; see `matmul`, here 2-D.

    Args:
        matrix: prepared, or canonical with equal counts that are a multiple of 64.
        x: (N, K) token-major or (K, N) feature-major, bfloat16 or float16.
        bias: (M,) or None.
        activation: see `matmul`.
        layout: see `matmul`.
        precision: ignored: products of two-byte numbers are exact in the float32 sums.
        config: a `_forward.Config`; None takes the heuristic's.

    Raises:
        NotImplementedError: the matrix, the GPU or the version of JAX is not supported by the kernel.
    """
    del precision
    topology = matrix.topology
    hopper.check(topology, x.dtype)
    if layout == "token_major":
        x = x.T
    n = x.shape[1]
    kernel = hopper.kernel()
    config = heuristic(topology, n) if config is None else config
    used = config.shared_memory(topology.group_size, packed=True)
    if used > kernel.SHARED_MEMORY:
        raise NotImplementedError(f"{config} takes {used} bytes of shared memory")
    if n == 0 or config.block_k % kernel.BLOCK_K or not triton_tiles.is_aligned(topology, config.block_k):
        raise NotImplementedError(f"the Mosaic kernel takes tokens, and steps of {kernel.BLOCK_K} slots: `prepare`")
    product = functools.partial(
        kernel.product,
        m=topology.m,
        n=n,
        segments=topology.known_segments,
        activation=activation,
        config=config,
        multiprocessors=hopper.multiprocessors(),
        sentinels=topology.sentinels,
    )
    x = jnp.pad(x, ((0, 0), (0, -n % triton_tiles.VECTOR)))
    args = (matrix.values, topology.columns, topology.rows, x, wide_pairs(topology.pairs))
    args += () if bias is None else (bias,)
    # Slices of a batch run one after the other: each fills the GPU.
    y = jax.custom_batching.sequential_vmap(
        lambda values, columns, rows, x, pairs, bias=None: product(values, columns, rows, x, bias, pairs)
    )(*args)
    return y.T if layout == "token_major" else y


def heuristic(topology, tokens: int):
    """The config for a matrix and a number of tokens."""
    config, v = hopper.kernel().Config, topology.group_size
    if tokens <= FEW_TOKENS and v > 64:
        # Few tokens: what a step costs beside its bytes is shared by as many slots as segments allow.
        width = max(16, 1 << (tokens - 1).bit_length())
        return _deepest(topology, config(block_tokens=width, split="rows", block_k=128 if width == 64 else 256))
    if v == 64:
        return config(block_tokens=512, stages=3, split="tokens")
    narrow = config(block_tokens=128, stages=6, split="rows")
    if v == 256:
        return narrow
    # Half a tile takes more than half of the time: worth it only where whole ones leave multiprocessors idle.
    whole, half = (-(-topology.num_groups * -(-tokens // width) // hopper.multiprocessors()) for width in (256, 128))
    return narrow if half < 1.6 * whole else config(block_tokens=256, stages=5, split="rows", registers=(208, 88))


def _deepest(topology, config):
    """The config with steps that divide the segments, and as deep a ring as fits."""
    lengths = [slots for _, slots in topology.known_segments or ()]
    config = dataclasses.replace(config, block_k=math.gcd(config.block_k, *lengths))
    rings = (dataclasses.replace(config, stages=stages) for stages in range(12, 1, -1))
    room = hopper.kernel().SHARED_MEMORY
    return next(c for c in rings if c.shared_memory(topology.group_size, packed=True) <= room)


def pays(matrix, x, layout) -> bool:
    """Whether the kernel beats Triton's: always, but for few tokens in groups of 64, whose tiles are too wide."""
    n = x.shape[0 if layout == "token_major" else 1]
    return matrix.topology.group_size > 64 or n > 128
