"""dValues as a Pallas-Mosaic kernel for Hopper GPUs: a gathered product over the tokens, as wide as the forward one.

A tile is some slots of a group times the group's rows. A step takes `GRAD_TOKENS` tokens of the rows of x that the
slots read and of the group's rows of dY. Both are copied by the producer warpgroup; ids stay the same all along.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic._configs import GRAD_TOKENS, GradConfig
from pallas_kernels.mosaic._forward import PLAIN, SPLAT, inline, launch


class Scratch(NamedTuple):
    """The shared memory of a program, and its barriers."""

    a_tiles: Any
    b_tiles: Any
    gathered: Any
    empty: Any


def product(
    columns: jax.Array, rows: jax.Array, x: jax.Array, dy: jax.Array,
    *, count: int, group_size: int, config: GradConfig, multiprocessors: int,
) -> jax.Array:  # fmt: skip
    """Computes d[p, i] = sum over the tokens of x[columns[p]] * dy[rows[i of p's group]].

    Args:
        columns: (P,) int32 in 0..K-1, `count` for each group.
        rows: (R * group_size,) int32 in 0..M-1.
        x: (K, N) bfloat16 or float16, N a multiple of `GRAD_TOKENS`.
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
    tiled = (plgpu.TilingTransform((8, GRAD_TOKENS)), plgpu.SwizzleTransform(128))

    # The name of the kernel in profiles.
    def row_grouped_grad_values(columns: Any, rows: Any, x: Any, dy: Any, d: Any, scratch: Scratch) -> None:
        steps = x.shape[1] // GRAD_TOKENS
        tiles_of_group = pl.cdiv(count, c.block_slots)
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        swizzled = plgpu.RefType(tiled)
        inline(functools.partial(ptx.init_barriers, count=c.stages, arrivals=ptx.WARPGROUP), PLAIN)(scratch.gathered)
        mine = lax.div(tiles - program + (programs - 1), programs)

        def place(i: Any) -> Any:
            """(group, first slot, end of the group's slots) of this program's tile i."""
            tile = program + i * programs
            group, part = lax.div(tile, tiles_of_group), lax.rem(tile, tiles_of_group)
            return group, group * count + part * c.block_slots, (group + 1) * count

        @pl.when(warpgroup == 2)
        def _produce() -> Any:
            plgpu.set_max_registers(c.registers[1], action="decrease")

            def load(ids: Any, first: Any, size: Any) -> Any:
                """The ids of the rows that this thread copies."""
                layout = plgpu.Layout.WG_STRIDED((size * 8,), vec_size=1)
                kind = plgpu.ShapeDtypeStruct((size * 8,), jnp.dtype(jnp.int32), layout=layout)
                function = functools.partial(ptx.copied_rows, count=size, most=ids.shape[0] - 1, layout=layout)
                return layout, inline(function, PLAIN, SPLAT, result=kind)(ids, first)

            def tile(i: Any, step: Any) -> Any:
                group, first, _ = place(i)
                a_layout, a_ids = load(columns, first, c.block_slots)
                b_layout, b_ids = load(rows, group * v, v)
                copy = functools.partial(ptx.copy_rows, tokens=x.shape[1])
                copy_a = inline(copy, PLAIN, a_layout, swizzled, SPLAT)
                copy_b = inline(copy, PLAIN, b_layout, swizzled, SPLAT)

                def one(k: Any, step: Any) -> Any:
                    slot = lax.rem(step, c.stages)

                    @pl.when(step >= c.stages)
                    def _wait_for_room() -> None:
                        plgpu.barrier_wait(scratch.empty.at[slot])

                    copy_a(x, a_ids, scratch.a_tiles.at[slot], k)
                    copy_b(dy, b_ids, scratch.b_tiles.at[slot], k)
                    inline(ptx.arrive, PLAIN, SPLAT)(scratch.gathered, slot)
                    return step + 1

                return lax.fori_loop(0, steps, one, step)

            lax.fori_loop(0, mine, tile, jnp.int32(0))

        @pl.when(warpgroup < 2)
        def _consume() -> Any:
            plgpu.set_max_registers(c.registers[0], action="increase")
            height = c.block_slots // 2
            row_layout = plgpu.Layout.WGMMA.reduce(1)
            wait = inline(functools.partial(ptx.wait, stages=c.stages), PLAIN, SPLAT)

            def multiply(i: Any, step: Any) -> Any:
                def accumulate(acc: Any) -> Any:
                    def one(k: Any, _: Any) -> None:
                        now = step + k
                        slot = lax.rem(now, c.stages)
                        wait(scratch.gathered, now)
                        a, b = scratch.a_tiles.at[slot, pl.ds(warpgroup * height, height)], scratch.b_tiles.at[slot]
                        plgpu.wgmma(acc, a, b.transpose((1, 0)))
                        plgpu.wgmma_wait(1)  # all but the one just issued

                        @pl.when(k > 0)
                        def _release() -> None:
                            plgpu.barrier_arrive(scratch.empty.at[lax.rem(now - 1, c.stages)])

                    lax.fori_loop(0, steps, one, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(scratch.empty.at[lax.rem(step + steps - 1, c.stages)])
                    return acc[...]

                out = pl.run_scoped(accumulate, plgpu.ACC((height, v), jnp.float32)).astype(d.dtype)
                _, first, end = place(i)
                slots = inline(
                    functools.partial(ptx.counted_rows, count=height, none=d.shape[0], layout=row_layout), SPLAT, SPLAT,
                    result=plgpu.ShapeDtypeStruct((height,), jnp.dtype(jnp.int32), layout=row_layout),
                )(first + warpgroup * height, end)  # fmt: skip
                store = functools.partial(ptx.store_rows, m=d.shape[0], tokens=v)
                inline(store, PLAIN, plgpu.Layout.WGMMA, row_layout, SPLAT)(d, out, slots, jnp.int32(0))
                return step + steps

            lax.fori_loop(0, mine, multiply, jnp.int32(0))

    scratch = Scratch(
        a_tiles=plgpu.SMEM((c.stages, c.block_slots, GRAD_TOKENS), x.dtype, transforms=tiled),
        b_tiles=plgpu.SMEM((c.stages, v, GRAD_TOKENS), x.dtype, transforms=tiled),
        gathered=plgpu.SMEM((2 * c.stages,), jnp.int32),  # the gather's own barriers, 8 bytes each
        empty=plgpu.Barrier(num_barriers=c.stages, num_arrivals=2),
    )
    out = jax.ShapeDtypeStruct((p, v), x.dtype)
    call = plgpu.kernel(row_grouped_grad_values, out_type=out, scratch_types=(scratch,), **launch(programs))
    return call(columns, rows, x, dy)
