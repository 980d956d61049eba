"""The study behind `pallas_kernels.triton`: what each choice in the kernels costs, one knob at a time.

`python -m benchmarks.kernel_variants STUDY --out FILE` compiles all variants of a study in parallel, checks each
against a float64 reference and writes kernel times (CUPTI, cold L2, medians). docs/kernels.md tells what came of it.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import timing


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel of the study. The defaults are the plain kernel: one program per group and token tile."""

    op: str = "forward"
    values: str = "pv"  # (P, V), or "vk": (R, V, kept)
    bounds: str = "static"  # or "dynamic": read from group_ptr
    tail: str = "none"  # or "mask": every load masked by the segment's end
    prefetch: bool = False  # load the next step's column ids one step ahead
    order: str = "groups"  # which program index runs fastest: "groups" or "tokens"
    block_rows: int = 128
    block_tokens: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    evict: str | None = None
    split: int = 1  # splits of the contraction, f32 partials summed by XLA
    store: str = "rows"  # or "token_major": y is (N, M)
    flip: bool = False  # compute the transposed product
    ids: str = "inline"  # or "none": no column ids at all, the rows 0, 1, ... (wrong result, shows what the ids cost)
    unroll: int = 1  # steps in a loop body
    ahead: int = 1  # with prefetch: how many steps ahead
    touch: int = 0  # steps ahead at which one id of a step is read, to bring its cache line to the L1 cache
    x: str = "rows"  # or "tiles": x as (tokens / 128, K, 128), a token tile in one piece
    early_rows: bool = False  # load the output rows before the loop
    transpose: str = "xla"  # op "token_major": who transposes x and y, "xla" or "triton"


def _forward_kernel(*refs, v, kept, variant, n_tokens, groups, m):
    c = variant
    values_ref, columns_ref, ptr_ref, rows_ref, x_ref, y_ref = refs
    parts = v // c.block_rows
    tiles = pl.cdiv(n_tokens, c.block_tokens)
    pid = pl.program_id(0)
    if c.order == "groups":
        part, tile = jax.lax.rem(pid, groups * parts), jax.lax.div(pid, groups * parts)
    else:
        part, tile = jax.lax.div(pid, tiles), jax.lax.rem(pid, tiles)
    group, row0 = jax.lax.div(part, parts), jax.lax.rem(part, parts) * c.block_rows
    if c.bounds == "static":
        begin, end = group * kept, (group + 1) * kept
        steps = pl.cdiv(kept, c.block_k)
        first, last = 0, steps
    else:
        begin, end = ptr_ref[group], ptr_ref[group + 1]
        if c.tail == "none":
            begin = pl.multiple_of(begin, 64)
        steps = pl.cdiv(end - begin, c.block_k)
        first, last = 0, steps
    piece = pl.program_id(1) if c.split > 1 else 0
    if c.split > 1:
        per = pl.cdiv(steps, c.split)
        first = piece * per
        last = first + per if c.bounds == "static" and steps % c.split == 0 else jnp.minimum(steps, first + per)
    offset_k = jnp.arange(c.block_k, dtype=jnp.int32)
    offset_m = row0 + jnp.arange(c.block_rows, dtype=jnp.int32)
    tokens = tile * c.block_tokens + jnp.arange(c.block_tokens, dtype=jnp.int32)
    ragged_n = n_tokens % c.block_tokens != 0
    rows = plgpu.load(rows_ref.at[group * v + offset_m]) if c.early_rows else None

    def load_columns(step):
        slots = begin + step * c.block_k + offset_k
        if c.ids == "none":
            return step * c.block_k + offset_k
        if c.tail == "mask":
            return plgpu.load(columns_ref.at[slots], mask=slots < end, other=0)
        return plgpu.load(columns_ref.at[slots])

    def touch(step):
        ahead = jnp.minimum(step + c.touch, last - 1)
        return sum(plgpu.load(columns_ref.at[begin + ahead * c.block_k + line]) for line in range(0, c.block_k, 32))

    def product(step, columns, acc):
        slots = begin + step * c.block_k + offset_k
        live = (slots < end)[:, None] if c.tail == "mask" else None
        other = 0.0 if c.tail == "mask" else None
        x_mask, x_other = live, other
        if ragged_n:
            in_range = (tokens < n_tokens)[None, :]
            x_mask = in_range if x_mask is None else x_mask & in_range
            x_other = 0.0
            x_mask = jnp.broadcast_to(x_mask, (c.block_k, c.block_tokens))
        elif x_mask is not None:
            x_mask = jnp.broadcast_to(x_mask, (c.block_k, c.block_tokens))
        if c.x == "tiles":
            lanes = jnp.arange(c.block_tokens, dtype=jnp.int32)
            xs = plgpu.load(x_ref.at[tile, columns[:, None], lanes[None, :]])
        else:
            xs = plgpu.load(x_ref.at[columns[:, None], tokens[None, :]], mask=x_mask, other=x_other)
        if c.values == "pv":
            w_mask = None if live is None else jnp.broadcast_to(live, (c.block_k, c.block_rows))
            w = plgpu.load(
                values_ref.at[slots[:, None], offset_m[None, :]], mask=w_mask, other=other, eviction_policy=c.evict
            )
            if c.flip:
                return acc + jax.lax.dot_general(xs, w, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
            return acc + jax.lax.dot_general(w, xs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        local = step * c.block_k + offset_k
        w = plgpu.load(values_ref.at[group, offset_m[:, None], local[None, :]], eviction_policy=c.evict)
        if c.flip:
            return acc + jax.lax.dot_general(xs, w, (((0,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return acc + jax.lax.dot_general(w, xs, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    shape = (c.block_tokens, c.block_rows) if c.flip else (c.block_rows, c.block_tokens)
    zero = jnp.zeros(shape, jnp.float32)
    if c.prefetch:

        def body(step, carry):
            *columns, acc = carry
            warm = None
            warm = touch(step) if c.touch else None
            if c.touch:
                *columns, _ = columns
            for i in range(c.unroll):
                here = step * c.unroll + i
                acc = product(here, columns[0], acc)
                columns = [*columns[1:], load_columns(jnp.minimum(here + c.ahead, last - 1))]
            return (*columns, warm, acc) if c.touch else (*columns, acc)

        carry = [load_columns(first + i) for i in range(c.ahead)]
        if c.touch:
            carry.append(touch(first))
        *carry, acc = jax.lax.fori_loop(first, last // c.unroll, body, (*carry, zero))
        if c.touch:  # ids are never negative: this adds zero, and keeps the reads alive
            tokens += jnp.minimum(carry[-1], 0)
    else:

        def body(step, acc):
            for i in range(c.unroll):
                acc = product(step * c.unroll + i, load_columns(step * c.unroll + i), acc)
            return acc

        acc = jax.lax.fori_loop(first, last // c.unroll, body, zero)
    if c.flip:
        acc = acc.T if c.store == "rows" else acc
    elif c.store == "token_major":
        acc = acc.T
    rows = plgpu.load(rows_ref.at[group * v + offset_m]) if rows is None else rows
    mask = (tokens < n_tokens)[None, :] if ragged_n else None
    if c.split > 1:
        mask = None if mask is None else jnp.broadcast_to(mask, acc.shape)
        plgpu.store(y_ref.at[piece, rows[:, None], tokens[None, :]], acc, mask=mask)
    elif c.store == "rows":
        mask = None if mask is None else jnp.broadcast_to(mask, acc.shape)
        plgpu.store(y_ref.at[rows[:, None], tokens[None, :]], acc.astype(y_ref.dtype), mask=mask)
    else:
        plgpu.store(y_ref.at[tokens[:, None], rows[None, :]], acc.astype(y_ref.dtype))


def forward(case, variant, values, columns, group_ptr, rows, x):
    """The forward product of one variant: y (M, N), or (N, M) for a token-major store."""
    c = variant
    n_tokens, groups, v = case.n, case.groups, case.group_size
    tiles = pl.cdiv(n_tokens, c.block_tokens)
    shape = (case.m, n_tokens) if c.store == "rows" else (n_tokens, case.m)
    grid = (groups * (v // c.block_rows) * tiles,)
    out = jax.ShapeDtypeStruct(shape, x.dtype)
    if c.split > 1:
        grid, out = (*grid, c.split), jax.ShapeDtypeStruct((c.split, *shape), jnp.float32)
    kernel = functools.partial(
        _forward_kernel, v=v, kept=case.kept, variant=c, n_tokens=n_tokens, groups=groups, m=case.m
    )
    y = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=c.num_warps, num_stages=c.num_stages),
    )(values, columns, group_ptr, rows, x)
    return y.sum(0).astype(x.dtype) if c.split > 1 else y


def _transpose_kernel(x_ref, y_ref, *, variant):
    tile = plgpu.load(x_ref.at[:, :])
    y_ref[:, :] = tile.T


def transpose(x, rows, columns, num_warps):
    """A plain tiled transpose."""
    return pl.pallas_call(
        functools.partial(_transpose_kernel, variant=None),
        out_shape=jax.ShapeDtypeStruct(x.shape[::-1], x.dtype),
        grid=(x.shape[0] // rows, x.shape[1] // columns),
        in_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j))],
        out_specs=pl.BlockSpec((columns, rows), lambda i, j: (j, i)),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
    )(x)


def token_major(case, variant, values, columns, group_ptr, rows, x_tokens):
    """X (N, K) to y (N, M), transposed before and after the feature-major kernel."""
    inner = dataclasses.replace(variant, op="forward", store="rows")
    if variant.transpose == "xla":
        return forward(case, inner, values, columns, group_ptr, rows, x_tokens.T).T
    shape = {
        "triton": (64, 64, 4),
        "triton32": (32, 128, 4),
        "triton128": (128, 128, 8),
        "triton128x64": (128, 64, 4),
        "triton256": (64, 256, 8),
        "triton32x32": (32, 32, 1),
    }[variant.transpose]
    y = forward(case, inner, values, columns, group_ptr, rows, transpose(x_tokens, *shape))
    return transpose(y, *shape)


def _vector_kernel(values_ref, columns_ref, ptr_ref, rows_ref, x_ref, y_ref, *, v, kept, variant, groups):
    c = variant
    parts = v // c.block_rows
    part = pl.program_id(0)
    group, row0 = jax.lax.div(part, parts), jax.lax.rem(part, parts) * c.block_rows
    begin = group * kept
    offset_k = jnp.arange(c.block_k, dtype=jnp.int32)
    offset_m = row0 + jnp.arange(c.block_rows, dtype=jnp.int32)

    def load_columns(step):
        return plgpu.load(columns_ref.at[begin + step * c.block_k + offset_k])

    steps = kept // c.block_k

    def body(step, carry):
        columns, acc = carry
        following = load_columns(jnp.minimum(step + 1, steps - 1))
        slots = begin + step * c.block_k + offset_k
        w = plgpu.load(values_ref.at[slots[:, None], offset_m[None, :]])
        xs = plgpu.load(x_ref.at[columns, jnp.zeros_like(columns)])
        return following, acc + w.astype(jnp.float32) * xs.astype(jnp.float32)[:, None]

    _, acc = jax.lax.fori_loop(0, steps, body, (load_columns(0), jnp.zeros((c.block_k, c.block_rows), jnp.float32)))
    rows = plgpu.load(rows_ref.at[group * v + offset_m])
    plgpu.store(y_ref.at[rows, jnp.zeros_like(rows)], acc.sum(0).astype(y_ref.dtype))


def vector(case, variant, values, columns, group_ptr, rows, x):
    """One token: multiply and add on the ordinary cores, no matrix unit."""
    c = variant
    kernel = functools.partial(_vector_kernel, v=case.group_size, kept=case.kept, variant=c, groups=case.groups)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((case.m, 1), x.dtype),
        grid=(case.m // c.block_rows,),
        compiler_params=plgpu.CompilerParams(num_warps=c.num_warps, num_stages=c.num_stages),
    )(values, columns, group_ptr, rows, x)


def _grad_values_kernel(columns_ref, rows_ref, x_ref, dy_ref, out_ref, *, v, kept, variant, n_tokens):
    c = variant
    tiles = kept // c.block_rows
    pid = pl.program_id(0)
    group, tile = jax.lax.div(pid, tiles), jax.lax.rem(pid, tiles)
    slots = group * kept + tile * c.block_rows + jnp.arange(c.block_rows, dtype=jnp.int32)
    columns = plgpu.load(columns_ref.at[slots])
    rows = plgpu.load(rows_ref.at[group * v + jnp.arange(v, dtype=jnp.int32)])

    def body(step, acc):
        tokens = step * c.block_k + jnp.arange(c.block_k, dtype=jnp.int32)
        xs = plgpu.load(x_ref.at[columns[:, None], tokens[None, :]])
        dys = plgpu.load(dy_ref.at[rows[:, None], tokens[None, :]])
        return acc + jax.lax.dot_general(xs, dys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    acc = jax.lax.fori_loop(0, n_tokens // c.block_k, body, jnp.zeros((c.block_rows, v), jnp.float32))
    plgpu.store(out_ref.at[slots[:, None], jnp.arange(v)[None, :]], acc.astype(out_ref.dtype))


def grad_values(case, variant, columns, rows, x, dy):
    """DValues (P, V): one program per tile of slots, contracting the tokens."""
    c = variant
    kernel = functools.partial(_grad_values_kernel, v=case.group_size, kept=case.kept, variant=c, n_tokens=x.shape[1])
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((case.groups * case.kept, case.group_size), x.dtype),
        grid=(case.groups * (case.kept // c.block_rows),),
        compiler_params=plgpu.CompilerParams(num_warps=c.num_warps, num_stages=c.num_stages),
    )(columns, rows, x, dy)


def _grad_input_kernel(values_ref, slots_ref, rows_ref, dy_ref, dx_ref, *, v, variant, n_tokens, groups, k, p):
    c = variant
    k_tiles = k // c.block_rows
    tiles = n_tokens // c.block_tokens
    pid = pl.program_id(0)
    if c.order == "groups":
        k_tile, tile = jax.lax.rem(pid, k_tiles), jax.lax.div(pid, k_tiles)
    else:
        k_tile, tile = jax.lax.div(pid, tiles), jax.lax.rem(pid, tiles)
    inputs = k_tile * c.block_rows + jnp.arange(c.block_rows, dtype=jnp.int32)
    tokens = tile * c.block_tokens + jnp.arange(c.block_tokens, dtype=jnp.int32)
    offset = jnp.arange(c.block_k, dtype=jnp.int32)
    parts = v // c.block_k
    steps = groups * parts

    def indices(step):
        return (
            plgpu.load(slots_ref.at[jax.lax.div(step, parts), inputs]),
            plgpu.load(rows_ref.at[step * c.block_k + offset]),
        )

    def body(step, carry):
        (slots, rows), acc = carry if c.prefetch else (indices(step), carry)
        lanes = jax.lax.rem(step, parts) * c.block_k + offset
        mask = jnp.broadcast_to((slots < p)[:, None], (c.block_rows, c.block_k))
        w = plgpu.load(values_ref.at[slots[:, None], lanes[None, :]], mask=mask, other=0.0)
        dys = plgpu.load(dy_ref.at[rows[:, None], tokens[None, :]])
        acc = acc + jax.lax.dot_general(w, dys, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (indices(jnp.minimum(step + 1, steps - 1)), acc) if c.prefetch else acc

    zero = jnp.zeros((c.block_rows, c.block_tokens), jnp.float32)
    if c.prefetch:
        _, acc = jax.lax.fori_loop(0, steps, body, (indices(0), zero))
    else:
        acc = jax.lax.fori_loop(0, steps, body, zero)
    plgpu.store(dx_ref.at[inputs[:, None], tokens[None, :]], acc.astype(dx_ref.dtype))


def slot_table(case, columns):
    """(R, K) int32: the slot of every input in every group, P where the group does not keep it."""
    p = columns.shape[0]
    slots = jnp.arange(p, dtype=jnp.int32)
    table = jnp.full((case.groups, case.k), p, jnp.int32)
    return table.at[slots // case.kept, columns].set(slots, unique_indices=True, indices_are_sorted=True)


def grad_input(case, variant, values, columns, rows, dy):
    """DX (K, N): a dense product whose weight tiles are decompressed while they are loaded."""
    c = variant
    n_tokens, p = dy.shape[1], values.shape[0]
    kernel = functools.partial(
        _grad_input_kernel, v=case.group_size, variant=c, n_tokens=n_tokens, groups=case.groups, k=case.k, p=p
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((case.k, n_tokens), dy.dtype),
        grid=((case.k // c.block_rows) * (n_tokens // c.block_tokens),),
        compiler_params=plgpu.CompilerParams(num_warps=c.num_warps, num_stages=c.num_stages),
    )(values, slot_table(case, columns), rows, dy)


def grad_input_xla(case, variant, values, columns, rows, dy):
    """DX by decompressing W^T with XLA and the dense product of XLA."""
    w = jnp.zeros((case.k, case.m), values.dtype)
    group = jnp.arange(values.shape[0]) // case.kept
    w = w.at[columns[:, None], rows.reshape(case.groups, -1)[group]].set(values, unique_indices=True)
    return jax.lax.dot(w, dy, preferred_element_type=jnp.float32).astype(dy.dtype)


def _decompress_kernel(values_ref, slots_ref, rows_ref, w_ref, *, v, variant, p):
    c = variant
    group, k_tile = pl.program_id(0), pl.program_id(1)
    inputs = k_tile * c.block_rows + jnp.arange(c.block_rows, dtype=jnp.int32)
    lanes = jnp.arange(v, dtype=jnp.int32)
    slots = plgpu.load(slots_ref.at[group, inputs])
    mask = jnp.broadcast_to((slots < p)[:, None], (c.block_rows, v))
    w = plgpu.load(values_ref.at[slots[:, None], lanes[None, :]], mask=mask, other=0.0)
    rows = plgpu.load(rows_ref.at[group * v + lanes])
    plgpu.store(w_ref.at[rows[:, None], inputs[None, :]], w.T)


def grad_input_decompress(case, variant, values, columns, rows, dy):
    """DX by a decompressing kernel into W (M, K) and the dense product of XLA."""
    c = variant
    kernel = functools.partial(_decompress_kernel, v=case.group_size, variant=c, p=values.shape[0])
    w = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((case.m, case.k), values.dtype),
        grid=(case.groups, case.k // c.block_rows),
        compiler_params=plgpu.CompilerParams(num_warps=c.num_warps, num_stages=c.num_stages),
    )(values, slot_table(case, columns), rows)
    return jax.lax.dot_general(w, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32).astype(dy.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """One matrix shape with equal counts."""

    m: int
    k: int
    n: int
    sparsity: float = 0.75
    group_size: int = 128

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return self.m // self.group_size

    @property
    def kept(self) -> int:
        """Kept columns of every group."""
        return round(self.k * (1 - self.sparsity))


def arrays(case: Case, seed: int, n_sets: int) -> list[dict[str, jax.Array]]:
    """Random operands of one case."""
    rng = np.random.default_rng(seed)
    columns = np.stack([np.sort(rng.permutation(case.k)[: case.kept]) for _ in range(case.groups)]).astype(np.int32)
    rows = rng.permutation(case.m).astype(np.int32)
    group_ptr = np.arange(case.groups + 1, dtype=np.int32) * case.kept
    sets = []
    for key in jax.random.split(jax.random.key(seed), n_sets):
        keys = jax.random.split(key, 3)
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        values = normal(keys[0], (case.groups * case.kept, case.group_size)) * (case.kept**-0.5)
        sets.append(
            {
                "values": values,
                "values_vk": values.reshape(case.groups, case.kept, -1).swapaxes(1, 2).copy(),
                "columns": jnp.asarray(columns.reshape(-1)),
                "group_ptr": jnp.asarray(group_ptr),
                "rows": jnp.asarray(rows),
                "x": (x := normal(keys[1], (case.k, case.n))),
                "x_tokens": x.T.copy(),
                "x_tiles": x.reshape(case.k, -1, min(case.n, 128)).swapaxes(0, 1).copy(),
                "dy": normal(keys[2], (case.m, case.n)),
            }
        )
    return sets


def reference(case: Case, operands: dict[str, jax.Array], op: str) -> np.ndarray:
    """The float64 result on (a few tokens of) the operands, in feature-major order."""
    get = {
        name: np.asarray(operands[name]).astype(np.float64 if operands[name].dtype == jnp.bfloat16 else np.int64)
        for name in ("values", "columns", "rows", "x", "dy")
    }
    values = get["values"].reshape(case.groups, case.kept, case.group_size)
    columns = get["columns"].reshape(case.groups, case.kept)
    rows = get["rows"].reshape(case.groups, case.group_size)
    if op == "grad_values":  # the first two groups alone
        return np.stack([get["x"][columns[g]] @ get["dy"][rows[g]].T for g in range(2)])
    dense = np.zeros((case.m, case.k))
    for g in range(case.groups):
        dense[rows[g][:, None], columns[g][None, :]] = values[g].T
    return dense @ get["x"][:, :64] if op == "forward" else dense.T @ get["dy"][:, :64]


def call(case: Case, variant: Variant):
    """The function of a variant and the names of its operands."""
    if variant.op == "forward":
        values = "values" if variant.values == "pv" else "values_vk"
        return functools.partial(forward, case, variant), (
            values, "columns", "group_ptr", "rows", "x_tiles" if variant.x == "tiles" else "x")  # fmt: skip
    if variant.op == "vector":
        return functools.partial(vector, case, variant), ("values", "columns", "group_ptr", "rows", "x")
    if variant.op == "token_major":
        return functools.partial(token_major, case, variant), ("values", "columns", "group_ptr", "rows", "x_tokens")
    if variant.op == "grad_values":
        return functools.partial(grad_values, case, variant), ("columns", "rows", "x", "dy")
    if variant.op == "dense":
        return functools.partial(dense_product, variant), ("dense", "x")
    function = {
        "grad_input": grad_input,
        "grad_input_xla": grad_input_xla,
        "grad_input_decompress": grad_input_decompress,
    }[variant.op]
    return functools.partial(function, case, variant), ("values", "columns", "rows", "dy")


def dense_product(variant, w, x):
    """XLA's dense product, feature-major or (store='token_major') token-major."""
    if variant.store == "rows":
        return jax.lax.dot(w, x, preferred_element_type=jnp.float32).astype(x.dtype)
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.reshape(x.shape[::-1]), w, contract, preferred_element_type=jnp.float32).astype(
        x.dtype
    )


def check(case: Case, variant: Variant, result: jax.Array, want: np.ndarray) -> float:
    """Relative error against float64."""
    if variant.op == "grad_values":
        got = result[: 2 * case.kept].reshape(2, case.kept, -1)
    elif variant.store == "token_major" or variant.op == "token_major":
        got = result[:64].T
    else:
        got = result[:, :64]
    got = np.asarray(got.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def studies() -> dict[str, list[tuple[Case, list[Variant]]]]:
    """The variants of every study, in the order they are measured."""
    dense = [Variant(op="dense"), Variant(op="dense", store="token_major")]
    plain = Variant()
    wide = Variant(block_tokens=256, num_warps=8)
    vary = dataclasses.replace
    square = Case(4096, 4096, 4096)
    layout = [
        vary(plain, values="vk"),
        plain,
        vary(plain, prefetch=True),
        vary(plain, values="vk", prefetch=True),
        vary(plain, bounds="dynamic"),
        vary(plain, bounds="dynamic", prefetch=True),
        vary(plain, bounds="dynamic", tail="mask"),
        vary(plain, bounds="dynamic", tail="mask", prefetch=True),
        vary(plain, flip=True, prefetch=True),
        vary(plain, flip=True, prefetch=True, store="token_major"),
        vary(plain, prefetch=True, store="token_major"),
        vary(plain, prefetch=True, order="tokens"),
        vary(plain, prefetch=True, evict="evict_last"),
    ]
    tiles = [
        vary(base, prefetch=prefetch, block_k=bk, num_stages=stages, num_warps=warps, values=values)
        for base, warp_choices in ((plain, (4, 8)), (wide, (8, 4)))
        for warps in warp_choices
        for bk, stage_choices in ((32, (4, 6)), (64, (3, 4)), (128, (2, 3)))
        for stages in stage_choices
        for prefetch, values in ((True, "pv"), (False, "pv"), (True, "vk"))
    ]
    small = Variant(block_rows=64, block_tokens=128)
    v64 = [
        vary(small, block_tokens=bn, num_warps=warps, prefetch=prefetch, block_k=bk, num_stages=stages)
        for bn, warps in ((128, 4), (256, 4), (256, 8))
        for bk, stages in ((32, 5), (64, 3), (64, 4), (128, 3))
        for prefetch in (True, False)
    ]
    backward = [
        *[vary(plain, op="grad_values", block_rows=br, block_k=bk, num_stages=s, num_warps=w)
          for br, w in ((128, 4), (128, 8), (256, 8)) for bk, s in ((64, 3), (64, 4), (128, 3))],
        *[vary(plain, op="grad_input", prefetch=prefetch, block_tokens=bn, num_warps=w, num_stages=s, block_k=bk)
          for prefetch in (True, False) for bn, w in ((128, 4), (256, 8)) for bk, s in ((64, 3), (64, 4), (128, 3))],
        vary(plain, op="grad_input_xla"),
        vary(plain, op="grad_input_decompress", num_stages=1, block_rows=64),
        vary(plain, op="grad_input_decompress", num_stages=1, block_rows=128, num_warps=8),
    ]  # fmt: skip

    def decode(n, split_v=(16, 32, 64, 128)):
        out = []
        for br in split_v:
            for bk, stages in ((64, 4), (128, 3), (128, 5), (256, 2)):
                for split in (1, 2, 4):
                    if br <= 32 and split > 1:
                        continue
                    warps = (4,) if n < 64 else (4, 8) if br == 128 else (4,)
                    for w in warps:
                        bn = max(16, min(n, 128))
                        out.append(
                            Variant(block_rows=br, block_tokens=bn, block_k=bk, num_stages=stages, num_warps=w,
                                    split=split, prefetch=True)
                        )  # fmt: skip
        return out

    vectors = [
        Variant(op="vector", block_rows=br, block_k=bk, num_warps=w, num_stages=1)
        for br in (32, 64, 128)
        for bk in (32, 64, 128)
        for w in (2, 4, 8)
        if br * bk // (32 * w) <= 128
    ]
    decode2 = [
        Variant(block_rows=br, block_tokens=16, block_k=bk, num_stages=s, num_warps=w, prefetch=True, ahead=ahead,
                split=split)
        for br, warps in ((16, (1, 2)), (32, (1, 2, 4)), (64, (4, 8)))
        for w in warps
        for bk, stage_choices in ((32, (6, 10)), (64, (3, 5, 8)), (128, (2, 3, 4, 6)), (256, (2, 3)))
        for s in stage_choices
        for ahead in (1, 2)
        for split in (1, 2)
        if br * bk * s * 2 <= 96 * 1024 and not (split > 1 and br < 64)
    ]  # fmt: skip
    mlp = Case(14336, 4096, 16)
    occupancy = [
        vary(plain, block_k=bk, num_stages=stages, prefetch=prefetch, unroll=unroll, ahead=ahead)
        for bk, stage_choices in ((16, (4, 6, 8)), (32, (2, 3, 4, 5, 6, 7, 8)), (64, (2, 3, 4, 5)))
        for stages in stage_choices
        for prefetch, ahead in ((False, 1), (True, 1), (True, 2))
        for unroll in (1, 2)
    ]
    occupancy += [vary(plain, block_k=bk, num_stages=stages, ids="none") for bk in (32, 64) for stages in (2, 3, 4)]
    occupancy += [
        vary(wide, block_k=bk, num_stages=stages, prefetch=True, unroll=unroll, ahead=ahead)
        for bk, stages in ((32, 3), (32, 5), (64, 2), (64, 3))
        for unroll in (1, 2)
        for ahead in (1, 2)
    ]
    best = [
        vary(plain, block_k=32, num_stages=5),
        vary(plain, block_k=32, num_stages=6),
        vary(plain, block_k=32, num_stages=7),
        vary(plain, block_k=64, num_stages=2, prefetch=True),
        vary(plain, block_k=64, num_stages=3, prefetch=True),
        vary(plain, block_k=64, num_stages=3, prefetch=True, ahead=2),
        vary(plain, block_k=64, num_stages=3, prefetch=True, unroll=2, ahead=2),
        vary(plain, block_k=32, num_stages=3, prefetch=True),
        vary(plain, block_k=32, num_stages=3, prefetch=True, unroll=2, ahead=2),
    ]
    ragged = [vary(b, bounds="dynamic") for b in best]
    ragged += [vary(b, bounds="dynamic", order="tokens") for b in best]
    narrow = [
        vary(small, block_tokens=bn, num_warps=w, prefetch=prefetch, block_k=bk, num_stages=stages, unroll=unroll)
        for bn, w in ((128, 2), (128, 4), (256, 4))
        for bk, stage_choices in ((16, (5, 7)), (32, (2, 3, 4, 5, 6, 7)), (64, (2, 3, 5)))
        for stages in stage_choices
        for prefetch, unroll in ((False, 1), (True, 1), (True, 2))
    ]
    tokens = [
        vary(plain, op="token_major", block_k=64, num_stages=3, prefetch=True, transpose=t)
        for t in ("xla", "triton", "triton32", "triton128", "triton128x64")
    ]
    touched = [
        vary(plain, block_k=bk, num_stages=stages, prefetch=True, touch=touch, early_rows=early)
        for bk, stage_choices in ((32, (3, 4, 5, 6)), (64, (2, 3)))
        for stages in stage_choices
        for touch in (2, 4, 6, 8)
        for early in (False, True)
    ]
    touched += [
        vary(wide, block_k=bk, num_stages=stages, prefetch=True, touch=6)
        for bk, stage_choices in ((32, (3, 4, 6)), (64, (2, 3, 4)))
        for stages in stage_choices
    ]
    final = [
        vary(plain, block_k=32, num_stages=stages, prefetch=True, touch=6, early_rows=early, order=order)
        for stages in (3, 4, 5)
        for early in (False, True)
        for order in ("groups", "tokens")
    ]
    final64 = [
        vary(small, block_tokens=bn, num_warps=w, block_k=bk, num_stages=s, prefetch=True, touch=6, early_rows=early)
        for bn, w in ((256, 4), (128, 4), (128, 2))
        for bk, s in ((16, 6), (32, 3), (32, 4), (32, 5), (32, 6), (64, 2), (64, 3))
        for early in (False, True)
    ]  # fmt: skip
    flipped = [
        Variant(block_rows=br, block_tokens=16, block_k=bk, num_stages=s, num_warps=w, prefetch=True, flip=flip,
                early_rows=early)
        for flip in (True, False)
        for br, w in ((16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8))
        for bk, s in ((128, 3), (128, 4), (256, 2), (256, 3), (512, 2))
        for early in (True,)
        if br * bk * s * 2 <= 160 * 1024
    ]  # fmt: skip
    pipelines = [
        vary(plain, block_k=bk, num_stages=stages, x=x, values=values, order=order)
        for bk, stages in ((32, 7), (32, 9), (64, 3), (64, 5), (64, 7))
        for x in ("rows", "tiles")
        for values in ("pv", "vk")
        for order in ("groups", "tokens")
    ]
    pipelines += [vary(plain, num_stages=5, flip=True), vary(plain, block_k=32, num_stages=7, flip=True)]
    pipelines += [vary(plain, num_stages=5, evict=e) for e in ("evict_last", "evict_first")]
    pipelines += [
        vary(wide, block_k=bk, num_stages=s, prefetch=p)
        for bk, s, p in ((32, 7, False), (32, 9, False), (64, 4, False), (64, 5, False), (64, 6, False), (64, 7, False))
    ]
    short = [
        vary(plain, block_rows=br, block_tokens=bn, num_warps=w, block_k=bk, num_stages=stages, early_rows=early,
             order=order)
        for br, bn, w in ((128, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
        for bk, stages in ((32, 4), (32, 6), (64, 2), (64, 3), (64, 5))
        for early in (False, True)
        for order in ("groups", "tokens")
    ]  # fmt: skip
    wide_tokens = [
        vary(wide, op="token_major", num_stages=5, transpose=t)
        for t in ("xla", "triton", "triton32", "triton128", "triton128x64", "triton256", "triton32x32")
    ]
    return {
        "layout": [(square, [*dense, *layout])],
        "tiles": [(square, [*dense, *tiles])],
        "v64": [(Case(4096, 4096, 4096, group_size=64), [*dense, *v64])],
        "backward": [(square, [*dense, *backward])],
        "decode": [
            (mlp, [*dense, *decode(16)]),
            (dataclasses.replace(mlp, n=1), [*dense, *vectors, *decode(1, (32, 64))]),
            (dataclasses.replace(mlp, n=8), [*dense, *decode(8, (32, 64))]),
            (Case(4096, 4096, 16), [*dense, *decode(16)]),
        ],
        "occupancy": [(square, [*dense, *occupancy])],
        "dynamic": [(square, [*dense, *ragged])],
        "sparsity": [(dataclasses.replace(square, sparsity=q), [*dense, *best]) for q in (0.5, 0.875)],
        "narrow": [(Case(4096, 4096, 4096, group_size=64), [*dense, *narrow])],
        "token_major": [(square, [*dense, *tokens])],
        "mlp": [
            (Case(14336, 4096, 4096), [*dense, *best, *(vary(b, order="tokens") for b in best)]),
            (Case(4096, 14336, 4096), [*dense, *best, *(vary(b, order="tokens") for b in best)]),
            (Case(3072, 768, 8192), [*dense, *best, *(vary(b, order="tokens") for b in best)]),
        ],
        "touch": [(square, [*dense, *touched])],
        "final": [
            *(
                (case, [*dense, *final, *(vary(b, bounds="dynamic") for b in final)])
                for case in (
                    square,
                    dataclasses.replace(square, sparsity=0.5),
                    dataclasses.replace(square, sparsity=0.875),
                    Case(14336, 4096, 4096),
                    Case(4096, 14336, 4096),
                    Case(3072, 768, 8192),
                )
            ),
            (Case(4096, 4096, 4096, group_size=64), [*dense, *final64]),
            (square, [*dense, *(vary(t, block_k=32, num_stages=4, touch=6) for t in tokens)]),
            (Case(4096, 4096, 16), [*dense, *flipped]),
        ],
        "pipeline": [
            (case, [*dense, *pipelines])
            for case in (square, dataclasses.replace(square, sparsity=0.5), Case(14336, 4096, 4096))
        ],
        "short": [
            (case, [*dense, *short]) for case in (Case(3072, 768, 8192), dataclasses.replace(square, sparsity=0.875))
        ],
        "token_tiles": [
            (
                square,
                [
                    *dense,
                    *(
                        vary(w, early_rows=e, transpose=t)
                        for w in wide_tokens[:1]
                        for e in (False, True)
                        for t in ("xla",)
                    ),
                ],
            ),
            (
                dataclasses.replace(square, sparsity=0.875),
                [
                    *dense,
                    *(
                        vary(wide, block_k=bk, num_stages=st, early_rows=True, order=order)
                        for order in ("groups", "tokens")
                        for bk, st in (
                            (64, 3),
                            (64, 4),
                            (64, 5),
                            (64, 6),
                            (64, 7),
                            (64, 8),
                            (64, 9),
                            (128, 3),
                            (128, 4),
                        )
                    ),
                ],
            ),
        ],
        "wide_tokens": [(square, [*dense, *wide_tokens])],
        "decode2": [(Case(4096, 4096, 16), [*dense, *decode2])],
        "small": [
            (dataclasses.replace(mlp, n=64), [*dense, *decode(64, (32, 64, 128))]),
            (dataclasses.replace(mlp, n=256), [*dense, *decode(256, (32, 64, 128))]),
        ],
    }


def label(variant: Variant) -> str:
    """The knobs that differ from the plain kernel's."""
    default = dataclasses.asdict(Variant())
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(variant).items() if v != default[k]) or "plain"


def run(names: list[str], out: pathlib.Path, minutes: float) -> None:
    """Measures the named studies and writes the results file."""
    started = time.monotonic()
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    result = {"device": device, "jax": jax.__version__, "date": str(datetime.date.today()), "records": []}
    if out.exists():
        result["records"] = json.loads(out.read_text())["records"]
    done = {json.dumps([r["study"], r["m"], r["k"], r["n"], r["sparsity"], r["group_size"], r["variant"]])
            for r in result["records"]}  # fmt: skip
    jobs = [
        (name, case, variant)
        for name in names
        for case, variants in studies()[name]
        for variant in dict.fromkeys(variants)
    ]
    jobs = [(n, c, v) for n, c, v in jobs
            if json.dumps([n, c.m, c.k, c.n, c.sparsity, c.group_size, dataclasses.asdict(v)]) not in done]  # fmt: skip

    operand_sets: dict[Case, list] = {}
    wants: dict[str, np.ndarray] = {}
    shapes: dict[Case, dict] = {}

    def operands(case):
        if case not in operand_sets:
            one = arrays(case, 0, 1)[0]
            n_sets = max(2, min(16, -(-timing.L2_BYTES // (one["values"].nbytes + one["x"].nbytes))))
            sets = arrays(case, 0, n_sets)
            for i, s in enumerate(sets):
                if i < 6:
                    s["dense"] = jax.random.normal(jax.random.key(i), (case.m, case.k), jnp.bfloat16)
            operand_sets.clear()
            operand_sets[case] = sets
            wants.clear()
        return operand_sets[case]

    for _, case, _ in jobs:
        if case not in shapes:
            shapes[case] = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays_shape(case).items()}

    def build(job):
        _, case, variant = job
        function, names_ = call(case, variant)
        try:
            return jax.jit(function).lower(*(shapes[case][n] for n in names_)).compile()
        except Exception as error:
            return repr(error)[:200]

    pool = concurrent.futures.ThreadPoolExecutor(16)
    futures = [pool.submit(build, job) for job in jobs]
    # CUPTI sees every kernel of the process, XLA's autotuning too: compile all before measuring any.
    builds = [(job, future.result()) for job, future in zip(jobs, futures, strict=True)]
    print(f"compiled {len(jobs)} variants in {time.monotonic() - started:.0f} s", flush=True)
    dense_time: dict[Case, float] = {}
    for (name, case, variant), compiled in builds:
        if time.monotonic() - started > minutes * 60:
            print("out of time", file=sys.stderr)
            break
        record: dict[str, Any] = {"study": name, "m": case.m, "k": case.k, "n": case.n, "dtype": "bfloat16"}
        record |= {"sparsity": case.sparsity, "group_size": case.group_size, "counts": "equal"}
        record["variant"] = dataclasses.asdict(variant)
        record["label"] = label(variant)
        record["op"] = "matmul_grad" if variant.op.startswith("grad") else "matmul"
        record["pattern"] = "dense" if variant.op == "dense" else "shfl_bw"
        record["implementation"] = "xla" if variant.op in ("dense", "grad_input_xla") else "triton"
        if isinstance(compiled, str):
            record["error"] = compiled
        else:
            sets = operands(case)
            _, names_ = call(case, variant)
            try:
                used = [s for s in sets if all(n in s for n in names_)]
                if variant.op != "dense":
                    kind = variant.op if variant.op == "grad_values" else "forward"
                    kind = "grad_input" if variant.op.startswith("grad_input") else kind
                    if kind not in wants:
                        wants[kind] = reference(case, sets[0], kind)
                    got = compiled(*(sets[0][n] for n in names_))
                    record["relative_error"] = check(case, variant, got, wants[kind])
                calls = timing.kernel_times(compiled, [tuple(s[n] for n in names_) for s in used])
                time_us = statistics.median(sum(times) for times in calls)
                record |= {"time_us": time_us, "kernels": len(calls[0])}
                if len(calls[0]) > 1:
                    record["kernel_times_us"] = [statistics.median(k) for k in zip(*calls, strict=True)]
                if variant.op == "dense":
                    dense_time[case] = min(time_us, dense_time.get(case, np.inf))
                record["dense_time_us"] = dense_time.get(case)
                record["speedup"] = dense_time[case] / time_us if case in dense_time else None
            except Exception as error:
                record["error"] = repr(error)[:200]
        result["records"].append(record)
        knobs = record["label"]
        print(f"{name} {case.m}x{case.k}x{case.n} V{case.group_size}: {record.get('time_us', 0):8.2f} us "
              f"x{record.get('speedup') or 0:.2f} err {record.get('relative_error', 0):.1e} k{record.get('kernels')} "
              f"{knobs} {record.get('error', '')}", flush=True)  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def arrays_shape(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the operands, for compiling before they exist."""
    bf16, i32, p = jnp.bfloat16, jnp.int32, case.groups * case.kept
    return {
        "values": jax.ShapeDtypeStruct((p, case.group_size), bf16),
        "values_vk": jax.ShapeDtypeStruct((case.groups, case.group_size, case.kept), bf16),
        "columns": jax.ShapeDtypeStruct((p,), i32),
        "group_ptr": jax.ShapeDtypeStruct((case.groups + 1,), i32),
        "rows": jax.ShapeDtypeStruct((case.m,), i32),
        "x": jax.ShapeDtypeStruct((case.k, case.n), bf16),
        "x_tokens": jax.ShapeDtypeStruct((case.n, case.k), bf16),
        "x_tiles": jax.ShapeDtypeStruct((-(-case.n // 128), case.k, min(case.n, 128)), bf16),
        "dy": jax.ShapeDtypeStruct((case.m, case.n), bf16),
        "dense": jax.ShapeDtypeStruct((case.m, case.k), bf16),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="+", choices=list(studies()))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    run(options.studies, options.out, options.minutes)


if __name__ == "__main__":
    main()
