"""The forward product as a Pallas-Triton kernel.

A program computes one tile: the rows of a group (or a part of them) times some tokens. It walks over the group's
slots: a step reads `block_k` column ids, gathers those rows of the feature-major activations and multiplies. Rows of
the result are written where the row permutation says. docs/kernels.md tells why the kernel looks as it does.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._matrix import RowGrouped
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import (
    call,
    check,
    contract,
    device_kind,
    is_aligned,
    load_tile,
    loop,
    pad_tokens,
    problem,
    split_steps,
    static_length,
    store_tile,
)

SQRT_2_PI = math.sqrt(2 / math.pi)
ACTIVATIONS = {None: lambda y: y, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
FAST_ACTIVATIONS = ACTIVATIONS | {
    "gelu": lambda y: 0.5 * y * (1 + plgpu.approx_tanh(y * (SQRT_2_PI + 0.044715 * SQRT_2_PI * y * y))),
    "silu": lambda y: 0.5 * y * (1 + plgpu.approx_tanh(0.5 * y)),
}


def forward(
    matrix: RowGrouped, x: jax.Array, bias: jax.Array | None, *, activation: str | None, layout: str,
    precision: lax.PrecisionLike, config: Config | None = None,
) -> jax.Array:  # fmt: skip
    """Computes activation(W x + bias); see `matmul` for the arguments, here 2-D.

    Args:
        matrix: canonical or prepared.
        x: (N, K) token-major or (K, N) feature-major.
        bias: (M,) or None.
        activation: see `matmul`.
        layout: see `matmul`.
        precision: see `matmul`.
        config: None looks one up.

    Raises:
        NotImplementedError: a group size or dtype the kernel does not do.
    """
    check(matrix.topology, x.dtype)
    if layout == "token_major":
        x = x.T
    n = x.shape[1]
    if n == 0:
        y = jnp.zeros((matrix.topology.m, 0), x.dtype)
        return y.T if layout == "token_major" else y
    x = pad_tokens(x)
    if config is None:
        config = configs.config(problem("forward", matrix.topology, x), device_kind())
    y = _forward(matrix, x, bias, activation, precision, config)[:, :n]
    return y.T if layout == "token_major" else y


def _forward(matrix: RowGrouped, x, bias, activation, precision, config: Config):
    topology, n, c = matrix.topology, x.shape[1], config
    groups, v = topology.num_groups, topology.group_size
    rows = min(c.block_rows, v)
    length = static_length(topology, c.block_k)
    kernel = functools.partial(
        _forward_kernel,
        config=c,
        groups=groups,
        v=v,
        block_rows=rows,
        length=length,
        masked=not is_aligned(topology, c.block_k),
        has_bias=bias is not None,
        activation=activation,
        precision=precision,
    )
    grid = (groups * (v // rows) * pl.cdiv(n, c.block_tokens),)
    shape, dtype = (topology.m, n), x.dtype
    if c.split > 1:
        grid, shape, dtype = (*grid, c.split), (c.split, *shape), jnp.float32
    args = [matrix.values, topology.columns, topology.group_ptr, topology.rows, x]
    args += [] if bias is None else [bias]
    y = call(kernel, jax.ShapeDtypeStruct(shape, dtype), grid, c, *args, name="row_grouped_matmul")
    if c.split > 1:
        y = y.sum(0)
        y = y if bias is None else y + bias[:, None].astype(y.dtype)
        y = ACTIVATIONS[activation](y).astype(x.dtype)
    return y


def _forward_kernel(
    values_ref, columns_ref, ptr_ref, rows_ref, x_ref, *refs,
    config, groups, v, block_rows, length, masked, has_bias, activation, precision,
    interpret,
):  # fmt: skip
    *bias_ref, y_ref = refs
    c, n, m = config, x_ref.shape[1], y_ref.shape[-2]
    parts, tiles = groups * (v // block_rows), pl.cdiv(n, c.block_tokens)
    program = pl.program_id(0)
    if c.tokens_first:
        part, tile = lax.div(program, tiles), lax.rem(program, tiles)
    else:
        part, tile = lax.rem(program, parts), lax.div(program, parts)
    group, first_row = lax.div(part, v // block_rows), lax.rem(part, v // block_rows) * block_rows
    step_slots, lanes = jnp.arange(c.block_k), first_row + jnp.arange(block_rows)
    tokens = tile * c.block_tokens + jnp.arange(c.block_tokens)
    rows = plgpu.load(rows_ref.at[group * v + lanes]) if c.early_rows else None
    if length is None:
        begin, end = ptr_ref[group], ptr_ref[group + 1]
        if not masked:
            begin = pl.multiple_of(begin, c.block_k)
    else:
        begin, end = group * length, (group + 1) * length
    steps = pl.cdiv(end - begin, c.block_k) if length is None else length // c.block_k
    first, last = split_steps(steps, c.split)

    def load_columns(step):
        slots = begin + step * c.block_k + step_slots
        return plgpu.load(columns_ref.at[slots], mask=slots < end, other=0) if masked else columns_ref[slots]

    def multiply(step, columns, acc):
        slots = begin + step * c.block_k + step_slots
        live = slots < end if masked else None
        gathered = load_tile(x_ref, columns, tokens, live, tokens < n if n % c.block_tokens else None)
        weights = load_tile(values_ref, slots, lanes, live, None)
        a, b = (gathered, weights) if c.flip else (weights, gathered)
        return acc + contract(a, b, (0, 0), precision)

    shape = (c.block_tokens, block_rows) if c.flip else (block_rows, c.block_tokens)
    acc = loop(first, last, load_columns, multiply, jnp.zeros(shape, jnp.float32), prefetch=c.prefetch)
    rows = plgpu.load(rows_ref.at[group * v + lanes]) if rows is None else rows
    y = acc.T if c.flip else acc
    if c.split > 1:
        store_tile(y_ref, rows, tokens, y, rows < m, tokens < n if n % c.block_tokens else None, pl.program_id(1))
        return
    if has_bias:
        y += plgpu.load(bias_ref[0].at[rows], mask=rows < m, other=0).astype(jnp.float32)[:, None]
    # The exact functions cost a quarter of the whole product at 75%; these err by less than two-byte outputs round.
    functions = ACTIVATIONS if interpret or y_ref.dtype == jnp.float32 else FAST_ACTIVATIONS
    y = functions[activation](y).astype(y_ref.dtype)
    # Where every stored row is real (the groups divide M) the store needs no mask.
    live_rows = None if groups * v == m else rows < m
    store_tile(y_ref, rows, tokens, y, live_rows, tokens < n if n % c.block_tokens else None)
