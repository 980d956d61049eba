"""The variants of the forward kernel, with transposes around it and for a single token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


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
