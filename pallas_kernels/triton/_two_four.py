"""Products of packed 2:4 matrices as Pallas-Triton kernels, the values expanded in registers.

A tile of words holds the pairs of four fours a row, next to it eight tiles of values. Slot i of the j-th fours
makes a dense tile, zero where a row does not use that slot, and meets the activations of those slots on the matrix
unit: sixteen products a step, and nothing has to be interleaved. Two rows at a time are expanded by bit operations on
32-bit registers. That saves bytes, not arithmetic, and it is repeated for every tile of tokens. So it pays for few
tokens, where weights are what is read; for more, a kernel expands the matrix in memory and the row-grouped kernel runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._matrix import RowGrouped, Topology, expand
from pallas_kernels._pairs import wide_pairs
from pallas_kernels._two_four import fill, select
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._forward import forward
from pallas_kernels.triton._grad import grad_values
from pallas_kernels.triton._tiles import (
    call,
    check,
    contract,
    is_aligned,
    load_tile,
    pad_tokens,
    store_tile,
)

MOST_TOKENS = 128
"""Beyond it the expanded matrix is faster."""
WORD = 16
"""Slots whose pairs a word holds."""
SHORTEST = 16  # what the matrix unit contracts at least of two-byte numbers: shorter products come out wrong
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


def forward_two_four(matrix, x, bias, *, activation, layout, precision, config=None):
    """Computes activation(W x + bias) for a packed W; see `matmul` for the arguments, here 2-D.

    Args:
        matrix: canonical or prepared.
        x: (N, K) token-major or (K, N) feature-major.
        bias: (M,) or None.
        activation: see `matmul`.
        layout: see `matmul`.
        precision: see `matmul`.
        config: None uses the heuristic up to `MOST_TOKENS` tokens, and beyond it the expanded matrix.

    Raises:
        NotImplementedError: a group size, dtype or config not supported by the kernels.
    """
    topology = matrix.topology
    check(topology, x.dtype)
    n = x.shape[0 if layout == "token_major" else 1]
    if n == 0 or (n > MOST_TOKENS and config is None) or not is_aligned(topology, WORD):
        return forward_expanded(matrix, x, bias, activation=activation, layout=layout, precision=precision)
    x = pad_tokens(x.T if layout == "token_major" else x)
    config = heuristic(topology, n, x.dtype) if config is None else config
    if x.dtype.itemsize == 2 and config.block_k < SHORTEST * WORD:
        raise NotImplementedError(f"the packed kernel takes steps of {SHORTEST * WORD} slots or more, got {config}")
    y = _forward(matrix, x, bias, activation, precision, config)[:, :n]
    return y.T if layout == "token_major" else y


def forward_expanded(matrix, x, bias, *, activation, layout, precision):
    """The same by way of the expanded matrix in memory, for many tokens."""
    return forward(_expanded(matrix), x, bias, activation=activation, layout=layout, precision=precision)


def grad_values_two_four(topology, x, dy, *, layout, precision):
    """Computes dValues (P / 2, V): all of the kept columns, of which the stored slots are taken; see `matmul`.

    Raises:
        NotImplementedError: a group size or dtype not supported by the kernel.
    """
    expanded = fill(dataclasses.replace(topology, pairs=None))
    return select(topology, grad_values(expanded, x, dy, layout=layout, precision=precision))


def heuristic(topology: Topology, n: int, dtype) -> Config:
    """A config that is legal for any matrix the kernel does."""
    tokens = max(16, min(64, 1 << (n - 1).bit_length()))
    flip = tokens < 64  # few tokens are no rows for the widest instructions: let the weights' rows be their columns
    stages = (3 if flip else 2) if jnp.dtype(dtype).itemsize == 2 else 1
    return Config(min(topology.group_size, 64), tokens, 256, num_warps=4, num_stages=stages, flip=flip)


def search_space(topology: Topology, n: int, dtype) -> tuple[Config, ...]:
    """The configs worth measuring, the heuristic's first."""
    v, most = min(topology.group_size, 128), max(16, 1 << (n - 1).bit_length())
    found = [heuristic(topology, n, dtype)]
    found += [
        Config(rows, min(64, most), 256, warps, stages, flip=flip, split=split)
        for rows, warps in sorted({(min(v, 32), 2), (min(v, 64), 4), (v, 4), (v, 8)})
        for stages in (1, 2, 3)
        for flip in ((False, True) if rows <= 64 else (False,))
        for split in ((1, 2) if rows == 128 else (1,))
    ]
    return tuple(dict.fromkeys(found))


def _spread(low, high, word, j: int, interpret: bool):
    """Expands the j-th fours of a tile of words: low and high values (words, rows) to the tiles of the four slots."""
    if interpret or low.dtype.itemsize != 2:
        bits = word.astype(jnp.int32) >> (4 * j)
        first, second, zero = bits & 3, (bits >> 2) & 3, jnp.zeros_like(low)
        return [jnp.where(first == i, low, jnp.where(second == i, high, zero)) for i in range(4)]
    masks = [_asm(MASK.format(15 - 4 * j - bit), jnp.int16, word) for bit in range(4)]
    return [_asm(slot, low.dtype, low, high, *masks) for slot in SLOTS]


def _asm(text: str, dtype, *args):
    """Two elements of 16 bits at a time."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    constraints = ",".join(["=&r"] + ["r"] * len(args))
    return plgpu.elementwise_inline_asm(text, args=args, constraints=constraints, pack=2, result_shape_dtypes=[shape])[
        0
    ]


def _forward(matrix: RowGrouped, x, bias, activation, precision, config: Config):
    topology, (k, n) = matrix.topology, x.shape

    def walk(tile, values_ref, words_ref, columns_ref, x_ref):
        begin, end, step_words = lax.div(tile.begin, WORD), lax.div(tile.end, WORD), config.block_k // WORD

        def word_ids(step):
            ids = begin + step * step_words + jnp.arange(step_words)
            return ids, ids < end if tile.masked else None

        def load_columns(step):
            ids, live = word_ids(step)
            options = {} if live is None else {"mask": live, "other": k}
            return tuple(plgpu.load(columns_ref.at[WORD * ids + slot], **options) for slot in range(WORD))

        def multiply(step, columns, acc):
            ids, live = word_ids(step)
            word = load_tile(words_ref, ids, tile.lanes, live, None)
            for j in range(4):
                low, high = (load_tile(values_ref, 8 * ids + 2 * j + i, tile.lanes, live, None) for i in range(2))
                for i, weights in enumerate(_spread(low, high, word, j, tile.interpret)):
                    # The sentinel K marks a slot without a column.
                    inputs = columns[4 * j + i]
                    gathered = load_tile(x_ref, inputs, tile.tokens, inputs < k, tile.live_tokens)
                    a, b = (gathered, weights) if config.flip else (weights, gathered)
                    acc = acc + contract(a, b, (0, 0), precision)
            return acc

        return load_columns, multiply

    operands = matrix.values, wide_pairs(topology.pairs), topology.columns, x
    return _product.forward(
        walk, topology, operands, bias, n, dtype=x.dtype, activation=activation, config=config, name="two_four_matmul"
    )


def _expanded(matrix: RowGrouped) -> RowGrouped:
    """The matrix with zeros between its values, and no column id out of range."""
    topology, c = matrix.topology, EXPAND
    slots, v = topology.num_slots, topology.group_size
    if slots % WORD:
        matrix = expand(matrix)
        return RowGrouped(matrix.values, fill(matrix.topology))
    kernel = functools.partial(_expand_kernel, block=c.block_rows, k=topology.k)
    shapes = jax.ShapeDtypeStruct((slots, v), matrix.dtype), jax.ShapeDtypeStruct((slots,), jnp.int32)
    grid = (pl.cdiv(slots // WORD, c.block_rows),)
    args = matrix.values, wide_pairs(topology.pairs), topology.columns
    values, columns = call(kernel, shapes, grid, c, *args, name="two_four_expand")
    return RowGrouped(values, dataclasses.replace(topology, columns=columns, pairs=None))


def _expand_kernel(values_ref, words_ref, columns_ref, out_ref, out_columns_ref, *, block, k, interpret):
    num_words, lanes = words_ref.shape[0], jnp.arange(words_ref.shape[1])
    ids = pl.program_id(0) * block + jnp.arange(block)
    live = ids < num_words if num_words % block else None
    other = None if live is None else 0
    word = load_tile(words_ref, ids, lanes, live, None)
    for j in range(4):
        low, high = (load_tile(values_ref, 8 * ids + 2 * j + i, lanes, live, None) for i in range(2))
        slots = WORD * ids + 4 * j
        # As `fill` does: a kernel of its own would take longer to launch than to run.
        first = plgpu.load(columns_ref.at[slots], mask=live, other=other)
        for i, tile in enumerate(_spread(low, high, word, j, interpret)):
            store_tile(out_ref, slots + i, lanes, tile, live, None)
            column = plgpu.load(columns_ref.at[slots + i], mask=live, other=other)
            plgpu.store(out_columns_ref.at[slots + i], jnp.where(column < k, column, first), mask=live)
