"""Products of packed 2:4 matrices as Pallas-Triton kernels, the values expanded in registers.

A tile of words holds the pairs of four fours a row, next to it eight tiles of values. Slot i of the j-th fours
makes a dense tile, zero where a row does not use that slot, and meets the activations of those slots on the matrix
unit: sixteen products a step, and nothing has to be interleaved. Two rows at a time are expanded by bit operations on
32-bit registers. That saves bytes, not arithmetic, and it is repeated for every tile of tokens. So it pays for few
tokens, where weights are what is read; for more, a kernel expands the matrix in memory and the row-grouped kernel runs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from pallas_kernels._layout import Prepared, expand, filled
from pallas_kernels.gpu._layout import WORD
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import call, contract, load_tile, store_tile

EXPAND = Config(block_rows=16, num_warps=4, num_stages=1)
# Two rows to a register. A bit of a word's half is shifted to the sign of that half, which prmt spreads over the half.
MASK = "shl.b32 $0, $1, {0}; prmt.b32 $0, $0, $0, 0xBB99;"
# With low at slot p and high at slot q > p of their four: $3, $4 are the spread bits of p, $5, $6 those of q.
SLOTS = (
    "{ .reg .b32 t; or.b32 t, $3, $4; not.b32 t, t; and.b32 $0, $1, t; }",
    "{ .reg .b32 s, t; not.b32 t, $6; and.b32 t, t, $2; and.b32 s, $3, $1; or.b32 $0, s, t; }",
    "{ .reg .b32 s, t; not.b32 t, $5; and.b32 t, t, $6; and.b32 t, t, $2; and.b32 s, $4, $1; or.b32 $0, s, t; }",
    "{ .reg .b32 t; and.b32 t, $5, $6; and.b32 $0, t, $2; }",
)


def _spread(low: jax.Array, high: jax.Array, word: jax.Array, j: int, interpret: bool) -> list[jax.Array]:
    """Expands the j-th fours of a tile of words: low and high values (words, rows) to the tiles of the four slots."""
    if interpret or low.dtype.itemsize != 2:
        bits = word.astype(jnp.int32) >> (4 * j)
        first, second, zero = bits & 3, (bits >> 2) & 3, jnp.zeros_like(low)
        return [jnp.where(first == i, low, jnp.where(second == i, high, zero)) for i in range(4)]
    masks = [_asm(MASK.format(15 - 4 * j - bit), jnp.int16, word) for bit in range(4)]
    return [_asm(slot, low.dtype, low, high, *masks) for slot in SLOTS]


def _asm(text: str, dtype: DTypeLike, *args: jax.Array) -> jax.Array:
    """Two elements of 16 bits at a time."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    constraints = ",".join(["=&r"] + ["r"] * len(args))
    return plgpu.elementwise_inline_asm(text, args=args, constraints=constraints, pack=2, result_shape_dtypes=[shape])[
        0
    ]


class Operands(NamedTuple):
    """What the kernel reads: arrays, or references to them."""

    values: Any
    words: Any
    columns: Any
    x: Any


def forward(
    matrix: Prepared, x: jax.Array, bias: jax.Array | None, *, activation: str | None, precision: lax.PrecisionLike,
    config: Config,
) -> jax.Array:  # fmt: skip
    """Computes activation(W x + bias) for a packed W, feature-major; its segments are multiples of `WORD` slots."""
    layout, (k, n) = matrix.layout, x.shape

    def walk(tile: _product.Tile, refs: Operands) -> Any:
        begin, end, step_words = lax.div(tile.begin, WORD), lax.div(tile.end, WORD), config.block_k // WORD

        def word_ids(step: Any) -> tuple[jax.Array, jax.Array | None]:
            ids = begin + step * step_words + jnp.arange(step_words)
            return ids, ids < end if tile.masked else None

        def load_columns(step: Any) -> tuple[jax.Array, ...]:
            ids, live = word_ids(step)
            other = None if live is None else k
            return tuple(plgpu.load(refs.columns.at[WORD * ids + i], mask=live, other=other) for i in range(WORD))

        def multiply(step: Any, columns: tuple[jax.Array, ...], acc: jax.Array) -> jax.Array:
            ids, live = word_ids(step)
            word = load_tile(refs.words, ids, tile.lanes, live, None)
            for j in range(4):
                low, high = (load_tile(refs.values, 8 * ids + 2 * j + i, tile.lanes, live, None) for i in range(2))
                for i, weights in enumerate(_spread(low, high, word, j, tile.interpret)):
                    # The sentinel K marks a slot without a column.
                    inputs = columns[4 * j + i]
                    gathered = load_tile(refs.x, inputs, tile.tokens, inputs < k, tile.live_tokens)
                    a, b = (gathered, weights) if config.flip else (weights, gathered)
                    acc = acc + contract(a, b, (0, 0), precision)
            return acc

        return load_columns, multiply

    operands = Operands(matrix.values, layout.pairs, layout.columns, x)
    return _product.forward(
        walk, layout, operands, bias, n, dtype=x.dtype, activation=activation, config=config, name="two_four_matmul"
    )


def expanded(matrix: Prepared) -> Prepared:
    """The matrix with zeros between its values, and no column id out of range."""
    layout, c = matrix.layout, EXPAND
    slots, v, k = layout.num_slots, layout.group_size, layout.k
    plain = filled(layout)
    if slots % WORD:
        return Prepared(expand(matrix).values, plain)

    def kernel(
        values_ref: Any, words_ref: Any, columns_ref: Any, out_ref: Any, out_columns_ref: Any, *, interpret: bool
    ) -> None:
        num_words, lanes = slots // WORD, jnp.arange(v)
        ids = pl.program_id(0) * c.block_rows + jnp.arange(c.block_rows)
        live = ids < num_words if num_words % c.block_rows else None
        other = None if live is None else 0
        word = load_tile(words_ref, ids, lanes, live, None)
        for j in range(4):
            low, high = (load_tile(values_ref, 8 * ids + 2 * j + i, lanes, live, None) for i in range(2))
            four = WORD * ids + 4 * j
            # As `filled` does: a kernel of its own would take longer to launch than to run.
            first = plgpu.load(columns_ref.at[four], mask=live, other=other)
            for i, tile in enumerate(_spread(low, high, word, j, interpret)):
                store_tile(out_ref, four + i, lanes, tile, live, None)
                column = plgpu.load(columns_ref.at[four + i], mask=live, other=other)
                plgpu.store(out_columns_ref.at[four + i], jnp.where(column < k, column, first), mask=live)

    shapes = jax.ShapeDtypeStruct((slots, v), matrix.dtype), jax.ShapeDtypeStruct((slots,), jnp.int32)
    grid = (pl.cdiv(slots // WORD, c.block_rows),)
    args = matrix.values, layout.pairs, layout.columns
    values, columns = call(kernel, shapes, grid, c, *args, name="two_four_expand")
    return Prepared(values, dataclasses.replace(plain, columns=columns))
