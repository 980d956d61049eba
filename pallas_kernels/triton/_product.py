"""What the Triton kernels for products share: how tiles are dealt to programs, the walk over a group, the epilogue.

A program of a forward kernel computes one tile: the rows of a group (or a part of them) times some tokens. It walks
over the group's slots in steps of `block_k`, and what a step loads and multiplies is the kernel's own. Rows of the
result are written where the row permutation says. A program of a kernel for dValues computes some slots of a group
times all of its rows, over the tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels._activations import ACTIVATIONS, GELU
from pallas_kernels._layout import MatrixLayout
from pallas_kernels.gpu._layout import is_aligned, static_length
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import call, contract, load_tile, loop, split_steps, store_tile

# The exact functions cost a quarter of the whole product at 75%; these err by less than two-byte outputs round.
FAST_ACTIVATIONS = ACTIVATIONS | {
    "gelu": lambda y: 0.5 * y * (1 + plgpu.approx_tanh(y * (GELU[0] + GELU[1] * y * y))),
    "silu": lambda y: 0.5 * y * (1 + plgpu.approx_tanh(0.5 * y)),
}


class Tile(NamedTuple):
    """The tile of a forward program.

    Attributes:
        begin: the first slot of its group.
        end: the slot behind the last one.
        block_k: slots of a step.
        masked: whether the last step may reach behind `end`.
        lanes: which of the group's rows it computes.
        tokens: which tokens.
        live_tokens: which of them exist; None: all.
        interpret: whether the kernel is interpreted.
    """

    begin: Any
    end: Any
    block_k: int
    masked: bool
    lanes: jax.Array
    tokens: jax.Array
    live_tokens: jax.Array | None
    interpret: bool

    def slots(self, step: Any) -> tuple[jax.Array, jax.Array | None]:
        """The slots of a step, and which of them are the group's own (None: all)."""
        slots = self.begin + step * self.block_k + jnp.arange(self.block_k)
        return slots, slots < self.end if self.masked else None


Walk = Callable[[Tile, Any], tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any]]]
"""(tile, references to the operands) -> (step -> the indices it needs, (step, indices, sum) -> the sum with it)."""


def forward(
    walk: Walk, layout: MatrixLayout, operands: Any, bias: jax.Array | None, n: int,
    *, dtype: DTypeLike, activation: str | None, config: Config, name: str,
) -> jax.Array:  # fmt: skip
    """Runs a forward kernel: (M, N) of the dtype. `operands` is a tree of arrays."""
    c, groups, v, m = config, layout.num_groups, layout.group_size, layout.m
    block_rows = min(c.block_rows, v)
    length, masked = static_length(layout, c.block_k), not is_aligned(layout, c.block_k)
    parts, tiles = groups * (v // block_rows), pl.cdiv(n, c.block_tokens)

    def kernel(operands: Any, ptr_ref: Any, rows_ref: Any, bias_ref: Any, y_ref: Any, *, interpret: bool) -> None:
        program = pl.program_id(0)
        if c.tokens_first:
            part, tile = lax.div(program, tiles), lax.rem(program, tiles)
        else:
            part, tile = lax.rem(program, parts), lax.div(program, parts)
        group, first_row = lax.div(part, v // block_rows), lax.rem(part, v // block_rows) * block_rows
        lanes, tokens = first_row + jnp.arange(block_rows), tile * c.block_tokens + jnp.arange(c.block_tokens)
        rows = plgpu.load(rows_ref.at[group * v + lanes]) if c.early_rows else None
        if length is None:
            begin, end = ptr_ref[group], ptr_ref[group + 1]
            if not masked:
                begin = pl.multiple_of(begin, c.block_k)
            steps = pl.cdiv(end - begin, c.block_k)
        else:
            begin, end, steps = group * length, (group + 1) * length, length // c.block_k
        first, last = split_steps(steps, c.split)
        live_tokens = tokens < n if n % c.block_tokens else None
        here = Tile(begin, end, c.block_k, masked, lanes, tokens, live_tokens, interpret)
        shape = (c.block_tokens, block_rows) if c.flip else (block_rows, c.block_tokens)
        acc = loop(first, last, *walk(here, operands), jnp.zeros(shape, jnp.float32), prefetch=c.prefetch)
        rows = plgpu.load(rows_ref.at[group * v + lanes]) if rows is None else rows
        y = acc.T if c.flip else acc
        if c.split > 1:
            store_tile(y_ref, rows, tokens, y, rows < m, live_tokens, pl.program_id(1))
            return
        if bias_ref is not None:
            y += plgpu.load(bias_ref.at[rows], mask=rows < m, other=0).astype(jnp.float32)[:, None]
        functions = ACTIVATIONS if interpret or y_ref.dtype == jnp.float32 else FAST_ACTIVATIONS
        y = functions[activation](y).astype(y_ref.dtype)
        # Where every stored row is real (the groups divide M) the store needs no mask.
        store_tile(y_ref, rows, tokens, y, None if groups * v == m else rows < m, live_tokens)

    args = operands, layout.group_ptr, layout.rows, bias
    y = call_split(kernel, (m, n), dtype, parts * tiles, c, args, name)
    if c.split > 1:
        y = y if bias is None else y + bias[:, None].astype(y.dtype)
        y = ACTIVATIONS[activation](y).astype(dtype)
    return y


def product(
    tile: Tile, values_ref: Any, load: Callable[[Any, jax.Array | None], jax.Array],
    *, flip: bool, precision: lax.PrecisionLike,
) -> Callable[[Any, Any, Any], Any]:  # fmt: skip
    """The second half of a `Walk` whose steps multiply (slots, rows) values with what `load(indices, live)` gathers."""

    def multiply(step: Any, indices: Any, acc: jax.Array) -> jax.Array:
        slots, live = tile.slots(step)
        gathered, weights = load(indices, live), load_tile(values_ref, slots, tile.lanes, live, None)
        a, b = (gathered, weights) if flip else (weights, gathered)
        return acc + contract(a, b, (0, 0), precision)

    return multiply


Gather = Callable[[Any, jax.Array, jax.Array | None], Callable[[jax.Array, jax.Array | None], jax.Array]]
"""(references to the operands, slots, live ones) -> (tokens, live ones) -> a tile (slots, tokens) of the right side."""


def grad_values(
    gather: Gather, layout: MatrixLayout, operands: Any, dy: jax.Array,
    *, config: Config, precision: lax.PrecisionLike, name: str,
) -> jax.Array:  # fmt: skip
    """Runs a kernel for dValues: (P, V) of dy's dtype, zero on padding and on sentinel rows.

    Args:
        gather: loads the right side.
        layout: of the matrix.
        operands: what `gather` reads, a tree of arrays.
        dy: (M, N).
        config: of the kernel.
        precision: of the products.
        name: of the kernel.
    """
    c, p, v, m, n = config, layout.num_slots, layout.group_size, layout.m, dy.shape[1]
    exact = layout.counts is None and layout.segments is not None and layout.max_count % c.block_rows == 0
    tiles, real_rows = pl.cdiv(layout.max_count, c.block_rows), layout.num_groups * v == m

    def kernel(
        operands: Any, ptr_ref: Any, counts_ref: Any, rows_ref: Any, dy_ref: Any, d_ref: Any, *, interpret: bool
    ) -> None:
        del interpret
        program = pl.program_id(0)
        group, tile = lax.div(program, tiles), lax.rem(program, tiles)
        begin, end, count = ptr_ref[group], ptr_ref[group + 1], counts_ref[group]
        local = tile * c.block_rows + jnp.arange(c.block_rows)
        slots, lanes = begin + local, jnp.arange(v)
        load = gather(operands, slots, None if exact else local < count)
        rows = rows_ref[group * v + lanes]
        live_rows = None if real_rows else rows < m
        first, last = split_steps(pl.cdiv(n, c.block_tokens), c.split)
        if not exact:  # tiles behind the end of a shorter segment have nothing to do
            last = jnp.where(tile * c.block_rows < count, jnp.int32(last), jnp.int32(first))

        def body(step: jax.Array, acc: jax.Array) -> jax.Array:
            tokens = step * c.block_tokens + jnp.arange(c.block_tokens)
            live_tokens = tokens < n if n % c.block_tokens else None
            dys = load_tile(dy_ref, rows, tokens, live_rows, live_tokens)
            return acc + contract(load(tokens, live_tokens), dys, (1, 1), precision)

        acc = lax.fori_loop(first, last, body, jnp.zeros((c.block_rows, v), jnp.float32))
        leading = (pl.program_id(1),) if c.split > 1 else ()
        # Padding slots are written too: their masked rows of x made them zero.
        store_tile(d_ref, slots, lanes, acc.astype(d_ref.dtype), None if exact else slots < end, None, *leading)

    args = operands, layout.group_ptr, layout.real_counts, layout.rows, dy
    d = call_split(kernel, (p, v), dy.dtype, layout.num_groups * tiles, c, args, name).astype(dy.dtype)
    if layout.segments is None:  # slots behind the last group, which no program writes
        d = jnp.where((jnp.arange(p) < layout.group_ptr[-1])[:, None], d, 0)
    return d


def call_split(
    kernel: Callable[..., None], shape: tuple[int, int], dtype: DTypeLike, programs: int, config: Config,
    args: Sequence[Any], name: str,
) -> jax.Array:  # fmt: skip
    """Calls a kernel; where its contraction is split, sums the float32 partials of the pieces."""
    if config.split == 1:
        return call(kernel, jax.ShapeDtypeStruct(shape, dtype), (programs,), config, *args, name=name)
    partials = jax.ShapeDtypeStruct((config.split, *shape), jnp.float32)
    return call(kernel, partials, (programs, config.split), config, *args, name=name).sum(0)
