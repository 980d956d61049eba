"""What the Pallas-Triton kernels share: loads and stores of tiles, loops over steps, the call itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton._configs import Config


def call(
    kernel: Callable[..., None], out_shape: Any, grid: tuple[int, ...], config: Config, *args: Any,
    name: str, aliases: dict[int, int] | None = None,
) -> Any:  # fmt: skip
    """Calls a kernel on trees of arrays, compiled on CUDA and interpreted elsewhere.

    The kernel is told which by its argument `interpret`.
    """

    def run(*args: Any, interpret: bool) -> Any:
        run_kernel = pl.pallas_call(
            functools.partial(kernel, interpret=interpret),
            out_shape=out_shape,
            grid=grid,
            interpret=interpret,
            input_output_aliases=aliases or {},
            name=name,
            compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        )
        # Index arithmetic of 32 bits, whatever the user's default: program ids have them.
        with jax.enable_x64(False):
            return run_kernel(*args)

    return lax.platform_dependent(
        *args, cuda=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True)
    )


def split_steps(steps: Any, split: int) -> tuple[Any, Any]:
    """The first and the last step (exclusive) of this program, where a contraction is cut into `split` pieces."""
    if split == 1:
        return 0, steps
    piece = pl.cdiv(steps, split)
    first = pl.program_id(1) * piece
    return first, jnp.minimum(first + piece, steps)


def loop(
    first: Any,
    last: Any,
    load_indices: Callable[[Any], Any],
    multiply: Callable[[Any, Any, Any], Any],
    acc: jax.Array,
    *,
    prefetch: bool,
) -> jax.Array:
    """Accumulates `multiply(step, load_indices(step), acc)`, the indices loaded in the step or carried into it."""

    def in_step(step: jax.Array, acc: jax.Array) -> jax.Array:
        return multiply(step, load_indices(step), acc)

    def body(step: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        indices, acc = carry
        return load_indices(jnp.maximum(jnp.minimum(step + 1, last - 1), 0)), multiply(step, indices, acc)

    if not prefetch:
        return lax.fori_loop(first, last, in_step, acc)
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


def _mask(
    rows: jax.Array, columns: jax.Array, live_rows: jax.Array | None, live_columns: jax.Array | None
) -> jax.Array | None:
    masks = [None if live_rows is None else live_rows[:, None], None if live_columns is None else live_columns[None, :]]
    masks = [jnp.broadcast_to(mask, (rows.size, columns.size)) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None
