"""The forward product as a Pallas-Mosaic kernel for Hopper: one producer warpgroup gathers, two consumers multiply.

A program works on one tile after the other: the rows of a group times some tokens. A step of a tile takes some
slots through a ring of stages in shared memory. docs/kernels.md draws the pipeline.
"""

import dataclasses
import functools
import heapq
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._window import Window
from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic import _sparse as sparse
from pallas_kernels.triton._two_four import WORD

BLOCK_K = 64  # slots of the shortest step: what one row of a swizzled tile holds along K
SHARED_MEMORY = 227 * 1024 - 2048  # bytes for the stages and the ring of ids; barriers and alignment take the rest
WARPGROUPS = 3
MOST_EARLY = 64 * 128  # numbers of an accumulator beside which an addend fits twice into the registers
TILE_COST = 2  # fixed cost of a tile, in steps; used only to balance schedules


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a program and how tiles are dealt to programs.

    Attributes:
        block_tokens: tokens of a tile.
        stages: depth of the ring of operand tiles, in steps.
        ahead: how many steps earlier than its operands a step's column ids are fetched.
        split: what the two consumers divide a tile by, "rows" or "tokens". By rows both read all tokens, in the widest
            instructions; by tokens both read all rows.
        band: token tiles that programs side by side share: the tiles of `band` token tiles are dealt out group by
            group before the next band begins. Ragged groups are dealt heaviest first, whatever the band.
        registers: of a thread of the consumers and of the producer; (2 a + b) <= 512 - 8 in multiples of 8.
        block_k: slots of a step, a multiple of `BLOCK_K`.
    """

    block_tokens: int = 256
    stages: int = 4
    ahead: int = 4
    split: Literal["rows", "tokens"] = "tokens"
    band: int = 1
    registers: tuple[int, int] = (216, 72)
    block_k: int = BLOCK_K

    def shared_memory(self, group_size: int, packed: bool = False, id_words: int = 1) -> int:
        """Bytes of the stages and the ring of column ids, `id_words` 32-bit words each.

        A packed step has half the values, and their pairs.
        """
        weights = group_size + 2 * group_size // WORD if packed else 2 * group_size
        slot = self.stages * (weights + 2 * self.block_tokens) + 4 * id_words * (self.stages + self.ahead)
        return slot * self.block_k


@functools.lru_cache(maxsize=256)
def schedule(
    segments: tuple[tuple[int, int], ...], token_tiles: int, programs: int, band: int, block_k: int = BLOCK_K
) -> np.ndarray:
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


def dealt(program, i, *, groups: int, steps: int, token_tiles: int, programs: int, band: int) -> tuple:
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


def product(
    values, columns, rows, x, bias, pairs=None, addend=None,
    *, m, n, segments, activation, config: Config, multiprocessors: int, sentinels: bool = False,
    window: Window | None = None,
):  # fmt: skip
    """Computes activation(W x + bias + addend), feature-major; a convolution has x as `ptx.gather` reads it.

    Args:
        values: (P, V) bfloat16 or float16, V = 64, 128 or 256; (P / 2, V) with `pairs`.
        columns: (P,) int32 in 0..K-1; with a window the ids of `ptx.gather`, flat.
        rows: (R * V,) int32.
        x: (K, N) of the values' dtype, N rounded up to a multiple of 8; with a window (C H W, B), B a multiple of 8.
        bias: (M,) of the same dtype, or None.
        pairs: None, or the pairs of packed 2:4 values, (P / 16, V) uint16 as `wide_pairs` makes them.
        addend: (M, N) of the same dtype, or None.
        m: M.
        n: N.
        segments: as in `schedule`.
        activation: see `matmul`.
        config: a legal config.
        multiprocessors: of the GPU.
        sentinels: whether a column may be K; it then stands for an input of zeros.
        window: the geometry of a convolution, or None.

    Returns:
        (M, N) of the values' dtype.
    """
    c, v, packed = config, values.shape[1], pairs is not None
    id_words = 1 if packed else columns.size // values.shape[0]
    groups, token_tiles = sum(count for count, _ in segments), pl.cdiv(n, c.block_tokens)
    tiles = groups * token_tiles
    programs = min(multiprocessors, tiles)
    lengths = {slots // c.block_k for _, slots in segments}
    work = deal = None
    if len(lengths) == 1:
        deal = functools.partial(
            dealt, groups=groups, steps=lengths.pop(), token_tiles=token_tiles, programs=programs, band=c.band
        )
    else:
        work = jnp.asarray(schedule(segments, token_tiles, programs, c.band, c.block_k))
    optional = {"work": work, "bias": bias, "addend": addend, "pairs": pairs}
    optional = {name: a for name, a in optional.items() if a is not None}

    def body(*refs):
        _body(*refs, config=c, v=v, m=m, n=n, tiles=tiles, programs=programs, deal=deal, given=tuple(optional),
              sentinels=sentinels, id_words=id_words, window=window, activation=activation)  # fmt: skip

    # The kernel's name in profiles.
    body.__name__ = "two_four_matmul" if packed else "row_grouped_matmul" if window is None else "row_grouped_conv"
    ring = c.stages + c.ahead
    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        scratch_types=(
            plgpu.SMEM((c.stages, c.block_k // 2 if packed else c.block_k, v), x.dtype, transforms=_tiled(v)),
            plgpu.SMEM((c.stages, c.block_k, c.block_tokens), x.dtype, transforms=_tiled(c.block_tokens)),
            plgpu.SMEM((ring, c.block_k * id_words), jnp.int32),
            plgpu.SMEM((2 * c.stages,), jnp.int32),  # the gather's own barriers, 8 bytes each
            plgpu.Barrier(num_barriers=c.stages, num_arrivals=2 if packed else 1),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(num_barriers=c.stages, num_arrivals=2),
            [plgpu.SMEM((c.stages, c.block_k // WORD, v), jnp.uint16, transforms=_tiled(v, 4))] if packed else [],
        ),
        **launch(programs),
    )
    return call(values, columns, rows, x, *optional.values())


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


def _tiled(width: int, rows: int = 8):
    """How two-byte operands lie in shared memory: some rows of up to 128 bytes to a tile, swizzled."""
    row = min(2 * width, 128)
    return (plgpu.TilingTransform((rows, row // 2)), plgpu.SwizzleTransform(row))


def _inline(function, *arg_types, result=None):
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=result)(lambda context, *args: function(*args))


def _activate(activation, y):
    """The activation of an accumulator. tanh is one instruction, its error below the rounding of a two-byte output."""
    if activation in (None, "relu"):
        return y if activation is None else jnp.maximum(y, 0.0)
    kind = plgpu.ShapeDtypeStruct(y.shape, y.dtype, layout=plgpu.Layout.WGMMA)
    return _inline({"gelu": ptx.gelu, "silu": ptx.silu}[activation], plgpu.Layout.WGMMA, result=kind)(y)


def _body(
    values, columns, rows, x, *refs,
    config, v, m, n, tiles, programs, deal, given, sentinels, id_words, window, activation,
):  # fmt: skip
    optional = dict(zip(given, refs, strict=False))
    work, bias, addend, pairs = (optional.get(name) for name in ("work", "bias", "addend", "pairs"))
    has_bias, has_addend, packed = bias is not None, addend is not None, pairs is not None
    y, a_tiles, b_tiles, ids, gathered, a_full, ids_full, empty, pair_tiles = refs[len(given) :]
    c = config
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    plain, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT
    _inline(functools.partial(ptx.init_barriers, count=c.stages, arrivals=ptx.WARPGROUP), plain)(gathered)
    count = lax.div(tiles - 1 - program, programs) + 1 if work is None else work[program, 0, 0]

    def entry(i):
        """First step, steps, group and token tile of the program's i-th tile."""
        return deal(program, i) if work is None else tuple(work[program, i + 1, field] for field in range(4))

    @pl.when(warpgroup == 2)
    def _produce():
        plgpu.set_max_registers(c.registers[1], action="decrease")
        copies = [(values, a_tiles), (pairs, *pair_tiles)] if packed else [(values, a_tiles)]
        _producer(copies, columns, x, b_tiles, ids, gathered, a_full, ids_full, empty,
                  entry=entry, count=count, config=c, n=n, sentinels=sentinels, id_words=id_words,
                  window=window)  # fmt: skip

    @pl.when(warpgroup < 2)
    def _consume():
        plgpu.set_max_registers(c.registers[0], action="increase")
        height, wide = (v // 2, c.block_tokens) if c.split == "rows" else (v, c.block_tokens // 2)
        rows_first, tokens_first = (height, 0) if c.split == "rows" else (0, wide)
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        wait = _inline(functools.partial(ptx.wait, stages=c.stages), plain, splat)
        registers, shape = plgpu.Layout._WGMMA_ACC_32BIT, (height, wide)
        running = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=registers)
        finished = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA)
        zeros = _inline(functools.partial(sparse.zeros, shape=shape, layout=registers), result=running)
        refs = (plgpu.RefType(transforms) for transforms in (_tiled(v), _tiled(v, 4), _tiled(c.block_tokens)))
        issue = _inline(sparse.multiply, registers, *refs, result=running)
        drain = _inline(sparse.drain, registers, result=finished)

        def of_rows(dtype):
            return plgpu.ShapeDtypeStruct((height,), dtype, layout=row_layout)

        def header(i):
            """Steps, group and token tile of a tile; behind the last one zeros."""
            return entry(jnp.minimum(i, count))[1:]

        def targets_of(group):
            load = functools.partial(ptx.stored_rows, count=height, layout=row_layout)
            return _inline(load, plain, splat, result=of_rows(jnp.int32))(rows, group * v + warpgroup * rows_first)

        def offsets_of(targets):
            if not has_bias:
                return None
            load = functools.partial(ptx.row_bias, m=m, layout=row_layout)
            return _inline(load, plain, row_layout, result=of_rows(jnp.float32))(bias, targets)

        def added_to(targets, token_tile):
            load = functools.partial(ptx.load_rows, height=height, width=wide, m=m, tokens=n)
            first_token = token_tile * c.block_tokens + warpgroup * tokens_first
            return _inline(load, plain, row_layout, splat, result=loaded)(addend, targets, first_token)

        loaded = plgpu.ShapeDtypeStruct((height, wide), x.dtype, layout=plgpu.Layout.WGMMA)
        # The addend too is read a tile ahead, where that leaves registers.
        early = has_addend and height * wide <= MOST_EARLY

        def multiply(i, carry):
            # What the epilogue reads comes a tile before it is needed: header, rows and bias are a chain of loads.
            step, steps, token_tile, targets, offsets, added, (next_steps, next_group, next_tile) = carry
            next_targets, after_next = targets_of(next_group), header(i + 2)
            next_added = added_to(next_targets, next_tile) if early else None

            def operands(now):
                """This consumer's part of a step's tiles, when they have arrived."""
                slot = lax.rem(now, c.stages)
                plgpu.barrier_wait(a_full.at[slot])
                wait(gathered, now)
                own_rows, own_tokens = pl.ds(warpgroup * height, height), pl.ds(warpgroup * wide, wide)
                if c.split == "rows":
                    return [t.at[slot, :, own_rows] for t in (a_tiles, *pair_tiles)], b_tiles.at[slot]
                return [t.at[slot] for t in (a_tiles, *pair_tiles)], b_tiles.at[slot, :, own_tokens]

            def release(now):
                plgpu.barrier_arrive(empty.at[lax.rem(now, c.stages)])

            def multiply_dense(acc):
                def one(k, _):
                    (a,), b = operands(step + k)
                    plgpu.wgmma(acc, a.transpose((1, 0)), b)
                    plgpu.wgmma_wait(1)  # all but the one just issued
                    pl.when(k > 0)(lambda: release(step + k - 1))

                lax.fori_loop(0, steps, one, None)
                plgpu.wgmma_wait(0)
                pl.when(steps > 0)(lambda: release(step + steps - 1))
                return acc[...]

            def multiply_sparse():
                def one(k, acc):
                    (a, pairs), b = operands(step + k)
                    acc = issue(acc, a, pairs, b)  # waits for all that was issued before
                    pl.when(k > 0)(lambda: release(step + k - 1))
                    return acc

                acc = drain(lax.fori_loop(0, steps, one, zeros()))
                pl.when(steps > 0)(lambda: release(step + steps - 1))
                return acc

            if packed:
                out = multiply_sparse()
            else:
                out = pl.run_scoped(multiply_dense, plgpu.ACC((height, wide), jnp.float32))
            next_offsets = offsets_of(next_targets)
            if has_bias:
                out = out + lax.broadcast_in_dim(offsets, (height, wide), (0,))
            first_token = token_tile * c.block_tokens + warpgroup * tokens_first
            if has_addend:
                added = added if early else added_to(targets, token_tile)
                added = _inline(ptx.exchange_rows, plgpu.Layout.WGMMA, result=loaded)(added)
                out = out + added.astype(jnp.float32)
            out = _activate(activation, out).astype(x.dtype)
            store = functools.partial(ptx.store_rows, m=m, tokens=n)
            _inline(store, plain, plgpu.Layout.WGMMA, row_layout, splat)(y, out, targets, first_token)
            return step + steps, next_steps, next_tile, next_targets, next_offsets, next_added, after_next

        steps, group, token_tile = header(0)
        targets = targets_of(group)
        added = added_to(targets, token_tile) if early else None
        carry = jnp.int32(0), steps, token_tile, targets, offsets_of(targets), added, header(1)
        lax.fori_loop(0, count, multiply, carry)


def _producer(
    copies, columns, x, b_tiles, ids, gathered, a_full, ids_full, empty,
    *, entry, count, config, n, sentinels, id_words, window,
):  # fmt: skip
    """Fills the ring, tile after tile: by TMA from every (source, tiles) in `copies`, and by the gather."""
    c = config
    ring = c.stages + c.ahead
    plain, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT
    gather = _inline(
        functools.partial(
            ptx.gather, tokens=x.shape[1] if window is None else n, block_k=c.block_k, block_tokens=c.block_tokens,
            first=2 * ptx.WARPGROUP, sentinel=x.shape[0] if sentinels else None, window=window, masked=id_words == 2,
        ),
        plain, plain, plgpu.RefType(_tiled(c.block_tokens)), plain, splat, splat,
    )  # fmt: skip

    def fetch_ids(step, cursor):
        """Fetches the ids of a step, `cursor` telling where they are: (tile, block of slots, steps left)."""
        tile, block, left = cursor
        place = lax.rem(step, ring)

        @pl.when(left > 0)
        def _copy():
            some = pl.ds(block * c.block_k * id_words, c.block_k * id_words)
            plgpu.copy_gmem_to_smem(columns.at[some], ids.at[place], ids_full.at[place])

        # Behind the last tile a row of zeros ends it: no steps left, and never exactly one again.
        return lax.cond(
            left == 1,
            lambda: (tile + 1, *entry(tile + 1)[:2]),
            lambda: (tile, block + 1, left - 1),
        )

    def copy_weights(step, block):
        slot = lax.rem(step, c.stages)
        for source, tiles in copies:
            rows = tiles.shape[1]
            piece = source.at[pl.ds(block * rows, rows)]
            plgpu.copy_gmem_to_smem(piece, tiles.at[slot], a_full.at[slot])

    def tile(i, carry):
        block, steps, _, token_tile = entry(i)

        def one(k, carry):
            step, cursor = carry
            slot, place = lax.rem(step, c.stages), lax.rem(step, ring)

            @pl.when(step >= c.stages)
            def _wait_for_room():
                plgpu.barrier_wait(empty.at[slot])

            pl.when(step >= early)(lambda: copy_weights(step, block + k))
            # The consumers are done with the step that used this place of the ring, so all threads have read it.
            cursor = fetch_ids(step + c.ahead, cursor)
            plgpu.barrier_wait(ids_full.at[place])
            gather(x, ids.at[place], b_tiles.at[slot], gathered, token_tile, slot)
            return step + 1, cursor

        return lax.fori_loop(0, steps, one, carry)

    first, steps, *_ = entry(0)
    cursor = jnp.int32(0), first, steps
    cursor = lax.fori_loop(0, c.ahead, fetch_ids, cursor)
    # The first weights need not wait for the first ids.
    early = jnp.minimum(steps, c.stages)
    lax.fori_loop(0, early, lambda k, _: copy_weights(k, first + k), None)
    lax.fori_loop(0, count, tile, (jnp.int32(0), cursor))
