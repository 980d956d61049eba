"""Derivatives of the row-grouped product as Pallas-Triton kernels.

dValues is a gathered product on the pattern: the rows of dY a group owns times the rows of x it reads, over the tokens.
dX = W^T dY needs W by columns, which row groups do not give. A table of slots, (R, K), turns the stored values into
dense tiles: on the fly for few tokens, into W itself for many, where the dense product that follows hides the copy.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _devices as devices
from pallas_kernels._matrix import RowGrouped, Topology
from pallas_kernels._tables import FEW_TOKENS
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import (
    call,
    check,
    contract,
    load_tile,
    loop,
    pad_tokens,
    problem,
    split_steps,
    store_tile,
)

DECOMPRESS = Config(block_rows=64, num_warps=4, num_stages=1)
TABLE = Config(block_rows=256, num_warps=4, num_stages=1)


def grad_values(
    topology: Topology, x: jax.Array, dy: jax.Array, *, layout: str, precision: lax.PrecisionLike,
    config: Config | None = None,
) -> jax.Array:  # fmt: skip
    """Computes dValues (P, V), zero on padding and on sentinel rows; see `matmul`.

    Raises:
        NotImplementedError: a group size or dtype not supported by the kernel.
    """
    check(topology, x.dtype)
    if layout == "token_major":
        x, dy = x.T, dy.T
    if x.shape[1] == 0:
        return jnp.zeros((topology.num_slots, topology.group_size), x.dtype)
    x, dy = pad_tokens(x), pad_tokens(dy.astype(x.dtype))
    if config is None:
        config = configs.config(problem("grad_values", topology, x), devices.kind())

    def gather(refs, slots, live):
        columns_ref, x_ref = refs
        columns = plgpu.load(columns_ref.at[slots], mask=live, other=None if live is None else 0)
        return lambda tokens, live_tokens: load_tile(x_ref, columns, tokens, live, live_tokens)

    return _product.grad_values(
        gather, topology, (topology.columns, x), dy, config=config, precision=precision, name="row_grouped_grad_values"
    )


def grad_input(
    matrix: RowGrouped, dy: jax.Array, *, layout: str, precision: lax.PrecisionLike, config: Config | None = None
) -> jax.Array:
    """Computes dX = W^T dY; see `matmul`. No (M, K) array is made for up to `FEW_TOKENS` tokens.

    Raises:
        NotImplementedError: a group size or dtype not supported by the kernel.
    """
    topology = matrix.topology
    check(topology, dy.dtype)
    n = dy.shape[0 if layout == "token_major" else 1]
    if n == 0:
        return jnp.zeros((0, topology.k) if layout == "token_major" else (topology.k, 0), dy.dtype)
    table = slot_table(topology)
    if n > FEW_TOKENS:
        weight = decompress(matrix, table)
        axes = ((1,), (0,)) if layout == "token_major" else ((0,), (0,))
        operands = (dy, weight) if layout == "token_major" else (weight, dy)
        dx = lax.dot_general(*operands, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
        return dx.astype(dy.dtype)
    dy = dy.T if layout == "token_major" else dy
    dy = pad_tokens(dy)
    if config is None:
        config = configs.config(problem("grad_input", topology, dy), devices.kind())
    dx = _grad_input(matrix, table, dy, precision, config)[:, :n]
    return dx.T if layout == "token_major" else dx


def slot_table(topology: Topology) -> jax.Array:
    """(R, K) int32: the slot that holds each input in each group, P where the group does not keep it."""
    p, c = topology.num_slots, TABLE
    empty = jnp.full((topology.num_groups, topology.k), p, jnp.int32)
    tiles = pl.cdiv(topology.max_count, c.block_rows)
    kernel = functools.partial(_slot_table_kernel, block=c.block_rows)
    args = topology.columns, topology.group_ptr, _product.real_counts(topology), empty
    return call(kernel, jax.ShapeDtypeStruct(empty.shape, empty.dtype), (topology.num_groups, tiles), c, *args,
                name="row_grouped_slot_table", aliases={3: 0})  # fmt: skip


def _slot_table_kernel(columns_ref, ptr_ref, counts_ref, empty_ref, table_ref, *, block, interpret):
    del empty_ref, interpret  # the former is the same memory as the table
    group, local = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block)
    slots, live = ptr_ref[group] + local, local < counts_ref[group]
    k = table_ref.shape[1]
    columns = plgpu.load(columns_ref.at[slots], mask=live, other=k)
    # A slot of a 2:4 matrix may have no column; stored at its sentinel it would reach the next group's first input.
    live = columns < k
    # Lanes that are masked off point behind the table: the interpreter writes them, and drops what is out of range.
    columns = jnp.where(live, columns, k)
    plgpu.store(table_ref.at[jnp.full_like(columns, group), columns], slots, mask=live)


def _grad_input(matrix: RowGrouped, table, dy, precision, config: Config):
    topology, n, c = matrix.topology, dy.shape[1], config
    m, k, v, p, groups = topology.m, topology.k, topology.group_size, topology.num_slots, topology.num_groups
    block_k = min(c.block_k, v)
    parts, tiles = v // block_k, pl.cdiv(k, c.block_rows)

    def kernel(values_ref, table_ref, rows_ref, dy_ref, dx_ref, *, interpret):
        del interpret
        tile, token_tile = lax.rem(pl.program_id(0), tiles), lax.div(pl.program_id(0), tiles)
        inputs = tile * c.block_rows + jnp.arange(c.block_rows)
        tokens = token_tile * c.block_tokens + jnp.arange(c.block_tokens)
        live_inputs = inputs < k if k % c.block_rows else None
        live_tokens = tokens < n if n % c.block_tokens else None

        def load_indices(step):
            index = table_ref.at[jnp.full_like(inputs, lax.div(step, parts)), inputs]
            slots = plgpu.load(index, mask=live_inputs, other=None if live_inputs is None else p)
            return slots, rows_ref[step * block_k + jnp.arange(block_k)]

        def multiply(step, indices, acc):
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

    args = matrix.values, table, topology.rows, dy
    programs = tiles * pl.cdiv(n, c.block_tokens)
    return _product.call_split(kernel, (k, n), dy.dtype, programs, c, args, "row_grouped_grad_input").astype(dy.dtype)


def decompress(matrix: RowGrouped, table: jax.Array | None = None) -> jax.Array:
    """`to_dense` as a kernel: (M, K), from the table of slots if there is one already."""
    table = slot_table(matrix.topology) if table is None else table
    topology, c = matrix.topology, DECOMPRESS
    m, k, v = topology.m, topology.k, topology.group_size
    kernel = functools.partial(_decompress_kernel, block=c.block_rows, v=v)
    grid = (topology.num_groups, pl.cdiv(k, c.block_rows))
    shape = jax.ShapeDtypeStruct((m, k), matrix.dtype)
    return call(kernel, shape, grid, c, matrix.values, table, topology.rows, name="row_grouped_decompress")


def _decompress_kernel(values_ref, table_ref, rows_ref, w_ref, *, block, v, interpret):
    del interpret
    group = pl.program_id(0)
    (m, k), p = w_ref.shape, values_ref.shape[0]
    inputs, lanes = pl.program_id(1) * block + jnp.arange(block), jnp.arange(v)
    live_inputs = inputs < k if k % block else None
    index = table_ref.at[jnp.full_like(inputs, group), inputs]
    slots = plgpu.load(index, mask=live_inputs, other=None if live_inputs is None else p)
    weights = load_tile(values_ref, slots, lanes, slots < p, None)
    rows = rows_ref[group * v + lanes]
    store_tile(w_ref, rows, inputs, weights.T, rows < m, live_inputs)
