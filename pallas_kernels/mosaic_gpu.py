"""Row-grouped products as a Pallas-Mosaic kernel for Hopper GPUs; derivatives and everything else are Triton's."""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels import triton, triton_tiles

GROUP_SIZES = (64, 128, 256)
FEWEST_TOKENS = 257  # with fewer, most of a tile would be padding
ADDS = True  # `forward` takes an addend
HOPPER = ("H100", "H20", "H800")  # what the names of these GPUs hold: GH200 and H200 too

grad_input = triton.grad_input
grad_values = triton.grad_values
grad_values_two_four = triton.grad_values_two_four


def prepare(matrix):
    """Arranges the matrix as for Triton: segments padded to whole steps, groups sorted, heaviest first.

    Raises:
        NotImplementedError: a group size or dtype the kernel does not do.
    """
    check(matrix.topology, matrix.dtype)
    return triton.prepare(matrix)


def forward(matrix, x, bias, *, activation, layout, precision, addend=None, config=None):
    """Computes activation(W x + bias + addend) for W in the arrangement of `prepare`; see `matmul`, here 2-D.

    Args:
        matrix: prepared, or canonical with equal counts that are a multiple of 64.
        x: (N, K) token-major or (K, N) feature-major, bfloat16 or float16; N a multiple of 8 and above 256.
        bias: (M,) or None.
        activation: see `matmul`.
        layout: see `matmul`.
        precision: ignored: products of two-byte numbers are exact in the float32 sums.
        addend: of the result's shape and x's dtype, or None.
        config: a `mosaic_gpu_forward.Config`; None takes the heuristic's.

    Raises:
        NotImplementedError: the matrix, the number of tokens, the GPU or the version of JAX is none the kernel does.
    """
    del precision
    check(matrix.topology, x.dtype)
    if layout == "token_major":
        x, addend = x.T, None if addend is None else addend.T
    n = x.shape[1]
    if n < FEWEST_TOKENS or n % triton_tiles.VECTOR:
        raise NotImplementedError(f"the Mosaic kernel needs more than 256 tokens, in multiples of 8, got {n}")
    config = heuristic(matrix.topology.group_size, n) if config is None else config
    y = call(matrix, matrix.topology.columns, x, bias, addend, activation=activation, config=config)
    return y.T if layout == "token_major" else y


def call(matrix, ids, x, bias, addend, *, activation, config, window=None):
    """Calls the kernel on the arguments of `mosaic_gpu_forward.product`.

    Raises:
        NotImplementedError: the config, the matrix, the GPU or the version of JAX is none the kernel does.
    """
    topology, kernel = matrix.topology, load_kernel()
    used = config.shared_memory(topology.group_size, ids.size // topology.num_slots)
    if used > kernel.SHARED_MEMORY:
        raise NotImplementedError(f"{config} takes {used} bytes of shared memory")
    if not triton_tiles.is_aligned(topology, kernel.BLOCK_K):
        raise NotImplementedError(f"the Mosaic kernel takes steps of {kernel.BLOCK_K} slots: `prepare` the matrix")
    product = functools.partial(
        kernel.product,
        m=topology.m,
        segments=topology.segments,
        activation=activation,
        config=config,
        multiprocessors=multiprocessors(),
        window=window,
    )
    args = (matrix.values, ids, topology.rows, x)
    optional = {name: a for name, a in (("bias", bias), ("addend", addend)) if a is not None}
    # Slices of a batch run one after the other: each fills the GPU.
    return jax.custom_batching.sequential_vmap(lambda args, optional: product(*args, **({"bias": None} | optional)))(
        args, optional
    )


def forward_two_four(matrix, x, bias, *, activation, layout, precision):
    """Raises NotImplementedError: this backend has no kernel for 2:4."""
    raise NotImplementedError("the Mosaic kernel does no 2:4")


def heuristic(group_size: int, tokens: int):
    """The config for a group size and a number of tokens; measured, see docs/kernels.md."""
    kernel = load_kernel()
    if group_size == 256:
        return kernel.Config(block_tokens=128, split="rows", band=4)
    if group_size == 128:
        return kernel.Config(block_tokens=256, split="rows", band=4)
    if tokens % 512 == 0:
        return kernel.Config(block_tokens=512, stages=3, split="tokens")
    return kernel.Config(block_tokens=256, stages=5, split="tokens")


def pays(matrix, x, layout) -> bool:
    """Whether there is a tile for every multiprocessor; with fewer, Triton's smaller tiles keep more of them busy."""
    try:
        n = x.shape[0 if layout == "token_major" else 1]
        tiles = matrix.topology.num_groups * -(-n // heuristic(matrix.topology.group_size, n).block_tokens)
        return tiles >= multiprocessors()
    except NotImplementedError:
        return False


def load_kernel() -> ModuleType:
    """The kernel's module, imported when it is needed: other versions of JAX may lack what it imports."""
    try:
        return importlib.import_module("pallas_kernels.mosaic_gpu_forward")
    except ImportError as error:
        raise NotImplementedError(f"the Mosaic kernel needs another version of JAX: {error}") from error


def check(topology, dtype) -> None:
    """Raises NotImplementedError for what the kernel cannot do, whatever the tokens and the GPU."""
    triton_tiles.check(topology, dtype)
    if topology.group_size not in GROUP_SIZES:
        raise NotImplementedError(f"the Mosaic kernel needs groups of {GROUP_SIZES} rows, got {topology.group_size}")
    if jnp.dtype(dtype).itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel computes in bfloat16 and float16, got {jnp.dtype(dtype).name}")


def multiprocessors() -> int:
    """How many multiprocessors the Hopper GPU has that is lowered for; NotImplementedError for another or none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind, count = device.device_kind, device.num_cores
    else:
        try:
            gpu = jax.devices("cuda")[0]
        except RuntimeError as error:
            raise NotImplementedError("the Mosaic kernel needs a Hopper GPU") from error
        kind, count = gpu.device_kind, gpu.core_count
    if count is None or not any(name in kind for name in HOPPER):
        raise NotImplementedError(f"the Mosaic kernel needs a Hopper GPU, got {kind}")
    return count
