"""Predicts how long a product takes on a device, sparse and dense, from the device's table of measurements.

The nearest measured entry is scaled by a roofline: what the arithmetic, the memory traffic and the chain of dependent
loads of the two problems would take. So the constants below matter only for the way from the entry to the problem.
Where dispatch takes the Mosaic kernel, Triton's time is scaled by how much faster that one was.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from pallas_kernels import configs, mosaic_gpu
from pallas_kernels.configs import Problem

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
    problem = Problem("forward", m, k, n, slots, group_size, jnp_name(dtype), equal)
    entry = _nearest(problem, device, "triton") if min(m, k, n, slots) > 0 else None
    if entry is None:
        return None
    measured = Problem(**{field.name: entry[field.name] for field in dataclasses.fields(Problem)})
    sparse = entry["time_us"] * _sparse_roofline(problem) / _sparse_roofline(measured)
    dense = entry["dense_time_us"] * _dense_roofline(problem) / _dense_roofline(measured)
    if mosaic_gpu.can(problem) and mosaic_gpu.is_faster(problem, device):
        faster = _nearest(problem, device, "mosaic_gpu")
        sparse *= min(1, faster["time_us"] / faster["triton_time_us"]) if faster else 1
    if layout == "token_major" and n > 1:
        moved = 2 * (m + k) * n * problem.itemsize
        sparse += LAUNCH_US + moved / TRANSPOSE_BYTES_PER_US
    return Prediction(sparse, dense)


def jnp_name(dtype) -> str:
    """The name of a dtype given as name or type."""
    return dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or dtype.__name__


def _nearest(problem: Problem, device: str | None, implementation: str) -> dict[str, Any] | None:
    """The nearest entry of an implementation, however far it is, with other counts if need be."""
    best, best_distance = None, math.inf
    for entry in configs.entries(device, implementation) if device else ():
        if any(entry[name] != getattr(problem, name) for name in ("op", "group_size", "dtype")):
            continue
        apart = configs.distance(problem, entry) + (entry["equal"] != problem.equal)
        if (entry["n"] <= 256) == (problem.n <= 256) and apart < best_distance:
            best, best_distance = entry, apart
    return best


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
