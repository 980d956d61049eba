"""Measured tables: the problems that were timed on a device, and the entry nearest to a new one.

`tables/<device>.json` holds products of every implementation, written by `shfl-jax tune`;
`tables/convolutions/<device>.json` holds convolutions, written by `python -m benchmarks.conv --table`. Looking an entry
up needs no GPU in the process.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pallas_kernels._backend import FEW_TOKENS, Problem

Entry = dict[str, Any]
TABLES = pathlib.Path(__file__).parent / "tables"


def nearest(
    entries: Iterable[Entry],
    sizes: Mapping[str, int],
    *,
    within: float = math.inf,
    penalty: Callable[[Entry], float] = lambda entry: 0.0,
) -> Entry | None:
    """The entry whose sizes differ least, by the sum of their log ratios; the first of equally near ones.

    Args:
        entries: the candidates.
        sizes: name of a field -> its size, positive.
        within: None is returned unless an entry is nearer than this.
        penalty: what else sets an entry apart.
    """

    def distance(entry: Entry) -> float:
        return sum(abs(math.log(entry[name] / size)) for name, size in sizes.items()) + penalty(entry)

    best = min(entries, key=distance, default=None)
    return best if best is not None and distance(best) < within else None


def products(device: str | None, implementation: str, problem: Problem) -> list[Entry]:
    """The entries of a device's table for an implementation that another problem of their sizes could use."""
    return [
        entry
        for entry in _read(TABLES / f"{file_name(device)}.json")
        if entry.get("implementation", "triton") == implementation
        and all(entry[name] == getattr(problem, name) for name in ("op", "group_size", "dtype"))
        and (entry["n"] <= FEW_TOKENS) == problem.few_tokens
    ]


def nearest_product(device: str | None, implementation: str, problem: Problem) -> Entry | None:
    """The entry whose config serves a problem: with counts of the same kind, and sizes within a factor of 4 in all."""
    alike = [entry for entry in products(device, implementation, problem) if entry["equal"] == problem.equal]
    return nearest(alike, problem.sizes, within=math.log(4))


def convolutions(device: str | None) -> tuple[Entry, ...]:
    """All entries of a device's table of convolutions; empty where there is none."""
    return _read(TABLES / "convolutions" / f"{file_name(device)}.json")


def file_name(device: str | None) -> str:
    """A device kind as file name: lower case, with dashes."""
    return (device or "no device").lower().replace(" ", "-")


@functools.cache
def _read(path: pathlib.Path) -> tuple[Entry, ...]:
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()
