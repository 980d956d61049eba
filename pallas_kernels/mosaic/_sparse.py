"""The product on Hopper's sparse tensor cores, `wgmma.mma_async.sp`, which Pallas does not expose.

Like those of `_ptx`, every function is the body of a `plgpu.inline_mgpu` call. An instruction multiplies 64
rows of compressed weights, two of every four inputs, by 32 inputs of up to 256 tokens. Which two, it reads from one
32-bit register a thread: in warp w, thread 4 q + c holds the pairs of the rows 16 w + q (the lower half) and
16 w + 8 + q, of the c-th four fours of the 64 slots of a step. The first of two instructions reads c = 0 and 1, the
second 2 and 3. So each half is a number of `wide_pairs`, and only has to be loaded.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic._ptx import Registers, Value

ROWS, SLOTS = 64, 32  # of an instruction
VALUES = SLOTS // 2


def zeros(*, shape: tuple[int, int], layout: Any) -> fa.FragmentedArray:
    """Accumulators to begin with."""
    zero = utils.c(0.0, ir.F32Type.get())
    start = fa.optimization_barrier(fa.FragmentedArray.splat(zero, shape, layout.to_mgpu()))
    nvvm.wgmma_fence_aligned()
    return start


def multiply(acc: Registers, a: Value, pairs: Value, b: Value) -> fa.FragmentedArray:
    """Waits for all that was started before, then starts acc += W x for the slots of a step.

    The tensor cores read the registers of pairs while they work, and the compiler does not know it: loaded any
    earlier, the pairs of this step would replace those of the last one under way.

    Args:
        acc: (rows, tokens) float32, one number a register.
        a: (slots / 2, rows) two-byte values in shared memory, tiled, rows of 128 bytes swizzled.
        pairs: (slots / 16, rows) uint16 in shared memory, in tiles of four such rows.
        b: (slots, tokens) activations in shared memory, tiled and swizzled by up to 128 bytes.
    """
    nvvm.wgmma_wait_group_sync_aligned(0)
    (slots, tokens), dtype = mma_utils.tiled_memref_shape(b)
    (_, rows), _ = mma_utils.tiled_memref_shape(a)
    # Both stand with the contraction outermost, which `logical_k_major` says of either operand here.
    (a_base, _), (a_next_rows, a_next_slots), _ = mma_utils.create_descriptor(
        a, swizzle=128, group_size=(VALUES, ROWS), logical_k_major=True
    )
    (b_base, _), (_, b_next_slots), _ = mma_utils.create_descriptor(
        b, swizzle=2 * ir.MemRefType(b.type).shape[-1], group_size=(SLOTS, tokens), logical_k_major=True
    )
    loaded = [[_register(pairs, block, part) for part in range(slots // 64)] for block in range(rows // ROWS)]
    nvvm.wgmma_fence_aligned()  # the tensor cores read the registers just written
    registers = acc.registers.copy()
    for block in range(rows // ROWS):
        for i in range(slots // SLOTS):
            registers[block : block + 1] = _instruction(
                registers[block : block + 1],
                _moved(a_base, block * a_next_rows + i * a_next_slots),
                _moved(b_base, i * b_next_slots),
                loaded[block][i // 2],
                i % 2,
                tokens,
                dtype,
            )
    nvvm.wgmma_commit_group_sync_aligned()
    return fa.FragmentedArray(_registers=registers, _layout=acc.layout, _is_signed=None)


def drain(acc: Registers) -> fa.FragmentedArray:
    """The accumulators when all products are done."""
    nvvm.wgmma_wait_group_sync_aligned(0)
    return fa.optimization_barrier(acc).to_layout(fa.WGMMA_LAYOUT)


def _register(pairs: Value, block: int, part: int) -> Any:
    """Loads this thread's register of pairs for the 64 rows of a block and the 64 slots of a part of a step."""
    thread = arith.remui(utils.thread_idx(), ptx._i32(ptx.WARPGROUP))
    warp, lane = arith.divui(thread, ptx._i32(32)), arith.remui(thread, ptx._i32(32))
    q, c = arith.divui(lane, ptx._i32(4)), arith.remui(lane, ptx._i32(4))
    first = arith.addi(ptx._mul(warp, 32), ptx._mul(q, 2))
    address = arith.addi(ptx._shared(pairs), arith.addi(ptx._mul(c, 128), first))
    part_stride, block_stride = (2 * stride for stride in _strides(pairs)[:2])
    address = arith.addi(address, ptx._i32(block * block_stride + part * part_stride))
    # The swizzle turns chunks of 16 bytes by the number of their row of 128.
    turn = arith.andi(arith.divui(address, ptx._i32(8)), ptx._i32(7 * 16))
    low = arith.xori(address, turn)
    load = "{ .reg .b16 low, high; ld.shared.b16 low, [$1]; ld.shared.b16 high, [$2]; mov.b32 $0, {low, high}; }"
    return ptx._emit(load, [low, arith.xori(low, ptx._i32(16))], ir.IntegerType.get_signless(32))


def _strides(ref: Value) -> list[int]:
    return ir.MemRefType(ref.type).get_strides_and_offset()[0]


def _moved(descriptor: Value, offset: int) -> Any:
    """The descriptor of what lies `offset` bytes further."""
    return arith.addi(descriptor, ptx._i64(mma_utils.encode_addr(offset)))


def _instruction(
    acc: np.ndarray, a: Value, b: Value, pairs: Value, half: int, tokens: int, dtype: ir.Type
) -> np.ndarray:
    """One product of 64 rows; `half` says which threads' pairs it reads."""
    count, f32 = tokens // 2, ir.VectorType.get((1,), ir.F32Type.get())
    held = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    name = f"wgmma.mma_async.sp.sync.aligned.m{ROWS}n{tokens}k{SLOTS}.f32.{dtype}.{dtype}"
    # Immediates: add to the accumulators; signs of a and b; both operands stand transposed.
    text = f"{name} {held}, ${2 * count}, ${2 * count + 1}, ${2 * count + 2}, {half}, 1, 1, 1, 1, 1;"
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r"]
    struct: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        [*acc.flat, a, b, pairs],
        text,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    found = np.empty(count, dtype=object)
    found[:] = [llvm.extractvalue(f32, struct, [i]) for i in range(count)]
    return found.reshape(acc.shape)
