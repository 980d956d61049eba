"""The study behind the packed 2:4 kernels: their configs and XLA's dense product, in one call.

`python -m benchmarks.two_four --out FILE` checks every config against float32 and writes kernel times (CUPTI, cold L2,
medians). Of each backend the library's own choice comes first; `--search` adds the search spaces of some backends for
some cases. The acceptance cases beside all baselines are those of `benchmarks.matmul`.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import RowGrouped, timing, tune
from pallas_kernels import _tables as tables
from pallas_kernels._matrix import Topology, to_dense
from pallas_kernels.mosaic import _matmul as mosaic_gpu
from pallas_kernels.mosaic import _two_four as mosaic_gpu_two_four
from pallas_kernels.triton import _matmul as triton
from pallas_kernels.triton import _two_four as triton_two_four

PAIRS = np.array([first | second << 2 for first in range(4) for second in range(first + 1, 4)], np.uint8)
LARGE, TALL = (4096, 4096), (14336, 4096)
BACKENDS = {"mosaic_gpu": mosaic_gpu, "triton": triton}


@dataclasses.dataclass(frozen=True)
class Case:
    """One product."""

    pattern: str
    m: int
    k: int
    n: int
    sparsity: float
    group_size: int = 128
    dtype: str = "bfloat16"


# Whose search spaces `--search` measures.
SEARCHED = (
    Case("shfl_tvw", *LARGE, 4096, 0.75),
    Case("shfl_tvw", *LARGE, 4096, 0.75, 256),
    Case("shfl_tvw", *TALL, 16, 0.75),
)


def cases() -> list[Case]:
    """The cases of the acceptance table first."""
    found = [*SEARCHED, *(Case("shfl_tvw", *TALL, n, s) for s in (0.75, 0.875) for n in (1, 8, 16, 64))]
    found += [Case("shfl_tvw", *LARGE, 4096, s, v) for v in (128, 256) for s in (0.875, 0.9375)]
    found += [Case("tvw", *LARGE, 4096, s, v) for v in (128, 256) for s in (0.75, 0.875)]
    found += [Case("shfl_tvw", *LARGE, 4096, 0.75, 64), Case("shfl_tvw", *TALL, 16, 0.9375)]
    found += [Case("shfl_tvw", *LARGE, n, 0.75) for n in (16, 256, 1024)] + [Case("shfl_tvw", *TALL, 256, 0.75)]
    found += [Case("tvw", *TALL, 16, s) for s in (0.75, 0.875)]
    return list(dict.fromkeys(found))


def random_matrix(case: Any, seed: int = 0) -> RowGrouped:
    """A random canonical packed matrix with the counts of a pattern: all groups alike (shfl_tvw), or TW's split (tvw).

    In tvw, outputs and inputs keep the root of twice the density, and the pruned outputs fill groups without columns.
    """
    rng, v = np.random.default_rng(seed), case.group_size
    density, groups = 2 * (1 - case.sparsity), -(-case.m // v)
    counts = np.full(groups, round(case.k * density / 4) * 4)
    outputs = round(case.m * density**0.5)
    if case.pattern == "tvw":
        counts = np.where(np.arange(groups + 1) < -(-outputs // v), round(case.k * density**0.5 / 4) * 4, 0)
    rows = np.full(len(counts) * v, case.m, np.int32)
    if case.pattern == "tvw":
        tiles = -(-outputs // v) * v
        order = rng.permutation(case.m)
        rows[:outputs], rows[tiles : tiles + case.m - outputs] = np.sort(order[:outputs]), np.sort(order[outputs:])
    else:
        rows[: case.m] = rng.permutation(case.m)
    columns = np.concatenate([np.sort(rng.permutation(case.k)[:count]) for count in counts]).astype(np.int32)
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    two = PAIRS[rng.integers(0, 6, (2 * -(-len(columns) // 8), v))].reshape(-1, 2, v)
    pairs = two[:, 0] | two[:, 1] << 4
    values = jax.random.normal(jax.random.key(seed), (len(columns) // 2, v), case.dtype) * (counts.max() / 2) ** -0.5
    topology = Topology(
        *map(jnp.asarray, (columns, ptr, rows)), m=case.m, k=case.k, group_size=v, max_count=int(counts.max()),
        pairs=jnp.asarray(pairs),
    )  # fmt: skip
    return RowGrouped(values.astype(case.dtype), topology)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to compute a product; no config: what the library takes by itself."""

    implementation: str
    config: Any = None

    @property
    def label(self) -> str:
        """One line: what differs from the default of its class."""
        if not dataclasses.is_dataclass(self.config):
            return self.config or "own choice"
        default = type(self.config)()
        fields = [f.name for f in dataclasses.fields(self.config)]
        changed = [f for f in fields if getattr(self.config, f) != getattr(default, f)]
        return " ".join(f"{f}={getattr(self.config, f)}" for f in changed)

    def product(self, matrix, x):
        """W x, feature-major."""
        options = {"activation": None, "layout": "feature_major", "precision": None}
        if self.config == "expanded":
            return triton_two_four.forward_expanded(matrix, x, None, **options)
        backend = BACKENDS[self.implementation]
        return backend.forward_two_four(matrix, x, None, **options, config=self.config)


def candidates(case: Case, matrix: RowGrouped, search: Sequence[str]) -> list[Candidate]:
    """What is measured for a case, beside the dense product; `search` names backends."""
    found = [Candidate("mosaic_gpu"), Candidate("triton")]
    if case in SEARCHED:
        if "mosaic_gpu" in search:
            found += [Candidate("mosaic_gpu", c) for c in mosaic_gpu_two_four.search_space(matrix.topology, case.n)]
        if "triton" in search and case.n <= triton_two_four.MOST_TOKENS:
            space = triton_two_four.search_space(matrix.topology, case.n, case.dtype)
            found += [Candidate("triton", "expanded"), *(Candidate("triton", c) for c in space)]
    return found


def build(function, *args):
    """A compiled function, or the text of what is wrong with it."""
    try:
        return jax.jit(function).lower(*args).compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # too much shared memory or too many registers
        return str(error)[:200]


def measure(case: Case, matrix: RowGrouped, compiled: dict[Candidate, Any], dense: list) -> list[dict]:
    """A record for every candidate."""
    x = jax.random.normal(jax.random.key(1), (case.k, case.n), case.dtype)
    weight = to_dense(matrix)
    want = (weight.astype(jnp.float32) @ x.astype(jnp.float32)).astype(jnp.float32)
    # A random weight: one with zeros draws less power, which makes its product faster.
    full = jax.random.normal(jax.random.key(2), (case.m, case.k), case.dtype)
    dense_time = min(timing.median_us(f, tune.copies((full, x, None)))[0] for f in dense)
    sets, records = tune.copies((matrix, x)), []
    base = {"op": "matmul", **dataclasses.asdict(case), "layout": "feature_major", "dense_time_us": dense_time}
    base |= {"nbytes": matrix.nbytes, "bytes_share": matrix.nbytes / weight.nbytes}
    for candidate, future in compiled.items():
        function = future.result()
        if isinstance(function, str):
            print(f"{case} {candidate}: {function}", flush=True)
            continue
        error = float(tune.relative_error(function(matrix, x), want))
        if not error < tune.LARGEST_ERROR:
            print(f"wrong by {error}: {case} {candidate}", flush=True)
            continue
        time_us, kernels = timing.median_us(function, sets)
        record = base | {"implementation": candidate.implementation, "label": candidate.label, "time_us": time_us}
        records.append(record | {"kernels": kernels, "relative_error": error, "speedup": dense_time / time_us})
    return records


def main() -> None:
    """Measures and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the results file, written anew")
    parser.add_argument("--minutes", type=float, default=4, help="no case is begun after so many")
    parser.add_argument("--search", nargs="+", default=[], choices=BACKENDS, help="backends whose configs are compared")
    parser.add_argument("--first", type=int, help="only so many cases")
    arguments = parser.parse_args()
    started, device = time.monotonic(), tables.file_name(tune.triton_device())
    results: dict[str, Any] = {"device": device, "jax": jax.__version__, "date": None, "records": []}
    todo = cases()[: arguments.first]
    matrices = {case: pallas_kernels.prepare(random_matrix(case), "mosaic_gpu") for case in todo}
    shapes = {case: jax.ShapeDtypeStruct((case.k, case.n), case.dtype) for case in todo}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # XLA tries its dense kernels while it compiles them: before anything is measured.
        dense = {
            case: [pool.submit(build, f, jax.ShapeDtypeStruct((case.m, case.k), case.dtype), shapes[case], None)
                   for f in tune.dense_products("forward")]
            for case in todo
        }  # fmt: skip
        dense = {case: [future.result() for future in futures] for case, futures in dense.items()}
        compiled = {
            case: {
                c: pool.submit(build, c.product, matrices[case], shapes[case])
                for c in candidates(case, matrices[case], arguments.search)
            }
            for case in todo
        }
        for case in todo:
            if time.monotonic() - started > 60 * arguments.minutes:
                break
            records = measure(case, matrices.pop(case), compiled.pop(case), dense[case])
            results["records"] += records
            results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            for r in sorted(records, key=lambda r: r["time_us"]):
                print(
                    f"{case}: {r['time_us']:.2f} us, {r['speedup']:.2f}: {r['implementation']} {r['label']}", flush=True
                )
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
