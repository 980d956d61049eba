"""dValues as a Pallas-Mosaic kernel for Hopper GPUs: a gathered product over the tokens, as wide as the forward one.

A tile is some slots of a group times the group's rows. A step takes `BLOCK_TOKENS` tokens of the rows of x that the
slots read and of the group's rows of dY. Both are copied by the producer warpgroup; ids stay the same all along.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic._forward import _inline as inline
from pallas_kernels.mosaic._forward import launch

BLOCK_TOKENS = 64  # of a step: what one row of a swizzled tile holds


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a program.

    Attributes:
        block_slots: slots of a tile.
        stages: depth of the ring of operand tiles, in steps.
        registers: of a thread of the consumers and of the producer.
    """

    block_slots: int = 256
    stages: int = 4
    registers: tuple[int, int] = (208, 88)

    def shared_memory(self, group_size: int) -> int:
        """Bytes of the stages."""
        return self.stages * BLOCK_TOKENS * (group_size + self.block_slots) * 2


def product(columns, rows, x, dy, *, count: int, group_size: int, config: Config, multiprocessors: int):
    """Computes d[p, i] = sum over the tokens of x[columns[p]] * dy[rows[i of p's group]].

    Args:
        columns: (P,) int32 in 0..K-1, `count` for each group.
        rows: (R * group_size,) int32 in 0..M-1.
        x: (K, N) bfloat16 or float16, N a multiple of `BLOCK_TOKENS`.
        dy: (M, N) of the same dtype.
        count: slots of a group.
        group_size: V, 64, 128 or 256.
        config: a legal config.
        multiprocessors: of the GPU.

    Returns:
        (P, V) of the dtype of x.
    """
    c, v, p = config, group_size, columns.shape[0]
    tiles = p // count * pl.cdiv(count, c.block_slots)
    programs = min(multiprocessors, tiles)
    tiled = (plgpu.TilingTransform((8, BLOCK_TOKENS)), plgpu.SwizzleTransform(128))

    def row_grouped_grad_values(*refs):  # the kernel's name in profiles
        _body(*refs, config=c, v=v, count=count, tiles=tiles, programs=programs, tiled=tiled)

    call = plgpu.kernel(
        row_grouped_grad_values,
        out_type=jax.ShapeDtypeStruct((p, v), x.dtype),
        scratch_types=(
            plgpu.SMEM((c.stages, c.block_slots, BLOCK_TOKENS), x.dtype, transforms=tiled),
            plgpu.SMEM((c.stages, v, BLOCK_TOKENS), x.dtype, transforms=tiled),
            plgpu.SMEM((2 * c.stages,), jnp.int32),  # the gather's own barriers, 8 bytes each
            plgpu.Barrier(num_barriers=c.stages, num_arrivals=2),
        ),
        **launch(programs),
    )
    return call(columns, rows, x, dy)


def _body(columns, rows, x, dy, d, a_tiles, b_tiles, gathered, empty, *, config, v, count, tiles, programs, tiled):
    c, steps = config, x.shape[1] // BLOCK_TOKENS
    tiles_of_group = pl.cdiv(count, c.block_slots)
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    plain, splat, swizzled = plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.RefType(tiled)
    inline(functools.partial(ptx.init_barriers, count=c.stages, arrivals=ptx.WARPGROUP), plain)(gathered)
    mine = lax.div(tiles - program + (programs - 1), programs)

    def place(i):
        """(group, first slot, end of the group's slots) of this program's tile i."""
        tile = program + i * programs
        group, part = lax.div(tile, tiles_of_group), lax.rem(tile, tiles_of_group)
        return group, group * count + part * c.block_slots, (group + 1) * count

    @pl.when(warpgroup == 2)
    def _produce():
        plgpu.set_max_registers(c.registers[1], action="decrease")

        def load(ids, first, size):
            """The ids of the rows that this thread copies."""
            layout = plgpu.Layout.WG_STRIDED((size * 8,), vec_size=1)
            kind = plgpu.ShapeDtypeStruct((size * 8,), jnp.dtype(jnp.int32), layout=layout)
            function = functools.partial(ptx.copied_rows, count=size, most=ids.shape[0] - 1, layout=layout)
            return layout, inline(function, plain, splat, result=kind)(ids, first)

        def tile(i, step):
            group, first, _ = place(i)
            a_layout, a_ids = load(columns, first, c.block_slots)
            b_layout, b_ids = load(rows, group * v, v)
            copy = functools.partial(ptx.copy_rows, tokens=x.shape[1])
            copy_a = inline(copy, plain, a_layout, swizzled, splat)
            copy_b = inline(copy, plain, b_layout, swizzled, splat)

            def one(k, step):
                slot = lax.rem(step, c.stages)

                @pl.when(step >= c.stages)
                def _wait_for_room():
                    plgpu.barrier_wait(empty.at[slot])

                copy_a(x, a_ids, a_tiles.at[slot], k)
                copy_b(dy, b_ids, b_tiles.at[slot], k)
                inline(ptx.arrive, plain, splat)(gathered, slot)
                return step + 1

            return lax.fori_loop(0, steps, one, step)

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _consume():
        plgpu.set_max_registers(c.registers[0], action="increase")
        height = c.block_slots // 2
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        wait = inline(functools.partial(ptx.wait, stages=c.stages), plain, splat)

        def multiply(i, step):
            def accumulate(acc):
                def one(k, _):
                    now = step + k
                    slot = lax.rem(now, c.stages)
                    wait(gathered, now)
                    a, b = a_tiles.at[slot, pl.ds(warpgroup * height, height)], b_tiles.at[slot]
                    plgpu.wgmma(acc, a, b.transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # all but the one just issued

                    @pl.when(k > 0)
                    def _release():
                        plgpu.barrier_arrive(empty.at[lax.rem(now - 1, c.stages)])

                lax.fori_loop(0, steps, one, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem(step + steps - 1, c.stages)])
                return acc[...]

            out = pl.run_scoped(accumulate, plgpu.ACC((height, v), jnp.float32)).astype(d.dtype)
            _, first, end = place(i)
            slots = inline(
                functools.partial(ptx.counted_rows, count=height, none=d.shape[0], layout=row_layout), splat, splat,
                result=plgpu.ShapeDtypeStruct((height,), jnp.dtype(jnp.int32), layout=row_layout),
            )(first + warpgroup * height, end)  # fmt: skip
            store = functools.partial(ptx.store_rows, m=d.shape[0], tokens=v)
            inline(store, plain, plgpu.Layout.WGMMA, row_layout, splat)(d, out, slots, jnp.int32(0))
            return step + steps

        lax.fori_loop(0, mine, multiply, jnp.int32(0))
