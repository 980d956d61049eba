"""Predicts how long a product or a convolution takes on a device, sparse and dense, from its tables of measurements.

The nearest measured entry is scaled by a roofline: what the arithmetic, the memory traffic and the chain of dependent
loads of the two problems would take. So the constants below matter only for the way from the entry to the problem.
Where dispatch takes the Mosaic kernel, Triton's time is scaled by how much faster that one was. Convolutions were timed
through dispatch with channels first, beside the fastest dense convolution of any library and layout.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp

from pallas_kernels import _tables as tables
from pallas_kernels._backend import Problem, choose
from pallas_kernels._devices import GPU
from pallas_kernels.mosaic._backend import Mosaic

FLOPS_PER_US = 7e8  # what a dense product reaches
BYTES_PER_US = 4e6
LAUNCH_US = 2.5  # the shortest kernel, from launch to end
SLOT_US = 0.003  # a program walks over its group's slots one after another
PROGRAMS = 128  # that keep a large GPU busy
TOKEN_TILE = 256
TRANSPOSE_BYTES_PER_US = 3.7e6


class Prediction(NamedTuple):
    """Predicted times in microseconds."""

    sparse_us: float
    dense_us: float

    @property
    def speedup(self) -> float:
        """How many times faster the sparse product is."""
        return self.dense_us / self.sparse_us


def predict(
    m: int, k: int, n: int, *, slots: int, group_size: int, dtype: str = "bfloat16", equal: bool = True,
    layout: Literal["token_major", "feature_major"] = "token_major", device: str | None = None,
) -> Prediction | None:  # fmt: skip
    """Predicts one forward product.

    Args:
        m: output features.
        k: input features.
        n: tokens.
        slots: kept columns over all groups.
        group_size: rows of a group.
        dtype: of values and activations.
        equal: whether the groups have equal counts.
        layout: of the activations; token-major ones are transposed before and after the sparse product.
        device: a device kind, as `jax.Device.device_kind`.

    Returns:
        The two times, or None where the device has no table or the table nothing of this group size and dtype.
    """
    problem = Problem("forward", m, k, n, slots, group_size, jnp.dtype(dtype).name, equal)
    entry = _nearest(problem, device, "triton") if min(problem.sizes.values()) > 0 else None
    if entry is None:
        return None
    measured = Problem.of(entry)
    sparse = entry["time_us"] * _sparse_roofline(problem) / _sparse_roofline(measured)
    dense = entry["dense_time_us"] * _dense_roofline(problem) / _dense_roofline(measured)
    if device is not None and choose(problem, [Mosaic()], GPU(device)) is not None:
        faster = _nearest(problem, device, "mosaic_gpu")
        sparse *= min(1, faster["time_us"] / faster["triton_time_us"]) if faster else 1
    if layout == "token_major" and n > 1:
        moved = 2 * (m + k) * n * problem.itemsize
        sparse += LAUNCH_US + moved / TRANSPOSE_BYTES_PER_US
    return Prediction(sparse, dense)


def _nearest(problem: Problem, device: str | None, implementation: str) -> tables.Entry | None:
    """The nearest entry of an implementation, however far it is, with other counts if need be."""
    entries = tables.products(device, implementation, problem)
    return tables.nearest(entries, problem.sizes, penalty=lambda entry: float(entry["equal"] != problem.equal))


def predict_convolution(
    m: int,
    k: int,
    n: int,
    *,
    taps: int,
    slots: int,
    group_size: int,
    dtype: str = "bfloat16",
    device: str | None = None,
) -> Prediction | None:  # fmt: skip
    """Predicts one forward convolution.

    Args:
        m: output channels.
        k: columns of the filter matrix, taps times channels.
        n: pixels of all output images.
        taps: of a filter; 3 x 3 has nine.
        slots: kept columns over all groups.
        group_size: rows of a group.
        dtype: of filters and images.
        device: a device kind, as `jax.Device.device_kind`.

    Returns:
        The two times, or None where the device has no table or the table nothing of this group size and dtype.
    """
    sizes = {"m": m, "k": k, "n": n, "taps": taps, "slots": slots}
    # What one tap costs says nothing about several, nor the other way round.
    alike = [
        entry
        for entry in tables.convolutions(device)
        if (entry["group_size"], entry["dtype"], entry["taps"] == 1) == (group_size, dtype, taps == 1)
    ]
    entry = tables.nearest(alike, sizes) if min(sizes.values()) > 0 else None
    if entry is None:
        return None
    itemsize = jnp.dtype(dtype).itemsize
    ideal, ideal_of_entry = (_ideal_us(of, group_size, itemsize) for of in (sizes, entry))
    return Prediction(
        entry["time_us"] * (ideal.sparse_us / ideal_of_entry.sparse_us),
        entry["dense_time_us"] * (ideal.dense_us / ideal_of_entry.dense_us),
    )


def _sparse_roofline(p: Problem) -> float:
    flops = 2 * p.slots * p.group_size * p.n
    moved = (p.slots * p.group_size + (p.m + p.k) * p.n) * p.itemsize
    chain = SLOT_US * p.slots * p.group_size / p.m
    busy = _busy(p, p.group_size)
    return LAUNCH_US + max(flops / FLOPS_PER_US / busy, moved / BYTES_PER_US, chain)


def _dense_roofline(p: Problem) -> float:
    flops = 2 * p.m * p.k * p.n
    moved = (p.m * p.k + (p.m + p.k) * p.n) * p.itemsize
    busy = _busy(p, 128) ** 0.25  # a dense library splits the contraction: it loses far less
    return LAUNCH_US + max(flops / FLOPS_PER_US / busy, moved / BYTES_PER_US)


def _busy(p: Problem, rows: int) -> float:
    """Share of the multiprocessors at work: a tile is one program, and few rows and tokens make few."""
    programs = -(-p.m // rows) * -(-p.n // TOKEN_TILE)
    return min(1, programs / PROGRAMS) if p.n > TOKEN_TILE else 1


def _ideal_us(sizes: Mapping[str, int], group_size: int, itemsize: int) -> Prediction:
    """What the arithmetic and the traffic would take, which dense libraries overlap and our short tiles hardly do."""
    m, k, n, slots = (sizes[name] for name in ("m", "k", "n", "slots"))
    images = (m + k / sizes["taps"]) * n
    flops, moved = 2 * slots * group_size * n, (slots * group_size + images) * itemsize
    dense_flops, dense_moved = 2 * m * k * n, (m * k + images) * itemsize
    return Prediction(
        LAUNCH_US + flops / FLOPS_PER_US + moved / BYTES_PER_US,
        LAUNCH_US + max(dense_flops / FLOPS_PER_US, dense_moved / BYTES_PER_US),
    )
