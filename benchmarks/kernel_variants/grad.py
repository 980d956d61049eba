"""The variants of the kernels of the derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


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
