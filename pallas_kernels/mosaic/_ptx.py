"""What the Mosaic GPU kernel does below Pallas: the gather, its barriers, and stores to permuted rows.

Every function here is the body of a `plgpu.inline_mgpu` call: it runs at lowering, takes references to memory as MLIR
values and arrays as registers of a thread, and emits the instructions of one thread. A warpgroup is 128 threads.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels._activations import GELU
from pallas_kernels._window import Window

Value = Any  # an MLIR value, whose bindings have no types: a number of this thread, or a reference to memory
Registers = Any  # an array in the registers of a warpgroup's threads, `fa.FragmentedArray`
WARPGROUP = 128
CHUNK = 16  # bytes that one asynchronous copy moves: eight two-byte tokens
ROWS_APART = 16  # of the rows that one thread copies 16 of 128 bytes of
TILE_ROWS, TILE_BYTES = 8, 128  # the unit of the swizzled layout: eight rows of up to 128 bytes to a tile


def init_barriers(barriers: Value, *, count: int, arrivals: int) -> None:
    """Makes `count` barriers of `arrivals` arrivals each, and lets every thread of the program see them."""
    thread = _thread()
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, _i32(count))):
        _emit("mbarrier.init.shared::cta.b64 [$0], $1;", [_barrier(barriers, thread), _i32(arrivals)])
    gpu.barrier()


def wait(barriers: Value, step: Registers, *, stages: int) -> None:
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
    x: Value, ids: Value, tile: Any, barriers: Value, token_tile: Registers, slot: Registers,
    *, tokens: int, block_k: int, block_tokens: int, first: int,
    sentinel: int | None = None, window: Window | None = None, masked: bool = False,
) -> None:  # fmt: skip
    """Starts copying `block_k` rows of the right side, `block_tokens` wide, to shared memory.

    The warpgroup's threads share the 16-byte chunks: neighbours take neighbouring chunks of a row. A chunk lands where
    the swizzle of 128 bytes, or of narrower rows, puts it. When a thread's copies are done, they arrive on the barrier
    of the slot by themselves.

    With a window the right side is that of a convolution, which is stored nowhere: a token is an output position and
    an image, a chunk eight images of one position, and zeros where a slot's tap falls outside of the image.

    Args:
        x: (K, tokens) in global memory; with a window (C H W, B), B a multiple of 8.
        ids: (block_k,) int32 in shared memory, the rows to copy. With a window how many pixels a slot's tap lies behind
            an output position's first tap; if `masked` (block_k, 2), the second the bits of the tap, see
            `gpu._layout.slot_places`.
        tile: (block_k, block_tokens) in shared memory, tiled and swizzled.
        barriers: as in `init_barriers`.
        token_tile: which tile of tokens; of those behind the last token nothing is copied.
        slot: stage of the pipeline, the index of the barrier.
        tokens: N, a multiple of 8.
        block_k: rows.
        block_tokens: tokens of a tile.
        first: index of the warpgroup's first thread in the program.
        sentinel: an id that stands for a row of zeros, K; None where there is none.
        window: the geometry of a convolution, or None.
        masked: whether a slot's tap may be outside of the image, or a slot have none.
    """
    # Eight tokens fill one chunk of a row.
    chunks = max(1, WARPGROUP // block_k) if tokens == 8 else block_tokens * 2 // CHUNK
    rows_apart = WARPGROUP // chunks
    thread = arith.subi(_thread(), _i32(first))
    chunk, row = arith.remui(thread, _i32(chunks)), arith.divui(thread, _i32(chunks))
    token = arith.addi(_mul(token_tile.registers.item(), block_tokens), _mul(chunk, CHUNK // 2))
    if window is None:
        start, inside, pitch = _wide(_mul(token, 2)), _i32(0), tokens * 2
    else:
        batch = tokens // window.output_pixels
        start, inside = _corner(token, window, batch)
        pitch = batch * 2
    source, target, ids = arith.addi(_global(x), start), _shared(tile), _shared(ids)
    row_bytes = min(block_tokens * 2, TILE_BYTES)
    tiles_in_row, row_chunks = block_tokens * 2 // row_bytes, row_bytes // CHUNK
    tile_in_row, chunk_in_tile = arith.divui(chunk, _i32(row_chunks)), arith.remui(chunk, _i32(row_chunks))
    rows = [arith.addi(row, _i32(rows_apart * i)) for i in range(block_k // rows_apart)]
    # Behind the last token the tile keeps what was there: nothing of it is ever stored.
    live = arith.cmpi(arith.CmpIPredicate.ult, token, _i32(tokens))
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    with utils.when(live) if tokens % block_tokens else contextlib.nullcontext():
        for part in range(0, len(rows), 16):  # more ids at once would take too many registers
            some = rows[part : part + 16]
            if masked:
                columns = [_emit("ld.shared.b64 $0, [$1];", [arith.addi(ids, _mul(r, 8))], i64) for r in some]
            else:
                columns = [_emit("ld.shared.b32 $0, [$1];", [arith.addi(ids, _mul(r, 4))], i32) for r in some]
            for r, column in zip(some, columns, strict=True):
                in_tile = arith.remui(r, _i32(TILE_ROWS))
                index = arith.addi(_mul(arith.divui(r, _i32(TILE_ROWS)), tiles_in_row), tile_in_row)
                offset = arith.addi(_mul(index, TILE_ROWS * row_bytes), _mul(in_tile, row_bytes))
                turn = arith.divui(in_tile, _i32(TILE_ROWS // row_chunks))
                offset = arith.addi(offset, _mul(arith.xori(turn, chunk_in_tile), CHUNK))
                place = arith.addi(target, offset)
                size: list[Value] = []  # bytes to read; the others of the 16 are zeros
                if masked:
                    bits, column = arith.trunci(i32, arith.shrui(column, _i64(32))), arith.trunci(i32, column)
                    met = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(bits, inside), bits)
                    size = [arith.select(met, _i32(CHUNK), _i32(0))]
                elif sentinel is not None:
                    real = arith.cmpi(arith.CmpIPredicate.ult, column, _i32(sentinel))
                    column, size = arith.select(real, column, _i32(0)), [arith.select(real, _i32(CHUNK), _i32(0))]
                address = arith.addi(source, arith.muli(_wide(column), _i64(pitch)))
                copy = f"cp.async.cg.shared.global [$0], [$1], {CHUNK}" + (", $2;" if size else ";")
                _emit(copy, [place, address, *size])
    barrier = _barrier(barriers, slot.registers.item())
    _emit("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [barrier])


def copied_rows(ids: Value, first: Registers, *, count: int, most: int, layout: Any) -> Any:
    """Loads which rows this thread copies: the ids `first + row` for every 16th row of `count`, see `copy_rows`.

    Args:
        ids: int32 in global memory.
        first: index of the tile's first id.
        count: rows of the tile.
        most: the last index there is; what lies behind it repeats its id.
        layout: of the result, a register for each row.
    """
    i32 = ir.IntegerType.get_signless(32)
    row, _ = _row_and_chunk()
    found = []
    for i in range(count // ROWS_APART):
        index = arith.addi(arith.addi(first.registers.item(), row), _i32(ROWS_APART * i))
        address = arith.addi(_global(ids), arith.muli(_wide(arith.minui(index, _i32(most))), _i64(4)))
        found.append(_emit("ld.global.nc.b32 $0, [$1];", [address], i32))
    return _row_array(found, count * WARPGROUP // ROWS_APART, layout, is_signed=True)


def copy_rows(x: Value, ids: Value, tile: Any, step: Registers, *, tokens: int) -> None:
    """Starts copying 64 tokens of some rows, `step` times 64 tokens into them, to swizzled shared memory.

    Eight neighbouring threads copy the 128 bytes of a row; a thread copies one chunk of every 16th row.

    Args:
        x: (rows, tokens) of two-byte numbers in global memory.
        ids: from `copied_rows`.
        tile: (rows of the tile, 64) in shared memory, tiled and swizzled.
        step: which tokens.
        tokens: N, a multiple of 64.
    """
    row, chunk = _row_and_chunk()
    start = arith.addi(_mul(step.registers.item(), TILE_BYTES), _mul(chunk, CHUNK))
    source = arith.addi(_global(x), _wide(start))
    place = _mul(arith.xori(arith.remui(row, _i32(TILE_ROWS)), chunk), CHUNK)
    target = arith.addi(_shared(tile), arith.addi(_mul(row, TILE_BYTES), place))
    for i, column in enumerate(map(_scalar, ids.registers.flat)):
        address = arith.addi(source, arith.muli(_wide(column), _i64(tokens * 2)))
        to = arith.addi(target, _i32(ROWS_APART * TILE_BYTES * i))
        _emit(f"cp.async.cg.shared.global [$0], [$1], {CHUNK};", [to, address])


def arrive(barriers: Value, slot: Registers) -> None:
    """Lets the copies this thread has started arrive on the barrier of a slot when they are done."""
    barrier = _barrier(barriers, slot.registers.item())
    _emit("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [barrier])


def counted_rows(first: Registers, end: Registers, *, count: int, none: int, layout: Any) -> Any:
    """The numbers of the rows of an accumulator, `first` and on, `none` for those from `end` on; see `stored_rows`."""
    at = arith.addi(first.registers.item(), _row_of_thread())
    found = []
    for i in range(count // 8 // 8):
        for half in range(2):
            index = arith.addi(at, _i32(64 * i + 8 * half))
            live = arith.cmpi(arith.CmpIPredicate.ult, index, end.registers.item())
            found.append(arith.select(live, index, _i32(none)))
    return _row_array(found, count, layout, is_signed=True)


def _corner(token: Value, window: Window, batch: int) -> tuple[Value, ...]:
    """Where a token's output position has its first tap, in bytes from the first pixel, and the bits of its taps.

    A tap has the bits i and kh + j: of its row and its column of the filter, if those lie inside of the image.
    """
    position, image = arith.divui(token, _i32(batch)), arith.remui(token, _i32(batch))
    width = _i32(window.outputs[1])
    starts = [
        arith.subi(_mul(at, stride), _i32(low))
        for at, stride, (low, _) in zip(
            (arith.divui(position, width), arith.remui(position, width)), window.strides, window.padding, strict=True
        )
    ]
    pixel = arith.addi(_mul(starts[0], window.image[1]), starts[1])
    start = arith.addi(arith.muli(_signed(pixel), _i64(batch * 2)), _wide(_mul(image, 2)))
    inside, first = _i32(0), 0
    for at, taps, d, size in zip(starts, window.kernel, window.dilation, window.image, strict=True):
        for tap in range(taps):
            # Unsigned, a negative place is a large one.
            real = arith.cmpi(arith.CmpIPredicate.ult, arith.addi(at, _i32(tap * d)), _i32(size))
            inside = arith.ori(inside, arith.select(real, _i32(1 << (first + tap)), _i32(0)))
        first += taps
    return start, inside


def stored_rows(rows: Any, first: Registers, *, count: int, layout: Any) -> Any:
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


def row_bias(bias: Value, rows: Any, *, m: int, layout: Any) -> Any:
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


def gelu(y: Value) -> Any:
    """Computes gelu (the tanh approximation) of an accumulator: four multiplications or fused ones beside the tanh.

    The compiler fuses no multiplication with an addition by itself, and the epilogue is bound by its instructions.
    """
    inner = y * _fused(y * y, GELU[1], GELU[0])
    half = y * 0.5
    return _fused(half, inner.tanh(approx=True), half)


def silu(y: Value) -> Any:
    """Computes silu of an accumulator; see `gelu`."""
    half = y * 0.5
    return _fused(half, half.tanh(approx=True), half)


def _fused(a: Any, b: Any, c: Any) -> Any:
    """Computes a * b + c with one rounding; a is an array of float32, b and c are such arrays or numbers."""

    def registers(other: Any) -> Any:
        if isinstance(other, fa.FragmentedArray):
            return list(other.registers.flat)
        kind = a.registers.flat[0].type
        return [
            arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, ir.FloatAttr.get_f32(other)))
        ] * a.registers.size

    found = _objects([mlir_math.fma(*values) for values in zip(registers(a), registers(b), registers(c), strict=True)])
    return fa.FragmentedArray(_registers=found.reshape(a.registers.shape), _layout=a.layout, _is_signed=None)


def store_rows(y: Value, tile: Any, rows: Any, first_token: Registers, *, m: int, tokens: int) -> None:
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
    packed, quad = _words(tile), arith.remui(_thread(), _i32(4))
    for block, i, half, address, live in _runs(y, rows, first_token, tile.shape[1], m, tokens):
        words = _exchange(list(packed[block, i : i + 4, half]), quad)
        store = "{ .reg .pred live; setp.ne.b32 live, $5, 0; @live st.global.v4.b32 [$0], {$1, $2, $3, $4}; }"
        _emit(store, [address, *words, live])


def load_rows(x: Value, rows: Any, first_token: Registers, *, height: int, width: int, m: int, tokens: int) -> Any:
    """Starts loading what `store_rows` would store: a (height, width) two-byte tile, zeros where it is out of range.

    Args:
        x: (M, tokens) in global memory.
        rows: as in `store_rows`.
        first_token: as in `store_rows`.
        height: rows of the tile.
        width: tokens of the tile.
        m: M.
        tokens: N, a multiple of 8.

    Returns:
        The registers of the tile, as they come from memory: `exchange_rows` puts them in order when they are needed.
    """
    dtype = ir.MemRefType(x.type).element_type
    packed = np.empty((height // 64, width // 8, 2), dtype=object)
    for block, i, half, address, live in _runs(x, rows, first_token, width, m, tokens):
        packed[block, i : i + 4, half] = _load_words(address, live)
    return _accumulator(packed, dtype)


def exchange_rows(tile: Any) -> Any:
    """Puts what `load_rows` returned in the order of a wgmma accumulator."""
    packed = _words(tile)
    quad = arith.remui(_thread(), _i32(4))
    for block, half in np.ndindex(packed.shape[0], 2):
        for i in range(0, packed.shape[1], 4):
            # To exchange is its own inverse.
            packed[block, i : i + 4, half] = _exchange(list(packed[block, i : i + 4, half]), quad)
    return _accumulator(packed, tile.mlir_dtype)


def _words(tile: Any) -> Any:
    """The 32-bit registers that a thread holds of a two-byte tile in the layout of a wgmma accumulator.

    Returns:
        An array of them: by 64-row block, eight-token block, and half of the warp's 16 rows.
    """
    height, width = tile.shape
    words = _objects([utils.bitcast(r, ir.IntegerType.get_signless(32)) for r in tile.registers.flat])
    return words.reshape(height // 64, width // 8, 2)


def _accumulator(words: Any, dtype: ir.Type) -> Any:
    """The inverse of `_words`."""
    blocks, eights, _ = words.shape
    registers = _objects([utils.bitcast(word, ir.VectorType.get((2,), dtype)) for word in words.flat])
    registers = registers.reshape(fa.WGMMA_LAYOUT.registers_shape((64 * blocks, 8 * eights)))
    return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def _runs(array: Any, rows: Any, first_token: Registers, width: int, m: int, tokens: int) -> Iterator[Any]:
    """The 16-byte runs of a (M, tokens) array that a thread holds of a tile after an exchange.

    Yields:
        (64-row block, first of four eight-token blocks, half of the warp's 16 rows, address, 1 if it is in range).
    """
    token = arith.addi(first_token.registers.item(), _mul(arith.remui(_thread(), _i32(4)), 8))
    base = _global(array)
    for index, row in enumerate(map(_scalar, rows.registers.flat)):
        block, half = divmod(index, 2)
        live_row = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(m))
        start = arith.addi(base, arith.muli(_wide(row), _i64(tokens * 2)))
        for i in range(0, width // 8, 4):
            at = arith.addi(token, _i32(8 * i))
            live = arith.andi(live_row, arith.cmpi(arith.CmpIPredicate.ult, at, _i32(tokens)))
            address = arith.addi(start, arith.muli(_wide(at), _i64(2)))
            yield block, i, half, address, arith.extui(ir.IntegerType.get_signless(32), live)


def _load_words(address: Value, live: Value) -> list[Value]:
    """Four 32-bit words of global memory, zeros where `live` is 0."""
    i32 = ir.IntegerType.get_signless(32)
    load = (
        "{ .reg .pred live; setp.ne.b32 live, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@live ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    kind, constraints = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"), "=&r,=&r,=&r,=&r,l,r"
    words: Any = llvm.inline_asm(kind, [address, live], load, constraints, asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(i32, words, [i]) for i in range(4)]


def _store_pairs(y: Value, tile: Any, rows: Any, first_token: Registers, *, m: int, tokens: int) -> None:
    """`store_rows` without the exchange."""
    i32 = ir.IntegerType.get_signless(32)
    width = tile.shape[1]
    packed = _words(tile)
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


def _exchange(words: Any, quad: Value) -> Any:
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


def _row_and_chunk() -> Any:
    """The first row this thread copies 16 bytes of, and which 16 of its 128 bytes; the same in every warpgroup."""
    thread = arith.remui(_thread(), _i32(WARPGROUP))
    chunks = _i32(TILE_BYTES // CHUNK)
    return arith.divui(thread, chunks), arith.remui(thread, chunks)


def _row_of_thread() -> Any:
    """The first row of a 64-row accumulator block that this thread holds."""
    thread = arith.remui(_thread(), _i32(WARPGROUP))
    warp, lane = arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))
    return arith.addi(_mul(warp, 16), arith.divui(lane, _i32(4)))


def _row_array(values: Any, count: int, layout: Any, is_signed: bool | None) -> Any:
    shape = layout.to_mgpu().registers_shape((count,))
    kind = ir.VectorType.get((1,), values[0].type)
    registers = _objects([vector.broadcast(kind, value) for value in values])
    return fa.FragmentedArray(_registers=registers.reshape(shape), _layout=layout.to_mgpu(), _is_signed=is_signed)


def _objects(values: Any) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _scalar(register: Value) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _emit(ptx: str, operands: Sequence[Value], result: ir.Type | None = None) -> Any:
    """One inline-PTX operation: integers only, 32 or 64 bits wide, and at most one result."""
    i64 = ir.IntegerType.get_signless(64)
    constraints = ["l" if o.type == i64 else "r" for o in operands]
    constraints = ([] if result is None else ["=l" if result == i64 else "=r"]) + constraints
    kind = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(kind, operands, ptx, ",".join(constraints), asm_dialect=0, has_side_effects=True)


def _i32(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _i64(value: int) -> Any:
    return utils.c(value, ir.IntegerType.get_signless(64))


def _mul(value: Value, factor: int) -> Any:
    return arith.muli(value, _i32(factor))


def _wide(value: Value) -> Any:
    return arith.extui(ir.IntegerType.get_signless(64), value)


def _signed(value: Value) -> Any:
    return arith.extsi(ir.IntegerType.get_signless(64), value)


def _is_equal(value: Value, constant: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, value, _i32(constant))


def _thread() -> Any:
    return utils.thread_idx()


def _shared(ref: Value) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _global(ref: Value) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def _barrier(barriers: Value, index: Value) -> Any:
    return arith.addi(_shared(barriers), _mul(index, 8))
