"""The row-grouped product against the dense one on a CPU: `python -m benchmarks.cpu_matmul`.

Writes `benchmarks/results/cpu/matmul.json`. Every case is a prepared matrix at 75% sparsity, float32. "equal": every
row group keeps as many columns. "ragged": VW masks (one threshold over the layer) of weights whose rows have log-normal
scales. Dense is the faster of XLA's two storage orders of the weight, timed in turn with the sparse product. A case
already in the file is skipped; `--again` measures all of them anew.
"""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import pallas_kernels
import shfl_jax
from benchmarks import records as files
from pallas_kernels import timing

SIZES = ((1024, 256, 256), (1024, 1024, 256), (4096, 1024, 256), (4096, 1024, 16), (1024, 4096, 64))
TOKEN_MAJOR_SIZES = ((256, 256, 2048), (1024, 256, 2048), (256, 1024, 2048))  # the layers of the demo
GROUP_SIZES = (64, 128)
SPARSITY = 0.75
ROW_SCALES = 0.4
"""Standard deviation of the logarithm of a row's scale in ragged cases; the counts then vary by 0.36 of their mean and
more."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One product."""

    m: int
    k: int
    n: int
    group_size: int
    counts: str
    layout: Literal["token_major", "feature_major"]
    sparsity: float = SPARSITY


def cases() -> list[Case]:
    """All cases, those of the acceptance table first."""
    return [
        case
        for counts, v in itertools.product(("equal", "ragged"), GROUP_SIZES)
        for case in (
            *(Case(*size, v, counts, "feature_major") for size in SIZES),
            *(Case(*size, v, counts, "token_major") for size in TOKEN_MAJOR_SIZES),
        )
    ]


def weight_of(case: Case) -> np.ndarray:
    """A random weight (M, K) float32; its rows have log-normal scales if the counts are to be ragged."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(case.m, case.k)).astype(np.float32)
    if case.counts == "ragged":
        weight *= np.exp(ROW_SCALES * rng.normal(size=case.m))[:, None]
    return weight


def measure(case: Case, runs: int) -> dict:
    """The record of one case: medians of `runs` timings of the sparse and of both dense products, in turn."""
    weight = weight_of(case)
    pattern = shfl_jax.VW(case.sparsity, group_size=case.group_size, balanced=case.counts == "equal")
    mask = shfl_jax.mask(jnp.abs(weight), pattern)
    exact = pallas_kernels.from_dense(
        np.where(mask.elements(), weight, 0), np.asarray(mask.rows), np.asarray(mask.kept)
    )
    counts = np.diff(np.asarray(exact.topology.group_ptr))
    matrix = pallas_kernels.prepare(exact, "xla")
    token_major = case.layout == "token_major"
    x = jax.random.normal(jax.random.key(1), (case.n, case.k) if token_major else (case.k, case.n))
    sparse = jax.jit(lambda a, x: pallas_kernels.matmul(a, x, layout=case.layout, implementation="xla"))

    def contract(i: int, j: int) -> Callable[..., jax.Array]:
        return jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((i,), (j,)), ((), ()))))

    stored, transposed = jnp.asarray(weight), jnp.asarray(weight.T.copy())
    dense = {"m_k": (contract(1, 1), x, stored), "k_m": (contract(1, 0), x, transposed)}
    if not token_major:
        dense = {"m_k": (contract(1, 0), stored, x), "k_m": (contract(0, 0), transposed, x)}
    wanted = np.asarray(pallas_kernels.to_dense(exact), np.float64)
    wanted = np.asarray(x, np.float64) @ wanted.T if token_major else wanted @ np.asarray(x, np.float64)
    error = float(np.linalg.norm(np.asarray(sparse(matrix, x), np.float64) - wanted) / np.linalg.norm(wanted))
    functions = {name: lambda f=f, a=a, b=b: f(a, b) for name, (f, a, b) in dense.items()}
    times = timing.interleaved_us({"sparse": lambda: sparse(matrix, x), **functions}, runs)
    fastest = min(dense, key=lambda name: times[name])
    return dataclasses.asdict(case) | {
        "op": "matmul",
        "pattern": "vw",
        "implementation": "xla",
        "dtype": "float32",
        "counts_cv": float(counts.std() / counts.mean()),
        "relative_error": error,
        "time_us": times["sparse"],
        "dense_time_us": times[fastest],
        "dense_layout": fastest,
        "speedup": times[fastest] / times["sparse"],
    }


def table(records: list[dict]) -> Table:
    """All cases, and the median speed-up of every layout and kind of counts."""
    columns = ("layout", "counts", "CV", "V", "M K N", "dense", "sparse", "speed-up")
    shown = Table(*columns, title=f"Row-grouped product at {SPARSITY:.0%} sparsity against dense, float32, µs")
    for r in records:
        case = r["layout"].removesuffix("_major"), r["counts"], f"{r['counts_cv']:.2f}", str(r["group_size"])
        times = f"{r['dense_time_us']:.0f}", f"{r['time_us']:.0f}", f"{r['speedup']:.2f}"
        shown.add_row(*case, f"{r['m']} {r['k']} {r['n']}", *times)
    shown.add_section()
    for layout, counts in itertools.product(("feature_major", "token_major"), ("equal", "ragged")):
        found = [r["speedup"] for r in records if (r["layout"], r["counts"]) == (layout, counts)]
        if found:
            name, median, least = layout.removesuffix("_major"), statistics.median(found), min(found)
            shown.add_row(name, counts, "", "", "median", "", "", f"{median:.2f}")
            shown.add_row(name, counts, "", "", "least", "", "", f"{least:.2f}")
    return shown


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = files.command_line("cpu_matmul", __doc__, again="what the file has already")
    parser.add_argument(
        "--runs", type=int, default=40, help="timings of each function of a case (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    path = options.out or files.RESULTS / "cpu" / "matmul.json"  # on a machine with a GPU too
    known = [] if options.again else files.read(path)["records"]
    fields = [field.name for field in dataclasses.fields(Case)]
    done = {Case(**{name: record[name] for name in fields}): record for record in known}
    with jax.default_device(jax.devices("cpu")[0]):
        for case in track([c for c in cases() if c not in done], "cases", console=Console(stderr=True)):
            done[case] = measure(case, options.runs)
            files.write(path, [done[c] for c in cases() if c in done], "cpu")
    Console().print(table([done[c] for c in cases()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
