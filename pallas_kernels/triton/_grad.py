"""Derivatives of the row-grouped product as Pallas-Triton kernels.

dValues is a gathered product on the pattern: the rows of dY a group owns times the rows of x it reads, over the tokens.
dX = W^T dY needs W by columns, which row groups do not give. A table of slots, (R, K), turns the stored values into
dense tiles: on the fly for few tokens, into W itself for many, where the dense product that follows hides the copy.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._layout import MatrixLayout, Prepared
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import call, contract, load_tile, loop, split_steps, store_tile

DECOMPRESS = Config(block_rows=64, num_warps=4, num_stages=1)
TABLE = Config(block_rows=256, num_warps=4, num_stages=1)


def grad_values(
    layout: MatrixLayout, x: jax.Array, dy: jax.Array, *, precision: lax.PrecisionLike, config: Config
) -> jax.Array:
    """Computes dValues (P, V) from feature-major x and dy, zero on padding and on sentinel rows."""

    def gather(refs: tuple[Any, Any], slots: jax.Array, live: jax.Array | None) -> Any:
        columns_ref, x_ref = refs
        columns = plgpu.load(columns_ref.at[slots], mask=live, other=None if live is None else 0)

        def load(tokens: jax.Array, live_tokens: jax.Array | None) -> jax.Array:
            return load_tile(x_ref, columns, tokens, live, live_tokens)

        return load

    return _product.grad_values(
        gather, layout, (layout.columns, x), dy, config=config, precision=precision, name="row_grouped_grad_values"
    )


def slot_table(layout: MatrixLayout) -> jax.Array:
    """(R, K) int32: the slot that holds each input in each group, P where the group does not keep it."""
    p, k, c = layout.num_slots, layout.k, TABLE
    empty = jnp.full((layout.num_groups, k), p, jnp.int32)
    tiles = pl.cdiv(layout.max_count, c.block_rows)

    def kernel(
        columns_ref: Any, ptr_ref: Any, counts_ref: Any, empty_ref: Any, table_ref: Any, *, interpret: bool
    ) -> None:
        del empty_ref, interpret  # the former is the same memory as the table
        group, local = pl.program_id(0), pl.program_id(1) * c.block_rows + jnp.arange(c.block_rows)
        slots, live = ptr_ref[group] + local, local < counts_ref[group]
        columns = plgpu.load(columns_ref.at[slots], mask=live, other=k)
        # A slot of a 2:4 matrix may have no column; stored at its sentinel it would reach the next group's first input.
        live = columns < k
        # Lanes that are masked off point behind the table: the interpreter writes them, and drops what is out of range.
        columns = jnp.where(live, columns, k)
        plgpu.store(table_ref.at[jnp.full_like(columns, group), columns], slots, mask=live)

    args = layout.columns, layout.group_ptr, layout.real_counts, empty
    shape = jax.ShapeDtypeStruct(empty.shape, empty.dtype)
    grid = layout.num_groups, tiles
    return call(kernel, shape, grid, c, *args, name="row_grouped_slot_table", aliases={3: 0})


def grad_input(matrix: Prepared, dy: jax.Array, *, precision: lax.PrecisionLike, config: Config) -> jax.Array:
    """Computes dX = W^T dY, feature-major, without an (M, K) array: for few tokens."""
    layout, n, c, table = matrix.layout, dy.shape[1], config, slot_table(matrix.layout)
    m, k, v, p, groups = layout.m, layout.k, layout.group_size, layout.num_slots, layout.num_groups
    block_k = min(c.block_k, v)
    parts, tiles = v // block_k, pl.cdiv(k, c.block_rows)

    def kernel(values_ref: Any, table_ref: Any, rows_ref: Any, dy_ref: Any, dx_ref: Any, *, interpret: bool) -> None:
        del interpret
        tile, token_tile = lax.rem(pl.program_id(0), tiles), lax.div(pl.program_id(0), tiles)
        inputs = tile * c.block_rows + jnp.arange(c.block_rows)
        tokens = token_tile * c.block_tokens + jnp.arange(c.block_tokens)
        live_inputs = inputs < k if k % c.block_rows else None
        live_tokens = tokens < n if n % c.block_tokens else None

        def load_indices(step: Any) -> tuple[jax.Array, jax.Array]:
            index = table_ref.at[jnp.full_like(inputs, lax.div(step, parts)), inputs]
            slots = plgpu.load(index, mask=live_inputs, other=None if live_inputs is None else p)
            return slots, rows_ref[step * block_k + jnp.arange(block_k)]

        def multiply(step: Any, indices: tuple[jax.Array, jax.Array], acc: jax.Array) -> jax.Array:
            slots, rows = indices
            lanes = lax.rem(step, parts) * block_k + jnp.arange(block_k)
            live_rows = None if groups * v == m else rows < m
            weights = load_tile(values_ref, slots, lanes, slots < p, live_rows)
            dys = load_tile(dy_ref, rows, tokens, live_rows, live_tokens)
            return acc + contract(weights, dys, (1, 0), precision)

        acc = jnp.zeros((c.block_rows, c.block_tokens), jnp.float32)
        first, last = split_steps(groups * parts, c.split)
        acc = loop(first, last, load_indices, multiply, acc, prefetch=c.prefetch)
        leading = (pl.program_id(1),) if c.split > 1 else ()
        store_tile(dx_ref, inputs, tokens, acc.astype(dx_ref.dtype), live_inputs, live_tokens, *leading)

    args = matrix.values, table, layout.rows, dy
    programs = tiles * pl.cdiv(n, c.block_tokens)
    return _product.call_split(kernel, (k, n), dy.dtype, programs, c, args, "row_grouped_grad_input").astype(dy.dtype)


def decompress(matrix: Prepared) -> jax.Array:
    """`to_dense` as a kernel: (M, K)."""
    layout, c, table = matrix.layout, DECOMPRESS, slot_table(matrix.layout)
    m, k, v, p = layout.m, layout.k, layout.group_size, layout.num_slots

    def kernel(values_ref: Any, table_ref: Any, rows_ref: Any, w_ref: Any, *, interpret: bool) -> None:
        del interpret
        group = pl.program_id(0)
        inputs, lanes = pl.program_id(1) * c.block_rows + jnp.arange(c.block_rows), jnp.arange(v)
        live_inputs = inputs < k if k % c.block_rows else None
        index = table_ref.at[jnp.full_like(inputs, group), inputs]
        slots = plgpu.load(index, mask=live_inputs, other=None if live_inputs is None else p)
        weights = load_tile(values_ref, slots, lanes, slots < p, None)
        rows = rows_ref[group * v + lanes]
        store_tile(w_ref, rows, inputs, weights.T, rows < m, live_inputs)

    grid = layout.num_groups, pl.cdiv(k, c.block_rows)
    shape = jax.ShapeDtypeStruct((m, k), matrix.dtype)
    return call(kernel, shape, grid, c, matrix.values, table, layout.rows, name="row_grouped_decompress")
