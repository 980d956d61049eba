"""Row-grouped products in plain XLA, in the forms that are fastest on a CPU.

A group's product gathers the activations it reads, (slots, N), and multiplies them by its values. Groups whose
segments have the same length form a run, one batched product. Values of an unprepared matrix are (slots, V);
`_layout.prepare` stores them (V, slots), which saves the product the transposition of its weights.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._layout import Prepared, slot_groups, slot_index, slot_is_real, stored_rows_dense
from pallas_kernels.xla._layout import CPULayout

# Gathered activations of one product, in bytes.
GATHER_BYTES = 8 << 20
MAX_PRODUCTS = 64
# Gathered activations of a call, in bytes, from which on a loop with small products is better: it reuses its buffers,
# and memory fresh from the system costs more than the product.
LOOP_BYTES = 4 << 20
LOOP_GATHER_BYTES = 1 << 20
TOKENS_OF_LOOPS = 512
# Decompressed weights of one product, in bytes: a larger W is never whole in memory, not even in the derivative.
DENSE_BYTES = 2 << 20

Gather = Callable[[jax.Array, bool], jax.Array]
"""Makes rows of a product's right side: (their indices, whether the sentinel K is among them) -> (*indices, N)."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "columns", "rows"], meta_fields=["sentinels"]
)
@dataclasses.dataclass(frozen=True)
class _Run:
    """Groups with the same number of slots."""

    values: jax.Array | None  # (groups, V, slots) where K-contiguous, else (groups, slots, V)
    columns: jax.Array  # (groups, slots), K on padding
    rows: jax.Array  # (groups, V), M on sentinel rows
    sentinels: bool  # whether a column may be K


def feature_major(values: jax.Array, layout: CPULayout, x: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """W x, (K, N) to (M, N)."""
    return gathered_product(values, layout, functools.partial(_rows_of, x), x.shape[1], precision)


def gathered_product(
    values: jax.Array, layout: CPULayout, gather: Gather, n: int, precision: lax.PrecisionLike
) -> jax.Array:
    """W X, (M, N), for an X (K, N) of the matrix's dtype that need not exist: `gather` makes the rows asked for."""
    n = _known(n)
    token_bytes = values.dtype.itemsize * n
    loop = _is_large(layout, n, token_bytes)
    spec = "gvc,gcn->gvn" if layout.k_contiguous else "gcv,gcn->gvn"

    def product(run: _Run) -> jax.Array:
        y = _einsum(spec, run.values, gather(run.columns, run.sentinels), precision)
        return y.reshape(y.shape[0] * y.shape[1], y.shape[2])

    stored = jnp.concatenate(_by_products(product, _runs(values, layout), token_bytes, loop=loop))
    return _permute_rows(stored, layout.inverse_rows, loop=loop)


def token_major(values: jax.Array, layout: CPULayout, x: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    """W x for every row of x, (N, K) to (N, M), without a transposition: gathers of columns are cheaper on a CPU."""
    spec = "gnc,gvc->gnv" if layout.k_contiguous else "gnc,gcv->gnv"

    def product(run: _Run) -> jax.Array:
        def gather(x: jax.Array, columns: jax.Array) -> jax.Array:
            return jnp.stack([_columns_of(x, group, run.sentinels) for group in columns])

        y = _einsum(spec, _apart(gather, layout, x, run.columns), run.values, precision)
        groups, n, v = y.shape
        return y.swapaxes(0, 1).reshape(n, groups * v)  # -1 knows no answer where there are no tokens

    token_bytes = x.dtype.itemsize * _known(x.shape[0])
    parts = _by_products(product, _runs(values, layout), token_bytes)
    # The permutation would look every element up in one part after another.
    stored = _apart(_side_by_side, layout, *parts) if len(parts) > 1 else parts[0]
    return _columns_of(stored, layout.inverse_rows, sentinels=False)


def _side_by_side(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, axis=1)


def _apart(function: Callable[..., jax.Array], layout: CPULayout, *arrays: jax.Array) -> jax.Array:
    """Makes XLA compute function(*arrays) as it stands on a CPU, fused neither with its readers nor its arguments.

    A gather of columns that is fused into a product comes out transposed, many times slower than both. XLA does not
    look into the branches of a condition, and cannot know that this one always holds.
    """
    shape = jax.eval_shape(function, *arrays)

    def never(*arrays: jax.Array) -> jax.Array:
        return jnp.zeros(shape.shape, shape.dtype)

    def conditional(holds: jax.Array, *arrays: jax.Array) -> jax.Array:
        return lax.cond(holds, function, never, *arrays)

    def plain(holds: jax.Array, *arrays: jax.Array) -> jax.Array:
        return function(*arrays)

    return lax.platform_dependent(layout.group_ptr[-1] >= 0, *arrays, cpu=conditional, default=plain)


def _known(n: Any) -> int:
    """The number of tokens, or where it is symbolic (`jax.export`) one whose form suits any size."""
    return n if isinstance(n, int) else TOKENS_OF_LOOPS


def _is_large(layout: CPULayout, n: int, token_bytes: int) -> bool:
    return layout.num_slots * token_bytes > LOOP_BYTES and n >= TOKENS_OF_LOOPS


def _by_products(
    product: Callable[[_Run], jax.Array],
    runs: Iterable[_Run],
    token_bytes: int,
    *,
    loop: bool = False,
) -> list[jax.Array]:
    """Runs `product` over all groups, some at a time.

    A loop reuses its buffers, and what it returns for one run is one array.
    """
    parts: list[jax.Array] = []
    for run in runs:
        groups, count = run.columns.shape
        limit = LOOP_GATHER_BYTES if loop else GATHER_BYTES
        most = min(max(limit // max(count * token_bytes, 1), -(-groups // MAX_PRODUCTS), 1), groups)
        step = next(step for step in range(most, 0, -1) if groups % step == 0)
        chunks = jax.tree.map(functools.partial(_cut, step), run)
        if loop:
            part = lax.map(product, chunks)
            parts.append(part.reshape(part.shape[0] * part.shape[1], *part.shape[2:]))
        else:
            parts += [product(jax.tree.map(operator.itemgetter(i), chunks)) for i in range(groups // step)]
    return parts


def _cut(length: int, a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0] // length, length, *a.shape[1:])


def _permute_rows(stored: jax.Array, order: jax.Array, *, loop: bool) -> jax.Array:
    """Rows of `stored` in the given order."""
    moved = _rows_of(_store(stored) if loop else stored, order, sentinels=False)
    return _store(moved) if loop else moved


def _store(a: jax.Array) -> jax.Array:
    """Makes XLA store an array instead of fusing it into its readers, on a CPU.

    A transposition that is fused into a gather makes it stride, many times slower than both. XLA's own barrier is
    gone before it fuses; what a loop carries has to be stored, so this one rewrites the first element, twice.
    """
    if a.size == 0:
        return a
    first = a[(0,) * a.ndim]

    def rewrite(_: jax.Array, b: jax.Array) -> jax.Array:
        return b.at[(0,) * b.ndim].set(first)

    def carried(a: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 2, rewrite, a)

    def same(a: jax.Array) -> jax.Array:
        return a

    return lax.platform_dependent(a, cpu=carried, default=same)


def grad_values(
    layout: CPULayout, x: jax.Array, dy: jax.Array, precision: lax.PrecisionLike, *, token_major: bool
) -> jax.Array:
    """Computes the gradient of the values, (P, V) in their arrangement; zero on padding and sentinel rows."""
    if token_major:
        x, dy = _store(x.T), _store(dy.T)
    return gathered_gradient(layout, functools.partial(_rows_of, x), dy.astype(x.dtype), precision, loop=token_major)


def gathered_gradient(
    layout: CPULayout, gather: Gather, dy: jax.Array, precision: lax.PrecisionLike, *, loop: bool = False
) -> jax.Array:
    """The gradient of the values of `gathered_product`; dy is (M, N), of the dtype that `gather` makes."""
    v, known = layout.group_size, layout.segments is not None
    spec = "gcn,gvn->gvc" if layout.k_contiguous else "gcn,gvn->gcv"

    def product(run: _Run) -> jax.Array:
        gathered = gather(run.columns, run.sentinels)
        gradient = _einsum(spec, gathered, _rows_of(dy, run.rows), precision)
        return gradient.reshape(-1, v) if known else gradient

    n = _known(dy.shape[1])
    token_bytes = dy.dtype.itemsize * n
    loop = loop or _is_large(layout, n, token_bytes)
    gradient = jnp.concatenate(_by_products(product, _runs(None, layout), token_bytes, loop=loop))
    group = slot_groups(layout)
    if not known:
        offset = jnp.arange(layout.num_slots) - layout.group_ptr[group]
        gradient = gradient.at[group, offset].get(mode="fill", fill_value=0)
    live = layout.rows.reshape(-1, v).at[group].get(mode="fill", fill_value=layout.m) < layout.m
    live = live & slot_is_real(layout)[:, None]
    return jnp.where(layout.stored_values(live), gradient, 0).astype(dy.dtype)


def grad_input(matrix: Prepared, dy: jax.Array, precision: lax.PrecisionLike, *, token_major: bool) -> jax.Array:
    """Computes W^T dy."""
    layout = matrix.layout
    groups, v, k = layout.num_groups, layout.group_size, layout.k

    def product(dense: jax.Array, rows: jax.Array) -> jax.Array:
        if layout.rows.shape[-1] > layout.m:  # what sentinel rows hold must not meet a product
            dense = jnp.where(rows < layout.m, dense, 0)
        if token_major:
            stored = dy.at[:, rows].get(mode="fill", fill_value=0)
            return _einsum("ns,ks->nk", stored, dense, precision)
        return _einsum("ks,sn->kn", dense, _rows_of(dy, rows), precision)

    parts = min(-(-k * groups * v * matrix.values.dtype.itemsize // DENSE_BYTES), groups)
    if parts <= 1 or layout.num_slots == 0:
        return product(stored_rows_dense(matrix), layout.rows).astype(dy.dtype)
    step = -(-groups // parts)
    missing = parts * step - groups
    index = jnp.pad(slot_index(layout), ((0, 0), (0, missing)), constant_values=layout.num_slots)
    rows = jnp.pad(layout.rows, (0, missing * v), constant_values=layout.m)
    values = layout.slot_values(matrix.values)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        here = lax.dynamic_slice_in_dim(index, i * step, step, 1)
        dense = values.at[here].get(mode="fill", fill_value=0).reshape(k, step * v)
        return total + product(dense, lax.dynamic_slice_in_dim(rows, i * step * v, step * v))

    shape = (dy.shape[0], k) if token_major else (k, dy.shape[1])
    total = jnp.zeros(shape, jnp.promote_types(dy.dtype, jnp.float32))
    return lax.fori_loop(0, parts, add, total).astype(dy.dtype)


def _runs(values: jax.Array | None, layout: CPULayout) -> Iterator[_Run]:
    """The groups by segment length; ragged counts unknown when tracing are one run, padded to the largest group."""
    v, ptr = layout.group_size, layout.group_ptr
    rows = layout.rows.reshape(-1, v)
    if layout.segments is None:
        end = ptr[1:] if layout.counts is None else ptr[:-1] + layout.counts
        slots = ptr[:-1, None] + jnp.arange(layout.max_count)
        slots = jnp.where(slots < end[:, None], slots, layout.num_slots)
        columns = layout.columns.at[slots].get(mode="fill", fill_value=layout.k)
        yield _Run(None if values is None else _rows_of(values, slots), columns, rows, True)
        return
    group = slot = 0
    for groups, count in layout.segments:
        end, last = slot + groups * count, group + groups
        columns = layout.columns[slot:end].reshape(groups, count)
        sentinels = layout.sentinels
        if layout.counts is not None and not layout.k_contiguous:  # padding may repeat a column
            columns = jnp.where(jnp.arange(count) < layout.counts[group:last, None], columns, layout.k)
            sentinels = True
        shape = (groups, v, count) if layout.k_contiguous else (groups, count, v)
        segment = None if values is None else values[slot:end].reshape(shape)
        yield _Run(segment, columns, rows[group:last], sentinels)
        group, slot = last, end


def _rows_of(array: jax.Array, index: jax.Array, sentinels: bool = True) -> jax.Array:
    """Rows of an array, zeros where the index is a sentinel."""
    return array.at[index].get(mode=_GATHER_MODE[sentinels], fill_value=0, wrap_negative_indices=False)


def _columns_of(array: jax.Array, index: jax.Array, sentinels: bool) -> jax.Array:
    """Columns of an array, zeros where the index is a sentinel."""
    return array.at[:, index].get(mode=_GATHER_MODE[sentinels], fill_value=0, wrap_negative_indices=False)


_GATHER_MODE = {True: "fill", False: "promise_in_bounds"}


def _einsum(spec: str, a: Any, b: Any, precision: lax.PrecisionLike) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return product(a.astype(dtype), b.astype(dtype))

    if a.dtype == dtype:
        return product(a, b)
    # A CPU widens half precision in any case, but JAX 0.10 fails to run such a product with some operand layouts.
    return lax.platform_dependent(a, b, cpu=widened, default=product)
