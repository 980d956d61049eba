"""The forward product as a Pallas-Mosaic kernel for Hopper: one producer warpgroup gathers, two consumers multiply.

A program works on one tile after the other: the rows of a group times some tokens. A step of a tile takes some
slots through a ring of stages in shared memory. docs/kernels.md draws the pipeline.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._layout import Segments
from pallas_kernels._window import Window
from pallas_kernels.gpu._layout import WORD
from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic import _sparse as sparse
from pallas_kernels.mosaic._configs import BLOCK_K, Config

WARPGROUPS = 3
MOST_EARLY = 64 * 128  # numbers of an accumulator beside which an addend fits twice into the registers
PLAIN, SPLAT = plgpu.RefType(), plgpu.Layout.WG_SPLAT
TILE_COST = 2  # fixed cost of a tile, in steps; used only to balance schedules


class Operands(NamedTuple):
    """What the kernel reads: arrays, or references to them.

    Attributes:
        values: (P, V) bfloat16 or float16, V = 64, 128 or 256; (P / 2, V) with `pairs`.
        ids: (P,) int32, the columns, in 0..K-1; with a window the ids of `ptx.gather`, flat.
        rows: (R * V,) int32.
        x: (K, N) of the values' dtype, N rounded up to a multiple of 8; with a window (C H W, B), B a multiple of 8.
        bias: (M,) of the same dtype, or None.
        addend: (M, N) of the same dtype, or None.
        pairs: None, or the pairs of packed 2:4 values, (P / 16, V) uint16 as `wide_pairs` makes them.
        work: None, or the table of `schedule`; `product` makes it.
    """

    values: Any
    ids: Any
    rows: Any
    x: Any
    bias: Any = None
    addend: Any = None
    pairs: Any = None
    work: Any = None

    @property
    def id_words(self) -> int:
        """32-bit words that tell where a slot points."""
        return 1 if self.pairs is not None else self.ids.shape[0] // self.values.shape[0]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is known of a product when tracing, beside its operands' shapes.

    Attributes:
        m: output features.
        n: tokens.
        segments: the lengths of the groups' segments, multiples of the config's `block_k`.
        activation: see `matmul`.
        multiprocessors: of the GPU.
        sentinels: whether a column may be K; it then stands for an input of zeros.
        window: the geometry of a convolution, or None.
    """

    m: int
    n: int
    segments: Segments
    activation: str | None
    multiprocessors: int
    sentinels: bool = False
    window: Window | None = None


class Scratch(NamedTuple):
    """The shared memory of a program, and its barriers."""

    a_tiles: Any
    b_tiles: Any
    ids: Any
    gathered: Any
    a_full: Any
    ids_full: Any
    empty: Any
    pair_tiles: Any


class Work(NamedTuple):
    """The tiles of a program: how many, and what `schedule` says of the i-th."""

    count: Any
    entry: Callable[[Any], tuple[Any, ...]]


@functools.lru_cache(maxsize=256)
def schedule(segments: Segments, token_tiles: int, programs: int, band: int, block_k: int = BLOCK_K) -> np.ndarray:
    """Deals the tiles of a product out to programs, longest first to whoever is free.

    That is within a third of the best, and far closer with many tiles. Where all groups have as many slots `dealt` does
    without a table.

    Args:
        segments: ((groups, slots), ...), the segment lengths in the order of the groups, multiples of `block_k`.
        token_tiles: tiles along the tokens.
        programs: how many programs there are, at most one per tile.
        band: see `Config`; the order of tiles that are as long.
        block_k: see `Config`.

    Returns:
        (programs, 1 + longest + 1, 4) int32. The first row of a program is (number of tiles, 0, 0, 0); a row for each
        of its tiles follows, (first slot / `block_k`, steps, group, token tile), those without steps last, then zeros.
    """
    steps = np.repeat([slots // block_k for _, slots in segments], [groups for groups, _ in segments])
    first = np.concatenate([[0], np.cumsum(steps)])
    bands = [range(start, min(start + band, token_tiles)) for start in range(0, token_tiles, band)]
    order = [(group, n) for tiles in bands for group in range(len(steps)) for n in tiles]
    lists: list[list[tuple[int, int]]] = [[] for _ in range(programs)]
    load = [(0, program) for program in range(programs)]
    for group, n in sorted(order, key=lambda tile: -steps[tile[0]]):
        total, program = heapq.heappop(load)
        lists[program].append((group, n))
        heapq.heappush(load, (total + int(steps[group]) + TILE_COST, program))
    table = np.zeros((programs, max(map(len, lists)) + 2, 4), np.int32)
    for program, tiles in enumerate(lists):
        table[program, 0, 0] = len(tiles)
        for i, (group, n) in enumerate(tiles):
            table[program, i + 1] = first[group], steps[group], group, n
    table.setflags(write=False)
    return table


def dealt(
    program: Any, i: Any, *, groups: int, steps: int, token_tiles: int, programs: int, band: int
) -> tuple[Any, ...]:
    """The i-th tile of a program where every group has as many steps: tiles are dealt out in turn, band after band.

    Working it out takes a program less time than to load it: the first tile of all waits for it.

    Args:
        program: () int32.
        i: () int32.
        groups: how many there are.
        steps: of every group.
        token_tiles: see `schedule`.
        programs: see `schedule`.
        band: see `Config`.

    Returns:
        A tile's row of `schedule`, () int32 each; zeros behind the program's last tile.
    """
    tile = program + i * programs
    first_of_band = lax.div(tile, groups * band) * band
    width = band if token_tiles % band == 0 else jnp.minimum(band, token_tiles - first_of_band)
    in_band = tile - first_of_band * groups
    group = lax.div(in_band, width)
    row = group * steps, steps, group, first_of_band + in_band - group * width
    return tuple(jnp.where(tile < groups * token_tiles, value, 0) for value in row)


def product(operands: Operands, shape: Shape, config: Config) -> jax.Array:
    """Computes activation(W x + bias + addend), feature-major; a convolution has x as `ptx.gather` reads it.

    Args:
        operands: the arrays.
        shape: of the product.
        config: a legal config.

    Returns:
        (M, N) of the values' dtype.
    """
    c, v, packed = config, operands.values.shape[1], operands.pairs is not None
    groups, token_tiles = sum(count for count, _ in shape.segments), pl.cdiv(shape.n, c.block_tokens)
    tiles = groups * token_tiles
    programs = min(shape.multiprocessors, tiles)
    lengths = {slots // c.block_k for _, slots in shape.segments}
    if len(lengths) > 1:
        table = jnp.asarray(schedule(shape.segments, token_tiles, programs, c.band, c.block_k))
        operands = operands._replace(work=table)

    def kernel(refs: Operands, y: Any, scratch: Scratch) -> None:
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        inline(functools.partial(ptx.init_barriers, count=c.stages, arrivals=ptx.WARPGROUP), PLAIN)(scratch.gathered)

        def dealt_to_this(i: Any) -> tuple[Any, ...]:
            return dealt(
                program, i, groups=groups, steps=next(iter(lengths)), token_tiles=token_tiles, programs=programs,
                band=c.band,
            )  # fmt: skip

        def read_from_table(i: Any) -> tuple[Any, ...]:
            return tuple(refs.work[program, i + 1, field] for field in range(4))

        if refs.work is None:
            work = Work(lax.div(tiles - 1 - program, programs) + 1, dealt_to_this)
        else:
            work = Work(refs.work[program, 0, 0], read_from_table)

        @pl.when(warpgroup == 2)
        def _produce() -> None:
            plgpu.set_max_registers(c.registers[1], action="decrease")
            _producer(refs, scratch, work, shape, c)

        @pl.when(warpgroup < 2)
        def _consume() -> None:
            plgpu.set_max_registers(c.registers[0], action="increase")
            _consumer(refs, y, scratch, work, shape, c)

    # The kernel's name in profiles.
    kernel.__name__ = (
        "two_four_matmul" if packed else "row_grouped_matmul" if shape.window is None else "row_grouped_conv"
    )
    ring, dtype = c.stages + c.ahead, operands.x.dtype
    scratch = Scratch(
        a_tiles=plgpu.SMEM((c.stages, c.block_k // 2 if packed else c.block_k, v), dtype, transforms=_tiled(v)),
        b_tiles=plgpu.SMEM((c.stages, c.block_k, c.block_tokens), dtype, transforms=_tiled(c.block_tokens)),
        ids=plgpu.SMEM((ring, c.block_k * operands.id_words), jnp.int32),
        gathered=plgpu.SMEM((2 * c.stages,), jnp.int32),  # the gather's own barriers, 8 bytes each
        a_full=plgpu.Barrier(num_barriers=c.stages, num_arrivals=2 if packed else 1),
        ids_full=plgpu.Barrier(num_barriers=ring),
        empty=plgpu.Barrier(num_barriers=c.stages, num_arrivals=2),
        pair_tiles=plgpu.SMEM((c.stages, c.block_k // WORD, v), jnp.uint16, transforms=_tiled(v, 4))
        if packed
        else None,
    )
    out = jax.ShapeDtypeStruct((shape.m, shape.n), dtype)
    return plgpu.kernel(kernel, out_type=out, scratch_types=(scratch,), **launch(programs))(operands)


def launch(programs: int) -> dict[str, Any]:
    """How a kernel of this package is launched: `WARPGROUPS` to a program, barriers and registers in its own hands."""
    parameters = plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )
    return {
        "grid": (programs,),
        "grid_names": ("program",),
        "num_threads": WARPGROUPS,
        "thread_name": "warpgroup",
        "compiler_params": parameters,
    }


def _tiled(width: int, rows: int = 8) -> tuple[Any, ...]:
    """How two-byte operands lie in shared memory: some rows of up to 128 bytes to a tile, swizzled."""
    row = min(2 * width, 128)
    return (plgpu.TilingTransform((rows, row // 2)), plgpu.SwizzleTransform(row))


def inline(function: Callable[..., Any], *arg_types: Any, result: Any = None) -> Callable[..., Any]:
    """Calls a function that emits instructions, with references and arrays of the given types."""

    def emit(context: Any, *args: Any) -> Any:
        return function(*args)

    return plgpu.inline_mgpu(arg_types=arg_types, return_type=result)(emit)


def _activate(activation: str | None, y: Any) -> Any:
    """The activation of an accumulator. tanh is one instruction, its error below the rounding of a two-byte output."""
    if activation in (None, "relu"):
        return y if activation is None else jnp.maximum(y, 0.0)
    kind = plgpu.ShapeDtypeStruct(y.shape, y.dtype, layout=plgpu.Layout.WGMMA)
    return inline({"gelu": ptx.gelu, "silu": ptx.silu}[activation], plgpu.Layout.WGMMA, result=kind)(y)


def _consumer(refs: Operands, y: Any, scratch: Scratch, work: Work, shape: Shape, config: Config) -> None:
    """Multiplies the tiles that the producer fills, this warpgroup's half of each, and stores the results."""
    c, v, m, n, x, warpgroup = config, refs.values.shape[1], shape.m, shape.n, refs.x, lax.axis_index("warpgroup")
    height, wide = (v // 2, c.block_tokens) if c.split == "rows" else (v, c.block_tokens // 2)
    rows_first, tokens_first = (height, 0) if c.split == "rows" else (0, wide)
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    weights = [tiles for tiles in (scratch.a_tiles, scratch.pair_tiles) if tiles is not None]
    wait = inline(functools.partial(ptx.wait, stages=c.stages), PLAIN, SPLAT)
    registers, tile = plgpu.Layout._WGMMA_ACC_32BIT, (height, wide)
    running = plgpu.ShapeDtypeStruct(tile, jnp.dtype(jnp.float32), layout=registers)
    finished = plgpu.ShapeDtypeStruct(tile, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)
    zeros = inline(functools.partial(sparse.zeros, shape=tile, layout=registers), result=running)
    kinds = (plgpu.RefType(transforms) for transforms in (_tiled(v), _tiled(v, 4), _tiled(c.block_tokens)))
    issue = inline(sparse.multiply, registers, *kinds, result=running)
    drain = inline(sparse.drain, registers, result=finished)

    def of_rows(dtype: Any) -> Any:
        return plgpu.ShapeDtypeStruct((height,), dtype, layout=row_layout)

    def header(i: Any) -> Any:
        """Steps, group and token tile of a tile; behind the last one zeros."""
        return work.entry(jnp.minimum(i, work.count))[1:]

    def targets_of(group: Any) -> Any:
        load = functools.partial(ptx.stored_rows, count=height, layout=row_layout)
        return inline(load, PLAIN, SPLAT, result=of_rows(jnp.int32))(refs.rows, group * v + warpgroup * rows_first)

    def offsets_of(targets: Any) -> Any:
        if refs.bias is None:
            return None
        load = functools.partial(ptx.row_bias, m=m, layout=row_layout)
        return inline(load, PLAIN, row_layout, result=of_rows(jnp.float32))(refs.bias, targets)

    def added_to(targets: Any, token_tile: Any) -> Any:
        load = functools.partial(ptx.load_rows, height=height, width=wide, m=m, tokens=n)
        first_token = token_tile * c.block_tokens + warpgroup * tokens_first
        return inline(load, PLAIN, row_layout, SPLAT, result=loaded)(refs.addend, targets, first_token)

    loaded = plgpu.ShapeDtypeStruct((height, wide), x.dtype, layout=plgpu.Layout.WGMMA)
    # The addend too is read a tile ahead, where that leaves registers.
    early = refs.addend is not None and height * wide <= MOST_EARLY

    def multiply(i: Any, carry: Any) -> Any:
        # What the epilogue reads comes a tile before it is needed: header, rows and bias are a chain of loads.
        step, steps, token_tile, targets, offsets, added, (next_steps, next_group, next_tile) = carry
        next_targets, after_next = targets_of(next_group), header(i + 2)
        next_added = added_to(next_targets, next_tile) if early else None

        def operands(now: Any) -> Any:
            """This consumer's part of a step's tiles, when they have arrived."""
            slot = lax.rem(now, c.stages)
            plgpu.barrier_wait(scratch.a_full.at[slot])
            wait(scratch.gathered, now)
            own_rows, own_tokens = pl.ds(warpgroup * height, height), pl.ds(warpgroup * wide, wide)
            if c.split == "rows":
                return [t.at[slot, :, own_rows] for t in weights], scratch.b_tiles.at[slot]
            return [t.at[slot] for t in weights], scratch.b_tiles.at[slot, :, own_tokens]

        def release(now: Any) -> None:
            plgpu.barrier_arrive(scratch.empty.at[lax.rem(now, c.stages)])

        def multiply_dense(acc: Any) -> Any:
            def one(k: Any, _: Any) -> None:
                (a,), b = operands(step + k)
                plgpu.wgmma(acc, a.transpose((1, 0)), b)
                plgpu.wgmma_wait(1)  # all but the one just issued
                pl.when(k > 0)(lambda: release(step + k - 1))

            lax.fori_loop(0, steps, one, None)
            plgpu.wgmma_wait(0)
            pl.when(steps > 0)(lambda: release(step + steps - 1))
            return acc[...]

        def multiply_sparse() -> Any:
            def one(k: Any, acc: Any) -> Any:
                (a, pairs), b = operands(step + k)
                acc = issue(acc, a, pairs, b)  # waits for all that was issued before
                pl.when(k > 0)(lambda: release(step + k - 1))
                return acc

            acc = drain(lax.fori_loop(0, steps, one, zeros()))
            pl.when(steps > 0)(lambda: release(step + steps - 1))
            return acc

        if refs.pairs is not None:
            out = multiply_sparse()
        else:
            out = pl.run_scoped(multiply_dense, plgpu.ACC((height, wide), jnp.float32))
        next_offsets = offsets_of(next_targets)
        if refs.bias is not None:
            out = out + lax.broadcast_in_dim(offsets, (height, wide), (0,))
        first_token = token_tile * c.block_tokens + warpgroup * tokens_first
        if refs.addend is not None:
            added = added if early else added_to(targets, token_tile)
            added = inline(ptx.exchange_rows, plgpu.Layout.WGMMA, result=loaded)(added)
            out = out + added.astype(jnp.float32)
        out = _activate(shape.activation, out).astype(x.dtype)
        store = functools.partial(ptx.store_rows, m=m, tokens=n)
        inline(store, PLAIN, plgpu.Layout.WGMMA, row_layout, SPLAT)(y, out, targets, first_token)
        return step + steps, next_steps, next_tile, next_targets, next_offsets, next_added, after_next

    steps, group, token_tile = header(0)
    targets = targets_of(group)
    added = added_to(targets, token_tile) if early else None
    carry = jnp.int32(0), steps, token_tile, targets, offsets_of(targets), added, header(1)
    lax.fori_loop(0, work.count, multiply, carry)


def _producer(refs: Operands, scratch: Scratch, work: Work, shape: Shape, config: Config) -> None:
    """Fills the ring, tile after tile: weights and their pairs by TMA, activations by the gather."""
    c, x, id_words, entry = config, refs.x, refs.id_words, work.entry
    ring = c.stages + c.ahead
    copies = [(refs.values, scratch.a_tiles), (refs.pairs, scratch.pair_tiles)]
    gather = inline(
        functools.partial(
            ptx.gather, tokens=x.shape[1] if shape.window is None else shape.n, block_k=c.block_k,
            block_tokens=c.block_tokens, first=2 * ptx.WARPGROUP, sentinel=x.shape[0] if shape.sentinels else None,
            window=shape.window, masked=id_words == 2,
        ),
        PLAIN, PLAIN, plgpu.RefType(_tiled(c.block_tokens)), PLAIN, SPLAT, SPLAT,
    )  # fmt: skip

    def fetch_ids(step: Any, cursor: Any) -> Any:
        """Fetches the ids of a step, `cursor` telling where they are: (tile, block of slots, steps left)."""
        tile, block, left = cursor
        place = lax.rem(step, ring)

        @pl.when(left > 0)
        def _copy() -> None:
            some = pl.ds(block * c.block_k * id_words, c.block_k * id_words)
            plgpu.copy_gmem_to_smem(refs.ids.at[some], scratch.ids.at[place], scratch.ids_full.at[place])

        # Behind the last tile a row of zeros ends it: no steps left, and never exactly one again.
        return lax.cond(
            left == 1,
            lambda: (tile + 1, *entry(tile + 1)[:2]),
            lambda: (tile, block + 1, left - 1),
        )

    def copy_weights(step: Any, block: Any) -> None:
        slot = lax.rem(step, c.stages)
        for source, tiles in copies:
            if source is None:
                continue
            rows = tiles.shape[1]
            piece = source.at[pl.ds(block * rows, rows)]
            plgpu.copy_gmem_to_smem(piece, tiles.at[slot], scratch.a_full.at[slot])

    def tile(i: Any, carry: Any) -> Any:
        block, steps, _, token_tile = entry(i)

        def one(k: Any, carry: Any) -> Any:
            step, cursor = carry
            slot, place = lax.rem(step, c.stages), lax.rem(step, ring)

            @pl.when(step >= c.stages)
            def _wait_for_room() -> None:
                plgpu.barrier_wait(scratch.empty.at[slot])

            pl.when(step >= early)(lambda: copy_weights(step, block + k))
            # The consumers are done with the step that used this place of the ring, so all threads have read it.
            cursor = fetch_ids(step + c.ahead, cursor)
            plgpu.barrier_wait(scratch.ids_full.at[place])
            gather(x, scratch.ids.at[place], scratch.b_tiles.at[slot], scratch.gathered, token_tile, slot)
            return step + 1, cursor

        return lax.fori_loop(0, steps, one, carry)

    first, steps, *_ = entry(0)
    cursor = jnp.int32(0), first, steps
    cursor = lax.fori_loop(0, c.ahead, fetch_ids, cursor)
    # The first weights need not wait for the first ids.
    early = jnp.minimum(steps, c.stages)

    def copy_early(k: Any, _: None) -> None:
        copy_weights(k, first + k)

    lax.fori_loop(0, early, copy_early, None)
    lax.fori_loop(0, work.count, tile, (jnp.int32(0), cursor))
