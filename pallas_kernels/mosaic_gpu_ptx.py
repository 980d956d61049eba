"""What the Mosaic GPU kernel does below Pallas: the gather, its barriers, and stores to permuted rows.

Every function here is the body of a `plgpu.inline_mgpu` call: it runs at lowering, takes references to memory as MLIR
values and arrays as registers of a thread, and emits the instructions of one thread. A warpgroup is 128 threads.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

WARPGROUP = 128
CHUNK = 16  # bytes that one asynchronous copy moves: eight two-byte tokens
TILE_ROWS, TILE_BYTES = 8, 128  # the unit of the swizzled layout: eight rows of up to 128 bytes to a tile


def init_barriers(barriers, *, count: int, arrivals: int) -> None:
    """Makes `count` barriers of `arrivals` arrivals each, and lets every thread of the program see them."""
    first = _is_equal(_thread(), 0)
    with utils.when(first):
        for i in range(count):
            address = arith.addi(_shared(barriers), _i32(8 * i))
            _emit("mbarrier.init.shared::cta.b64 [$0], $1;", [address, _i32(arrivals)])
        _emit("fence.proxy.async;", [])
    _emit("bar.sync 0;", [])


def wait(barriers, step, *, stages: int) -> None:
    """Waits until the gather of a step has arrived, and makes what it wrote visible to the tensor cores."""
    step = step.registers.item()
    address = _barrier(barriers, arith.remui(step, _i32(stages)))
    parity = arith.andi(arith.divui(step, _i32(stages)), _i32(1))
    loop = (
        "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
        "@done bra OVER; bra AGAIN; OVER: }"
    )
    _emit(loop, [address, parity])
    # The copies of the gather are ordinary writes; the tensor cores read through another path.
    _emit("fence.proxy.async.shared::cta;", [])


def gather(
    x, ids, tile, barriers, token_tile, slot, *, tokens: int, block_k: int, block_tokens: int, first: int,
    sentinel: int | None = None,
) -> None:  # fmt: skip
    """Starts copying `block_k` rows of the activations, `block_tokens` wide, to shared memory.

    The warpgroup's threads share the 16-byte chunks: neighbours take neighbouring chunks of a row. A chunk lands where
    the swizzle of 128 bytes, or of narrower rows, puts it. When a thread's copies are done, they arrive on the barrier
    of the slot by themselves.

    Args:
        x: (K, tokens) in global memory.
        ids: (block_k,) int32 in shared memory, the rows to copy.
        tile: (block_k, block_tokens) in shared memory, tiled and swizzled.
        barriers: as in `init_barriers`.
        token_tile: which tile of tokens; chunks behind the last token repeat the last chunk.
        slot: stage of the pipeline, the index of the barrier.
        tokens: N, a multiple of 8.
        block_k: rows.
        block_tokens: tokens of a tile.
        first: index of the warpgroup's first thread in the program.
        sentinel: an id that stands for a row of zeros, K; None where there is none.
    """
    # Eight tokens fill one chunk of a row. The others then keep what was there: nothing of it is ever stored.
    chunks = max(1, WARPGROUP // block_k) if tokens == 8 else block_tokens * 2 // CHUNK
    rows_apart = WARPGROUP // chunks
    thread = arith.subi(_thread(), _i32(first))
    chunk, row = arith.remui(thread, _i32(chunks)), arith.divui(thread, _i32(chunks))
    start = arith.addi(_mul(token_tile.registers.item(), block_tokens * 2), _mul(chunk, CHUNK))
    start = arith.minui(start, _i32(tokens * 2 - CHUNK))
    source = arith.addi(_global(x), _wide(start))
    target, ids = _shared(tile), _shared(ids)
    row_bytes = min(block_tokens * 2, TILE_BYTES)
    tiles_in_row, row_chunks = block_tokens * 2 // row_bytes, row_bytes // CHUNK
    tile_in_row, chunk_in_tile = arith.divui(chunk, _i32(row_chunks)), arith.remui(chunk, _i32(row_chunks))
    rows = [arith.addi(row, _i32(rows_apart * i)) for i in range(block_k // rows_apart)]
    i32 = ir.IntegerType.get_signless(32)
    for part in range(0, len(rows), 16):  # more ids at once would take too many registers
        some = rows[part : part + 16]
        columns = [_emit("ld.shared.b32 $0, [$1];", [arith.addi(ids, _mul(r, 4))], i32) for r in some]
        for r, column in zip(some, columns, strict=True):
            in_tile = arith.remui(r, _i32(TILE_ROWS))
            index = arith.addi(_mul(arith.divui(r, _i32(TILE_ROWS)), tiles_in_row), tile_in_row)
            offset = arith.addi(_mul(index, TILE_ROWS * row_bytes), _mul(in_tile, row_bytes))
            turn = arith.divui(in_tile, _i32(TILE_ROWS // row_chunks))
            offset = arith.addi(offset, _mul(arith.xori(turn, chunk_in_tile), CHUNK))
            size = []
            if sentinel is not None:  # a copy of no bytes writes zeros
                real = arith.cmpi(arith.CmpIPredicate.ult, column, _i32(sentinel))
                column, size = arith.select(real, column, _i32(0)), [arith.select(real, _i32(CHUNK), _i32(0))]
            address = arith.addi(source, arith.muli(_wide(column), _i64(tokens * 2)))
            copy = f"cp.async.cg.shared.global [$0], [$1], {CHUNK}" + (", $2;" if size else ";")
            _emit(copy, [arith.addi(target, offset), address, *size])
    barrier = _barrier(barriers, slot.registers.item())
    _emit("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [barrier])


def stored_rows(rows, first, *, count: int, layout):
    """Loads where the rows of an accumulator go: (count,) int32, `rows[first:first + count]` in the given layout."""
    i32 = ir.IntegerType.get_signless(32)
    at = arith.addi(first.registers.item(), _row_of_thread())
    found = []
    for i in range(count // 8 // 8):
        for half in range(2):
            index = arith.addi(at, _i32(64 * i + 8 * half))
            address = arith.addi(_global(rows), arith.muli(_wide(index), _i64(4)))
            found.append(_emit("ld.global.nc.b32 $0, [$1];", [address], i32))
    return _row_array(found, count, layout, is_signed=True)


def row_bias(bias, rows, *, m: int, layout):
    """Loads a (M,) two-byte bias at some rows, as float32, zero for rows that are not below M; see `stored_rows`."""
    i32, i16, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16), ir.F32Type.get()
    dtype = ir.MemRefType(bias.type).element_type
    found = []
    for row in map(_scalar, rows.registers.flat):
        real = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(m))
        index = arith.select(real, row, _i32(0))
        address = arith.addi(_global(bias), arith.muli(_wide(index), _i64(2)))
        bits = arith.trunci(i16, _emit("{ .reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h; }", [address], i32))
        value = arith.extf(f32, arith.bitcast(dtype, bits))
        found.append(arith.select(real, value, utils.c(0.0, f32)))
    return _row_array(found, rows.registers.size * 32, layout, is_signed=None)


def store_rows(y, tile, rows, first_token, *, m: int, tokens: int) -> None:
    """Stores a (rows, tokens) two-byte tile, each row where `rows` says; rows and tokens out of range are dropped.

    A thread holds two neighbouring tokens of every eight. Four neighbouring threads exchange theirs, so that each has
    eight tokens in a row to store at once, and the four together 64 bytes. Tiles too narrow for that, and rows that do
    not begin at whole 16 bytes, are stored by pairs or by single tokens.

    Args:
        y: (M, tokens) in global memory.
        tile: registers in the layout of a wgmma accumulator.
        rows: from `stored_rows`.
        first_token: token of the tile's first column.
        m: M.
        tokens: N.
    """
    if tile.shape[1] % 32 or tokens % 8:
        _store_pairs(y, tile, rows, first_token, m=m, tokens=tokens)
        return
    i32 = ir.IntegerType.get_signless(32)
    height, width = tile.shape
    # What a thread holds more than one of: 64-row blocks, eight-token blocks, halves of its warp's 16 rows.
    packed = _objects([utils.bitcast(r, i32) for r in tile.registers.flat]).reshape(height // 64, width // 8, 2)
    quad = arith.remui(_thread(), _i32(4))
    token = arith.addi(first_token.registers.item(), _mul(quad, 8))
    base = _global(y)
    for index, row in enumerate(map(_scalar, rows.registers.flat)):
        block, half = divmod(index, 2)
        live_row = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(m))
        start = arith.addi(base, arith.muli(_wide(row), _i64(tokens * 2)))
        for i in range(0, width // 8, 4):
            words = _exchange(list(packed[block, i : i + 4, half]), quad)
            at = arith.addi(token, _i32(8 * i))
            live = arith.andi(live_row, arith.cmpi(arith.CmpIPredicate.ult, at, _i32(tokens)))
            address = arith.addi(start, arith.muli(_wide(at), _i64(2)))
            store = "{ .reg .pred live; setp.ne.b32 live, $5, 0; @live st.global.v4.b32 [$0], {$1, $2, $3, $4}; }"
            _emit(store, [address, *words, arith.extui(i32, live)])


def _store_pairs(y, tile, rows, first_token, *, m: int, tokens: int) -> None:
    """`store_rows` without the exchange."""
    i32 = ir.IntegerType.get_signless(32)
    height, width = tile.shape
    packed = _objects([utils.bitcast(r, i32) for r in tile.registers.flat]).reshape(height // 64, width // 8, 2)
    token = arith.addi(first_token.registers.item(), _mul(arith.remui(_thread(), _i32(4)), 2))
    stores = ["{ .reg .pred live; setp.ne.b32 live, $2, 0; @live st.global.b32 [$0], $1; }"]
    if tokens % 2:
        single = "{{ .reg .pred live; .reg .b16 low, high; setp.ne.b32 live, $2, 0; mov.b32 {{low, high}}, $1; "
        single += "@live st.global.b16 [$0], {}; }}"
        stores = [single.format("low"), single.format("high")]
    for index, row in enumerate(map(_scalar, rows.registers.flat)):
        block, half = divmod(index, 2)
        live_row = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(m))
        start = arith.addi(_global(y), arith.muli(_wide(row), _i64(tokens * 2)))
        for i in range(width // 8):
            for j, store in enumerate(stores):
                at = arith.addi(token, _i32(8 * i + j))
                live = arith.andi(live_row, arith.cmpi(arith.CmpIPredicate.ult, at, _i32(tokens)))
                address = arith.addi(start, arith.muli(_wide(at), _i64(2)))
                _emit(store, [address, packed[block, i, half], arith.extui(i32, live)])


def _exchange(words, quad):
    """Transposes four words across four neighbouring threads: thread q gets word q of each, in the threads' order."""
    words = list(words)
    for distance in (1, 2):
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(quad, _i32(distance)), _i32(0))
        for i in range(4):
            if i & distance:
                continue
            low, high = words[i], words[i + distance]
            received = utils.shfl_bfly(arith.select(upper, low, high), distance)
            words[i] = arith.select(upper, received, low)
            words[i + distance] = arith.select(upper, high, received)
    return words


def _row_of_thread():
    """The first row of a 64-row accumulator block that this thread holds."""
    thread = arith.remui(_thread(), _i32(WARPGROUP))
    warp, lane = arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))
    return arith.addi(_mul(warp, 16), arith.divui(lane, _i32(4)))


def _row_array(values, count: int, layout, is_signed):
    shape = layout.to_mgpu().registers_shape((count,))
    kind = ir.VectorType.get((1,), values[0].type)
    registers = _objects([vector.broadcast(kind, value) for value in values])
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout.to_mgpu(), _is_signed=is_signed)


def _objects(values) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _scalar(register):
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _emit(ptx: str, operands, result: ir.Type | None = None) -> Any:
    """One inline-PTX operation: integers only, 32 or 64 bits wide, and at most one 32-bit result."""
    constraints = ["l" if o.type == ir.IntegerType.get_signless(64) else "r" for o in operands]
    constraints = (["=r"] if result is not None else []) + constraints
    kind = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(kind, operands, ptx, ",".join(constraints), asm_dialect=0, has_side_effects=True)


def _i32(value: int):
    return utils.c(value, ir.IntegerType.get_signless(32))


def _i64(value: int):
    return utils.c(value, ir.IntegerType.get_signless(64))


def _mul(value, factor: int):
    return arith.muli(value, _i32(factor))


def _wide(value):
    return arith.extui(ir.IntegerType.get_signless(64), value)


def _is_equal(value, constant: int):
    return arith.cmpi(arith.CmpIPredicate.eq, value, _i32(constant))


def _thread():
    return utils.thread_idx()


def _shared(ref):
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _global(ref):
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def _barrier(barriers, index):
    return arith.addi(_shared(barriers), _mul(index, 8))
