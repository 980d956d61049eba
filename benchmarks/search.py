"""What the row-permutation search keeps of a pretrained model and of synthetic weights: `python -m benchmarks.search`.

Compares the rows in order (VW), the published K-means, annealing (the default) and the upper bound
(unstructured) on all 36 encoder matrices of all-MiniLM-L6-v2 and on random ones, and TVW, Shfl-BW and Shfl-TVW at a
total sparsity of 75%. Weights are ranked by magnitude; every pattern keeps its default counts, which differ between
groups ("ragged"). It appends to benchmarks/results/<device>/search.json, skips cases that are there, and can be stopped
at any time. `--again` measures what is there anew, but for the K-means results; `--time` only adds times and memory of
larger layers; `--table` only prints what is there.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import records as files
from shfl_jax import TVW, VW, ShflBW, ShflTVW, Unstructured
from shfl_jax.patterns import Mask, Pattern
from training import bert

GROUP_SIZES = (32, 64, 128)
SPARSITIES = (0.5, 0.75, 0.875, 0.9)
SYNTHETIC = {f"{kind} {m}x{k}": (kind, m, k) for kind in ("normal", "low_rank") for m, k in ((384, 384), (1536, 384))}
TOTAL = 0.75
"""Sparsity of the comparison with 2:4 inside the groups."""
TIMED = ((1536, 384), (4096, 4096))
COMPILED = (14336, 4096)
"""A layer whose search is compiled for its memory, and run on an accelerator only."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: `op` "search" or "two_four", the name of the weights, V, and the sparsity."""

    op: str
    weights: str
    group_size: int
    sparsity: float


def synthetic(kind: str, m: int, k: int, rank: int = 16, seed: int = 0) -> np.ndarray:
    """Random weights (M, K) float32: "normal", or "low_rank" with as much normal noise on top."""
    rng = np.random.default_rng([seed, m, k])
    noise = rng.standard_normal((m, k))
    if kind == "normal":
        return noise.astype(np.float32)
    return (rng.standard_normal((m, rank)) @ rng.standard_normal((rank, k)) / rank**0.5 + noise).astype(np.float32)


def encoder_weights() -> dict[str, np.ndarray]:
    """The 36 matrices of the pretrained encoder, (M, K) each, by "<layer>/<name>"."""
    params, weights = bert.pretrained().params, {}
    for i in range(6):
        block = params[f"block_{i}"]
        for name in ("query", "key", "value"):
            kernel = np.asarray(block["attention"][name]["kernel"])
            weights[f"{i}/{name}"] = kernel.reshape(len(kernel), -1).T
        kernel = np.asarray(block["attention"]["out"]["kernel"])
        weights[f"{i}/out"] = kernel.reshape(-1, kernel.shape[-1]).T
        for name in ("up", "down"):
            weights[f"{i}/{name}"] = np.asarray(block[name]["kernel"]).T
    return weights


def cases(shapes: dict[str, tuple[int, int]]) -> Iterator[Case]:
    """All cases, those of one shape and V together because they share a compiled program."""
    for op, sparsities in (("search", SPARSITIES), ("two_four", (TOTAL,))):
        for shape in sorted(set(shapes.values())):
            for v in GROUP_SIZES:
                for name in shapes:
                    if shapes[name] == shape and (op == "search" or name not in SYNTHETIC):
                        yield from (Case(op, name, v, sparsity) for sparsity in sparsities)


@functools.cache
def compiled(pattern: Pattern, shape: tuple[int, int]) -> tuple[jax.stages.Compiled, float]:
    """A program from scores (M, K) float32 and a count to a mask, and the seconds its compilation took."""
    start = time.perf_counter()
    arguments = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.jit(lambda scores, count: pattern.mask(scores, count)).lower(*arguments).compile()
    return program, time.perf_counter() - start


def peak_bytes(program: jax.stages.Compiled) -> int:
    """Peak memory of a program by XLA's plan: arguments, results and temporaries."""
    plan: Any = program.memory_analysis()
    return int(plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes)


def run(pattern: Pattern, scores: jax.Array, sparsity: float) -> tuple[float, float]:
    """Retained saliency, and the seconds of a compiled call."""
    # The number of units is an argument, so that one program serves all sparsities.
    program, _ = compiled(pattern, scores.shape)
    count = pattern.count(scores.shape, sparsity)
    start = time.perf_counter()
    mask: Mask = jax.block_until_ready(program(scores, count))
    seconds = time.perf_counter() - start
    exact = np.asarray(scores, np.float64)
    return float(exact[np.asarray(mask.elements())].sum() / exact.sum()), seconds


def measure(case: Case, weight: np.ndarray, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measures one case: its record.

    Args:
        case: what to measure.
        weight: (M, K).
        known: an earlier record of the case, whose K-means results are taken over.
    """
    scores, v, s = jnp.abs(jnp.asarray(weight)), case.group_size, case.sparsity
    record: dict[str, Any] = dataclasses.asdict(case) | {"m": weight.shape[0], "k": weight.shape[1], "counts": "ragged"}
    if case.op == "two_four":
        patterns = {"tvw": TVW(TOTAL, v), "shfl_bw": ShflBW(TOTAL, v), "shfl_tvw": ShflTVW(TOTAL, v)}
        patterns["shfl_tvw_kmeans"] = ShflTVW(TOTAL, v, search="kmeans")
        return record | {f"retained_{name}": run(pattern, scores, s)[0] for name, pattern in patterns.items()}
    if known is None:
        vw, _ = run(VW(TOTAL, v), scores, s)
        unstructured, _ = run(Unstructured(TOTAL), scores, s)
        kmeans, seconds = run(ShflBW(TOTAL, v, search="kmeans"), scores, s)
        baseline = {"vw": vw, "kmeans": kmeans, "unstructured": unstructured}
        record |= {f"retained_{name}": value for name, value in baseline.items()}
        record |= {"seconds_kmeans": round(seconds, 3)}
    else:
        record |= known
    ours = ShflBW(TOTAL, v, search="annealing")
    retained, seconds = run(ours, scores, s)
    return record | {
        "retained_annealing": retained,
        "closed_kmeans": _closed(record, record["retained_kmeans"]),
        "closed_annealing": _closed(record, retained),
        "seconds_annealing": round(seconds, 3),
        "peak_bytes": peak_bytes(compiled(ours, weight.shape)[0]),
        "cores": len(os.sched_getaffinity(0)),
    }


def time_record(shape: tuple[int, int], group_size: int, execute: bool) -> dict[str, Any]:
    """Time and memory of the search on one random layer, at 75%."""
    record: dict[str, Any] = {"op": "search_time", "m": shape[0], "k": shape[1], "group_size": group_size}
    record |= {"sparsity": TOTAL, "counts": "ragged", "cores": len(os.sched_getaffinity(0))}
    for search in ("kmeans", "annealing"):
        pattern = ShflBW(TOTAL, group_size, search=search)
        program, seconds = compiled(pattern, shape)
        record |= {f"compile_seconds_{search}": round(seconds, 2), f"peak_bytes_{search}": peak_bytes(program)}
        if execute:
            scores = jnp.abs(jnp.asarray(synthetic("low_rank", *shape)))
            retained, seconds = run(pattern, scores, TOTAL)
            record |= {f"retained_{search}": retained, f"seconds_{search}": round(seconds, 3)}
    return record


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the cases by V and sparsity and over all of them, and of the patterns with 2:4 inside."""
    records = list(records)
    found: list[dict[str, Any]] = []
    cells = [*itertools.product(GROUP_SIZES, SPARSITIES), ("all", "all")]
    for synthetic_weights, (v, sparsity) in itertools.product((False, True), cells):
        chosen = [
            r for r in _chosen(records, "search", v, sparsity) if (r["weights"] in SYNTHETIC) == synthetic_weights
        ]
        if chosen:
            means = _means(chosen)
            gains = [r["retained_annealing"] - r["retained_kmeans"] for r in chosen]
            found.append(
                {
                    "op": "search_summary",
                    "weights": "synthetic" if synthetic_weights else "pretrained",
                    "group_size": v,
                    "sparsity": sparsity,
                    **means,
                    # At 50% K-means closes nothing.
                    "closed_ratio": means["closed_annealing"] / means["closed_kmeans"]
                    if means["closed_kmeans"]
                    else None,
                    "cases": len(chosen),
                    "below_kmeans": sum(gain < -1e-7 for gain in gains),
                    "least_gain": min(gains),
                }
            )
    for v in (*GROUP_SIZES, "all"):
        chosen = _chosen(records, "two_four", v, "all")
        if chosen:
            means = _means(chosen)
            above = {
                "tvw_above_shfl_bw": means["retained_tvw"] - means["retained_shfl_bw"],
                "shfl_tvw_above_tvw": means["retained_shfl_tvw"] - means["retained_tvw"],
            }
            record = {"op": "two_four_summary", "group_size": v, "sparsity": TOTAL, "cases": len(chosen)}
            found.append(record | means | above)
    return found


def table(records: Sequence[dict[str, Any]]) -> list[Table]:
    """The means of `summary` and the times, as tables of the terminal."""
    columns = ("weights", "V", "sparsity", "VW", "K-means", "annealing", "unstructured")
    columns += ("closed: K-means", "annealing", "ratio", "cases", "below K-means", "least gain")
    searched = Table(*columns, title="Retained saliency, and the share closed of the gap from VW to unstructured")
    columns = ("V", "Shfl-BW", "TVW", "Shfl-TVW", "with K-means", "cases")
    inside = Table(*columns, title=f"Retained saliency at a total sparsity of {TOTAL:.0%}")
    columns = ("layer", "V", "cores", "K-means, s", "annealing, s", "compilation, s", "peak, MB")
    times = Table(*columns, title="Time and memory of the search")
    for r in summary(records):
        v = str(r["group_size"])
        if r["op"] == "search_summary":
            sparsity = "all" if r["sparsity"] == "all" else f"{r['sparsity']:.1%}"
            retained = [f"{r['retained_' + n]:.4f}" for n in ("vw", "kmeans", "annealing", "unstructured")]
            closed = [f"{r['closed_' + n]:.3f}" for n in ("kmeans", "annealing")]
            ratio = "" if r["closed_ratio"] is None else f"{r['closed_ratio']:.2f}"
            counts = str(r["cases"]), str(r["below_kmeans"]), f"{r['least_gain']:+.4f}"
            searched.add_row(r["weights"], v, sparsity, *retained, *closed, ratio, *counts)
        else:
            names = ("shfl_bw", "tvw", "shfl_tvw", "shfl_tvw_kmeans")
            inside.add_row(v, *(f"{r['retained_' + n]:.4f}" for n in names), str(r["cases"]))
    for r in records:
        if r["op"] == "search_time":
            seconds = [f"{r[f'seconds_{n}']:.2f}" if f"seconds_{n}" in r else "" for n in ("kmeans", "annealing")]
            planned = f"{r['compile_seconds_annealing']:.1f}", f"{r['peak_bytes_annealing'] / 1e6:.0f}"
            times.add_row(f"{r['m']}x{r['k']}", str(r["group_size"]), str(r["cores"]), *seconds, *planned)
    return [shown for shown in (searched, inside, times) if shown.row_count]


def measure_all(path: Path, minutes: float, again: bool) -> dict[str, Any]:
    """Measures the cases that the file lacks until the minutes are over, and writes the file after each."""
    document = files.read(path)
    records = {_key(r): r for r in document["records"] if r["op"] in ("search", "two_four")}
    weights = encoder_weights() | {name: synthetic(*spec) for name, spec in SYNTHETIC.items()}
    wanted = list(cases({name: weight.shape for name, weight in weights.items()}))
    wanted = [case for case in wanted if again or dataclasses.astuple(case) not in records]
    for case in files.until(minutes, wanted, lambda c: f"{c.op} {c.weights} V={c.group_size} {c.sparsity:.1%}"):
        key = dataclasses.astuple(case)
        records[key] = measure(case, weights[case.weights], records.get(key))
        others = [r for r in document["records"] if r["op"] == "search_time"]
        document = _write(path, [*records.values(), *others])
    return document


def time_all(path: Path, again: bool) -> dict[str, Any]:
    """Adds times and memory of larger layers to the file."""
    document = files.read(path)
    runs = jax.devices()[0].platform != "cpu"
    for shape, execute in (*((shape, True) for shape in TIMED), (COMPILED, runs)):
        for v in GROUP_SIZES:
            layer = {"op": "search_time", "m": shape[0], "k": shape[1], "group_size": v}
            others = [r for r in document["records"] if {**r, **layer} != r]
            if again or len(others) == len(document["records"]):
                document = _write(path, [*others, time_record(shape, v, execute)])
    return document


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = files.command_line("search", __doc__, minutes=60, again="what is there", table=True)
    parser.add_argument("--time", action="store_true", help="only measure time and memory of larger layers")
    options = parser.parse_args(argv)
    path = files.output(parser, options, "search")
    if options.table:
        document = files.read(path)
    else:
        document = time_all(path, options.again) if options.time else measure_all(path, options.minutes, options.again)
    Console().print(*table(document["records"]))
    return 0


def _closed(record: dict[str, Any], retained: float) -> float:
    return (retained - record["retained_vw"]) / (record["retained_unstructured"] - record["retained_vw"])


def _chosen(records: Iterable[dict[str, Any]], op: str, v: int | str, sparsity: float | str) -> list[dict[str, Any]]:
    return [
        r for r in records if r["op"] == op and v in ("all", r["group_size"]) and sparsity in ("all", r["sparsity"])
    ]


def _means(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in records[0] if name.startswith(("retained_", "closed_"))]
    return {name: float(np.mean([r[name] for r in records])) for name in names}


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[field.name] for field in dataclasses.fields(Case))


def _write(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the records with a new summary."""
    records = [r for r in records if not r["op"].endswith("_summary")]
    return files.write(path, [*summary(records), *records])


if __name__ == "__main__":
    sys.exit(main())
