"""Row-grouped products in plain XLA: gather the activations a group reads, then one batched product a bucket."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.row_grouped import Topology, slot_groups, slot_is_real, to_dense


def forward(matrix, x, bias, *, activation, layout, precision):
    """Computes activation(W x + bias); see `matmul` for the arguments, here 2-D."""
    if layout == "token_major":
        x = x.T
    topology = matrix.topology
    ys = []
    for b in _buckets(topology):
        values, columns = b.take(matrix.values, 0), b.take(topology.columns, topology.k)
        gathered = x.at[columns].get(mode="fill", fill_value=0)
        ys.append(_einsum("gcv,gcn->gvn", values, gathered, precision=precision))
    stored = jnp.concatenate(ys).reshape(-1, x.shape[-1])
    y = stored[_positions(topology)]
    if bias is not None:
        y = y + bias[:, None]
    y = _ACTIVATIONS[activation](y).astype(x.dtype)
    return y.T if layout == "token_major" else y


def grad_values(topology, x, dy, *, layout, precision):
    """Computes dValues (P, V), zero on padding and on sentinel rows."""
    if layout == "token_major":
        x, dy = x.T, dy.T
    v = topology.group_size
    rows = topology.rows.reshape(-1, v)
    ds, slots = [], []
    for b in _buckets(topology):
        columns = b.take(topology.columns, topology.k)
        gathered = x.at[columns].get(mode="fill", fill_value=0)
        dyg = dy.at[rows[b.start : b.start + b.groups]].get(mode="fill", fill_value=0)
        ds.append(_einsum("gcn,gvn->gcv", gathered, dyg, precision=precision).reshape(-1, v))
        slots.append(b.slots.reshape(-1))
    d = jnp.concatenate(ds)
    if topology.segments is None:
        d = jnp.zeros((topology.num_slots, v), d.dtype).at[jnp.concatenate(slots)].set(d, mode="drop")
    live = rows.at[slot_groups(topology)].get(mode="fill", fill_value=topology.m) < topology.m
    return jnp.where(live & slot_is_real(topology)[:, None], d, 0).astype(x.dtype)


def grad_input(matrix, dy, *, layout, precision):
    """Computes dX = W^T dY."""
    dense = to_dense(matrix)
    if layout == "token_major":
        return _einsum("mk,nm->nk", dense, dy, precision=precision).astype(dy.dtype)
    return _einsum("mk,mn->kn", dense, dy, precision=precision).astype(dy.dtype)


def prepare(matrix):
    """Returns the matrix as it is."""
    return matrix


_ACTIVATIONS = {None: lambda y: y, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


class _Bucket(NamedTuple):
    start: int
    groups: int
    slots: jax.Array

    def take(self, array, fill):
        return array.at[self.slots].get(mode="fill", fill_value=fill)


def _buckets(topology: Topology) -> list[_Bucket]:
    real = slot_is_real(topology)
    if topology.segments is None:
        ptr = topology.group_ptr
        slots = ptr[:-1, None] + jnp.arange(topology.max_count)
        slots = jnp.where(slots < ptr[1:, None], slots, topology.num_slots)
        return [_Bucket(0, topology.num_groups, slots)]
    out, group, slot = [], 0, 0
    for groups, count in topology.segments:
        slots = slot + jnp.arange(groups * count).reshape(groups, count)
        out.append(_Bucket(group, groups, jnp.where(real[slots], slots, topology.num_slots)))
        group, slot = group + groups, slot + groups * count
    return out


def _positions(topology: Topology) -> jax.Array:
    return jnp.argsort(topology.rows)[: topology.m]


def _einsum(spec, a, b, *, precision):
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)
