"""Row-grouped products and dValues as Pallas-Mosaic kernels for Hopper GPUs; everything else is Triton's."""

import functools
from typing import Any

import jax
from jax import lax

from pallas_kernels import _devices as devices
from pallas_kernels import _tables as tables
from pallas_kernels._matrix import RowGrouped, Topology
from pallas_kernels._tables import FEW_TOKENS, Problem
from pallas_kernels.mosaic import _support as hopper
from pallas_kernels.mosaic import _two_four as mosaic_gpu_two_four
from pallas_kernels.mosaic._two_four import forward_two_four as forward_two_four
from pallas_kernels.mosaic._two_four import grad_values_two_four as grad_values_two_four
from pallas_kernels.mosaic._two_four import prepare_two_four as prepare_two_four
from pallas_kernels.triton import _matmul as triton
from pallas_kernels.triton import _tiles as triton_tiles

MULTIPROCESSORS = 132  # of an H100 and an H200
BUSY = 0.9  # of them with a tile are enough
KERNELS: dict[str, str] = {"forward": "_forward", "grad_values": "_grad"}
ADDS = True  # `forward` takes an addend

grad_input = triton.grad_input


def prepare(matrix):
    """Arranges the matrix as for Triton: segments padded to whole steps, groups sorted, heaviest first.

    Raises:
        NotImplementedError: a group size or dtype the kernel does not support.
    """
    hopper.check(matrix.topology, matrix.dtype)
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
        config: a `_forward.Config`; None takes the `tuned` one.

    Raises:
        NotImplementedError: the kernel does not support the matrix, the tokens, the GPU or the version of JAX.
    """
    del precision
    hopper.check(matrix.topology, x.dtype)
    if layout == "token_major":
        x, addend = x.T, None if addend is None else addend.T
    n = x.shape[1]
    if n <= FEW_TOKENS or n % triton_tiles.VECTOR:
        raise NotImplementedError(f"the Mosaic kernel needs more than {FEW_TOKENS} tokens, in multiples of 8, got {n}")
    if config is None:
        config = tuned(triton_tiles.problem("forward", matrix.topology, x), devices.kind())
    y = call(matrix, matrix.topology.columns, x, bias, addend, activation=activation, config=config)
    return y.T if layout == "token_major" else y


def call(matrix, ids, x, bias, addend, *, activation, config, window=None):
    """Calls the kernel on the arguments of `_forward.product`.

    Raises:
        NotImplementedError: the config, the matrix, the GPU or the version of JAX is not supported by the kernel.
    """
    topology, kernel = matrix.topology, hopper.kernel()
    used = config.shared_memory(topology.group_size, id_words=ids.size // topology.num_slots)
    if used > kernel.SHARED_MEMORY:
        raise NotImplementedError(f"{config} takes {used} bytes of shared memory")
    if not triton_tiles.is_aligned(topology, kernel.BLOCK_K):
        raise NotImplementedError(f"the Mosaic kernel takes steps of {kernel.BLOCK_K} slots: `prepare` the matrix")
    product = functools.partial(
        kernel.product,
        m=topology.m,
        n=x.shape[1] if window is None else window.output_pixels * x.shape[1],
        segments=topology.known_segments,
        activation=activation,
        config=config,
        multiprocessors=hopper.multiprocessors(),
        window=window,
    )
    args = (matrix.values, ids, topology.rows, x)
    optional = {name: a for name, a in (("bias", bias), ("addend", addend)) if a is not None}
    # Slices of a batch run one after the other: each fills the GPU.
    return jax.custom_batching.sequential_vmap(lambda args, optional: product(*args, **({"bias": None} | optional)))(
        args, optional
    )


def grad_values(
    topology: Topology, x: jax.Array, dy: jax.Array, *, layout: str, precision: lax.PrecisionLike, config: Any = None
) -> jax.Array:
    """Computes dValues (P, V); see `matmul`. Triton's kernel does what this one cannot, or not faster.

    Args:
        topology: canonical with equal counts and no sentinel rows, for the kernel of this module.
        x: activations in the given layout; N a multiple of 64.
        dy: the gradient of the output.
        layout: see `matmul`.
        precision: ignored, as in `forward`.
        config: a `_grad.Config`; None takes the `tuned` one where this kernel is faster.

    Raises:
        NotImplementedError: a config is given for a matrix that the kernel cannot do.
    """
    if layout == "token_major":
        x, dy = x.T, dy.T
    problem = triton_tiles.problem("grad_values", topology, x)
    if config is None:
        config = _config_of_values(topology, problem)
    if config is None:
        return triton.grad_values(topology, x, dy, layout="feature_major", precision=precision)
    if not _has_whole_groups(topology):
        raise NotImplementedError("the Mosaic kernel for dValues takes equal counts without padding, and whole groups")
    product = functools.partial(
        hopper.kernel("_grad").product,
        count=topology.max_count,
        group_size=topology.group_size,
        config=config,
        multiprocessors=hopper.multiprocessors(),
    )
    # Slices of a batch run one after the other: each fills the GPU.
    return jax.custom_batching.sequential_vmap(lambda *args: product(*args))(
        topology.columns, topology.rows, x, dy.astype(x.dtype)
    )


def _config_of_values(topology: Topology, problem: Problem) -> Any:
    """The config for dValues, None where Triton's kernel has to be taken or is faster."""
    try:
        hopper.check(topology, problem.dtype)
        count, device = hopper.multiprocessors(), devices.kind()
    except NotImplementedError:
        return None
    if not _has_whole_groups(topology) or not can(problem):
        return None
    return tuned(problem, device) if is_faster(problem, device, count) else None


def _has_whole_groups(topology: Topology) -> bool:
    """Whether no slot is padding and no row a sentinel, with as many slots in every group."""
    whole = topology.num_groups * topology.group_size == topology.m
    return topology.counts is None and topology.equal_counts and whole


def heuristic(group_size: int, tokens: int):
    """The config for a group size and a number of tokens."""
    kernel = hopper.kernel()
    if group_size == 256:
        return kernel.Config(block_tokens=128, split="rows", band=4)
    if group_size == 128:
        return kernel.Config(block_tokens=256, split="rows", band=4)
    if tokens % 512 == 0:
        return kernel.Config(block_tokens=512, stages=3, split="tokens")
    return kernel.Config(block_tokens=256, stages=5, split="tokens")


def tuned(problem: Problem, device: str | None) -> Any:
    """The config to use: the nearest measured one of the device, else the heuristic's."""
    entry = tables.nearest_product(device, "mosaic_gpu", problem)
    if entry is None:
        return search_space(problem)[0]
    fields = entry["config"] | {"registers": tuple(entry["config"]["registers"])}
    return hopper.kernel(KERNELS[problem.op]).Config(**fields)


def can(problem: Problem) -> bool:
    """Whether this version of JAX has a kernel for a problem, on a Hopper GPU and for a matrix that fits it."""
    try:
        hopper.kernel()
    except NotImplementedError:
        return False
    step = {"forward": triton_tiles.VECTOR, "grad_values": 64}.get(problem.op)
    whole = step is not None and not problem.few_tokens and problem.n % step == 0
    return whole and problem.group_size in hopper.GROUP_SIZES and problem.itemsize == 2 and problem.slots > 0


def search_space(problem: Problem) -> tuple[Any, ...]:
    """The configs a tuner measures for a problem, the heuristic's first; none for what the kernels cannot do."""
    if not can(problem):
        return ()
    kernel, v = hopper.kernel(KERNELS[problem.op]), problem.group_size
    if problem.op == "grad_values":
        shapes = {64: [(512, 3), (256, 5), (128, 8)], 128: [(256, 4), (128, 6)], 256: [(128, 4)]}[v]
        found = [kernel.Config(block_slots=slots, stages=stages) for slots, stages in shapes]
        found.sort(key=lambda c: _tiles(problem, c) < MULTIPROCESSORS)  # large tiles, if there are enough of them
        return tuple(found)
    shapes = {
        64: [(512, 3, "tokens", 1), (512, 3, "tokens", 4), (256, 5, "tokens", 4)],
        128: [(256, 4, "rows", 1), (256, 4, "rows", 4), (128, 6, "rows", 4)],
        256: [(128, 4, "rows", 1), (128, 4, "rows", 4)],
    }[v]
    found = [heuristic(v, problem.n)] + [
        kernel.Config(block_tokens=tokens, stages=stages, split=split, band=band)
        for tokens, stages, split, band in shapes
    ]
    return tuple(dict.fromkeys(found))


def _tiles(problem: Problem, config: Any) -> int:
    """How many tiles a problem has."""
    groups = -(-problem.m // problem.group_size)
    if problem.op == "grad_values":
        return groups * -(-problem.slots // groups // config.block_slots)
    return groups * -(-problem.n // config.block_tokens)


def pays(matrix: RowGrouped, x: jax.Array, layout: str) -> bool:
    """Whether a kernel here is faster than Triton's for a product; see `is_faster`."""
    if matrix.topology.pairs is not None:
        return mosaic_gpu_two_four.pays(matrix, x, layout)
    n = x.shape[0 if layout == "token_major" else 1]
    x_shape = jax.ShapeDtypeStruct((matrix.topology.k, n), x.dtype)
    problem = triton_tiles.problem("forward", matrix.topology, x_shape)
    try:
        return can(problem) and is_faster(problem, devices.kind(), hopper.multiprocessors())
    except NotImplementedError:
        return False


def is_faster(problem: Problem, device: str | None, count: int = MULTIPROCESSORS) -> bool:
    """Whether a kernel here was faster than Triton's for the nearest problem that the device's table knows of both.

    Elsewhere, whether there is a tile for (nearly) every multiprocessor: with fewer, Triton's smaller tiles keep more
    of them busy.
    """
    entry = tables.nearest_product(device, "mosaic_gpu", problem)
    if entry is not None:
        return entry["time_us"] < entry["triton_time_us"]
    return _tiles(problem, search_space(problem)[0]) >= BUSY * count
