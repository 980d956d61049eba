"""Predicts how long a convolution takes on a device, sparse and dense, from the device's table of measurements.

The table (`tables/convolutions/<device>.json`) holds what the default implementation took with channels first, and the
fastest dense convolution of any library and layout beside it. `python -m benchmarks.conv --table` writes it.
"""

import functools
import json
import math

from pallas_kernels import configs
from pallas_kernels.cost import Prediction

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
    """Predicts one forward convolution: the nearest measured one, scaled by its arithmetic.

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
    wanted = {"m": m, "k": k, "n": n, "slots": slots}

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
    return Prediction(
        entry["time_us"] * slots * n / (entry["slots"] * entry["n"]),
        entry["dense_time_us"] * m * k * n / (entry["m"] * entry["k"] * entry["n"]),
    )


@functools.cache
def _table(device: str) -> tuple[dict, ...]:
    path = FOLDER / f"{device}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()
