"""What the Pallas-Triton kernels share: loads and stores of tiles, loops over steps, the call itself."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels import _devices as devices
from pallas_kernels._matrix import Topology
from pallas_kernels._tables import Op, Problem
from pallas_kernels.triton._configs import Config

DTYPES = ("bfloat16", "float16", "float32")
VECTOR = 8  # tokens in a 16-byte load of two-byte activations: rows of x must be multiples of it


def check(topology: Topology, dtype: DTypeLike) -> None:
    """Raises NotImplementedError for what the kernels cannot do."""
    v = topology.group_size
    if v < 16 or v & (v - 1):
        raise NotImplementedError(f"the Triton kernels need groups of 16, 32, 64, ... rows, got {v}")
    if jnp.dtype(dtype).name not in DTYPES:
        raise NotImplementedError(f"the Triton kernels compute in {', '.join(DTYPES)}, got {jnp.dtype(dtype).name}")
    if getattr(topology, "inverse_rows", None) is not None or getattr(topology, "k_contiguous", False):
        raise NotImplementedError("this matrix was prepared for another implementation")
    if topology.num_slots == 0:
        raise NotImplementedError("the Triton kernels need at least one slot")
    kind = devices.kind()
    if kind is not None and not lowers_for(kind):
        raise NotImplementedError(f"this version of JAX compiles no Triton kernels for {kind}")


def problem(op: Op, topology: Topology, x: jax.Array | jax.ShapeDtypeStruct) -> Problem:
    """The key under which a product's config is looked up; x is feature-major."""
    dtype, segments = jnp.dtype(x.dtype).name, topology.known_segments
    equal = segments is not None and len(segments) == 1
    slots, v = topology.num_slots, topology.group_size
    return Problem(op, topology.m, topology.k, x.shape[1], slots, v, dtype, equal)


@functools.cache
def lowers_for(kind: str) -> bool:
    """Whether Pallas knows a kind of GPU; it raises RuntimeError, at lowering, for those it has no numbers of."""
    device = jax.sharding.AbstractDevice(kind, 1, "gpu")
    kernel = pl.pallas_call(_copy, jax.ShapeDtypeStruct((16,), jnp.float32), compiler_params=plgpu.CompilerParams())
    mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    with mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the backend is deprecated is said where it is used
        traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((16,), jnp.float32))
        try:
            traced.lower(lowering_platforms=("cuda",))
        except RuntimeError:
            return False
    return True


def _copy(x_ref, y_ref):
    y_ref[...] = x_ref[...]


def pad_tokens(x: jax.Array) -> jax.Array:
    """Pads the tokens of feature-major x, unless it is one, so that its rows can be loaded 16 bytes at a time."""
    n = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, -n % VECTOR))) if n > 1 and n % VECTOR else x


def call(
    kernel: Callable, out_shape: Any, grid: tuple[int, ...], config: Config, *args: jax.Array,
    name: str, aliases: dict[int, int] | None = None,
) -> Any:  # fmt: skip
    """Calls a kernel, compiled on CUDA and interpreted elsewhere; the kernel is told by its argument `interpret`."""

    def run(*args, interpret):
        return pl.pallas_call(
            functools.partial(kernel, interpret=interpret),
            out_shape=out_shape,
            grid=grid,
            interpret=interpret,
            input_output_aliases=aliases or {},
            name=name,
            compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        )(*args)

    return lax.platform_dependent(
        *args, cuda=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True)
    )


def static_length(topology: Topology, block_k: int) -> int | None:
    """The length of all segments, where it is one, known when tracing and a multiple of a step."""
    segments = topology.known_segments
    if segments is not None and len(segments) == 1 and segments[0][1] % block_k == 0:
        return segments[0][1]
    return None


def is_aligned(topology: Topology, block_k: int) -> bool:
    """Whether every segment is known to be a multiple of a step, so that no load needs a mask."""
    segments = topology.known_segments
    return segments is not None and all(length % block_k == 0 for _, length in segments)


def split_steps(steps: Any, split: int) -> tuple[Any, Any]:
    """The first and the last step (exclusive) of this program, where a contraction is cut into `split` pieces."""
    if split == 1:
        return 0, steps
    piece = pl.cdiv(steps, split)
    first = pl.program_id(1) * piece
    return first, jnp.minimum(first + piece, steps)


def loop(
    first: Any, last: Any, load_indices: Callable, multiply: Callable, acc: jax.Array, *, prefetch: bool
) -> jax.Array:
    """Accumulates `multiply(step, load_indices(step), acc)`, the indices loaded in the step or carried into it."""
    if not prefetch:
        return lax.fori_loop(first, last, lambda step, acc: multiply(step, load_indices(step), acc), acc)

    def body(step, carry):
        indices, acc = carry
        return load_indices(jnp.maximum(jnp.minimum(step + 1, last - 1), 0)), multiply(step, indices, acc)

    return lax.fori_loop(first, last, body, (load_indices(first), acc))[1]


def load_tile(
    ref: Any, rows: jax.Array, columns: jax.Array, live_rows: jax.Array | None, live_columns: jax.Array | None
) -> jax.Array:
    """Loads ref[rows, columns] as a tile, zeros where one of the masks (None: everything) is false."""
    index = ref.at[rows[:, None], columns[None, :]]
    mask = _mask(rows, columns, live_rows, live_columns)
    return plgpu.load(index) if mask is None else plgpu.load(index, mask=mask, other=0)


def store_tile(
    ref: Any, rows: jax.Array, columns: jax.Array, tile: jax.Array,
    live_rows: jax.Array | None, live_columns: jax.Array | None, *leading: Any,
) -> None:  # fmt: skip
    """Stores a tile to ref[*leading, rows, columns] where the masks are true."""
    index = ref.at[(*leading, rows[:, None], columns[None, :])]
    plgpu.store(index, tile, mask=_mask(rows, columns, live_rows, live_columns))


def contract(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: lax.PrecisionLike) -> jax.Array:
    """The product of two tiles over one axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _mask(rows, columns, live_rows, live_columns):
    masks = [None if live_rows is None else live_rows[:, None], None if live_columns is None else live_columns[None, :]]
    masks = [jnp.broadcast_to(mask, (rows.size, columns.size)) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None
