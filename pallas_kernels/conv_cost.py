"""Predicts how long a convolution takes on a device, sparse and dense, from the device's table of measurements.

The table (`tables/convolutions/<device>.json`) holds what the default implementation took with channels first, and the
fastest dense convolution of any library and layout beside it. `python -m benchmarks.conv --table` writes it.
The nearest entry is scaled by what arithmetic and memory traffic of the two convolutions would take.
"""

import functools
import json
import math
from collections.abc import Mapping

import jax.numpy as jnp

from pallas_kernels import configs
from pallas_kernels.cost import BYTES_PER_US, FLOPS_PER_US, LAUNCH_US, Prediction

FOLDER = configs.TABLES / "convolutions"


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
    wanted = {"m": m, "k": k, "n": n, "taps": taps, "slots": slots}

    def distance(entry: dict) -> float:
        return sum(abs(math.log(entry[name] / size)) for name, size in wanted.items())

    # What one tap costs says nothing about several, nor the other way round.
    same = [
        entry
        for entry in (_table(configs.device_name(device)) if device else ())
        if (entry["group_size"], entry["dtype"], entry["taps"] == 1) == (group_size, dtype, taps == 1)
    ]
    if not same or not all(wanted.values()):
        return None
    entry = min(same, key=distance)
    itemsize = jnp.dtype(dtype).itemsize
    ideal, ideal_of_entry = (_ideal_us(sizes, group_size, itemsize) for sizes in (wanted, entry))
    return Prediction(
        entry["time_us"] * (ideal.sparse_us / ideal_of_entry.sparse_us),
        entry["dense_time_us"] * (ideal.dense_us / ideal_of_entry.dense_us),
    )


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


@functools.cache
def _table(device: str) -> tuple[dict, ...]:
    path = FOLDER / f"{device}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()
