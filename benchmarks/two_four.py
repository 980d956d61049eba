"""Products with packed 2:4 matrices on a GPU, side by side with dense ones: `python -m benchmarks.two_four`.

Patterns `tvw` and `shfl_tvw` of the matmul suite. Every case is measured in the same call as its dense baseline, by
CUPTI, with a cold L2. `--search` also measures the search space of the packed kernel, and the expanded matrix.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import RowGrouped, configs, timing, triton, triton_two_four, tune
from pallas_kernels.row_grouped import Topology, to_dense

PAIRS = np.array([first | second << 2 for first in range(4) for second in range(first + 1, 4)], np.uint8)
LARGE, TALL = (4096, 4096), (14336, 4096)


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


def cases() -> list[Case]:
    """The cases of the acceptance table first."""
    first = [Case("shfl_tvw", *TALL, n, s) for s in (0.75, 0.875) for n in (16, 1, 64, 8)]
    first += [Case("shfl_tvw", *LARGE, 4096, s) for s in (0.75, 0.875, 0.9375)]
    first += [Case("shfl_tvw", *TALL, n, 0.9375) for n in (16, 1, 64)]
    first += [Case("tvw", *LARGE, 4096, s) for s in (0.75, 0.875, 0.9375)]
    first += [Case("tvw", *TALL, 16, s) for s in (0.75, 0.875, 0.9375)]
    first += [Case("shfl_tvw", *LARGE, n, 0.75) for n in (16, 256, 1024)] + [Case("shfl_tvw", *TALL, 256, 0.75)]
    return first


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


def product(config):
    """The packed product as a function of (matrix, x), feature-major; "expanded" by way of the expanded matrix."""

    def run(matrix, x):
        if config == "expanded":
            return triton_two_four.forward_expanded(
                matrix, x, None, activation=None, layout="feature_major", precision=None
            )
        return triton.forward_two_four(
            matrix, x, None, activation=None, layout="feature_major", precision=None, config=config
        )

    return run


def compiled(case: Case, search: bool):
    """The compiled candidates, (config, function) each, and the compiled dense products."""
    matrix = pallas_kernels.prepare(random_matrix(case, 0), "mosaic_gpu")
    x = jax.ShapeDtypeStruct((case.k, case.n), case.dtype)
    space = [None]
    if search:
        space += ["expanded", *triton_two_four.search_space(matrix.topology, case.n, case.dtype)]

    def build(function, *args):
        try:
            return jax.jit(function).lower(*args).compile()
        except jax.errors.JaxRuntimeError:  # too much shared memory or too many registers
            return None

    weight = jax.ShapeDtypeStruct((case.m, case.k), case.dtype)
    dense = [build(function, weight, x, None) for function in tune.dense_products("forward")]
    return [(c, f) for c in space if (f := build(product(c), matrix, x)) is not None], dense


def measure(case: Case, candidates, dense) -> dict:
    """One record: what the library does by itself, and where searched the best that was found."""
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (case.k, case.n), case.dtype)
    matrix = pallas_kernels.prepare(random_matrix(case, 0), "mosaic_gpu")
    weight = to_dense(matrix)
    want = (weight.astype(jnp.float32) @ x.astype(jnp.float32)).astype(jnp.float32)
    dense_time = min(timing.median_us(f, tune.copies((weight, x, None)))[0] for f in dense)
    sets, tried = tune.copies((matrix, x)), []
    for config, function in candidates:
        error = float(tune._error(function(matrix, x), want))
        if not error < tune.LARGEST_ERROR:
            print(f"wrong by {error}: {case} {config}", flush=True)
            continue
        time_us, kernels = timing.median_us(function, sets)
        shown = dataclasses.asdict(config) if isinstance(config, configs.Config) else config
        tried.append({"config": shown, "time_us": time_us, "kernels": kernels, "error": error})
    own = next(entry for entry in tried if entry["config"] is None)
    best = sorted(tried, key=lambda entry: entry["time_us"])[:6]
    record = {"op": "matmul", **dataclasses.asdict(case), "implementation": "triton", "layout": "feature_major"}
    record |= {"counts": "equal" if case.pattern == "shfl_tvw" else "ragged", "time_us": own["time_us"]}
    record |= {"dense_time_us": dense_time, "speedup": dense_time / own["time_us"], "kernels": own["kernels"]}
    record |= {"relative_error": own["error"], "nbytes": matrix.nbytes, "bytes_share": matrix.nbytes / weight.nbytes}
    return record | ({"tried": len(tried), "best": best} if len(tried) > 1 else {})


def main() -> None:
    """Measures and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the results file; cases in it are skipped")
    parser.add_argument("--minutes", type=float, default=4, help="no batch of cases is begun after so many")
    parser.add_argument("--search", action="store_true", help="measure the search space too")
    parser.add_argument("--first", type=int, help="only so many cases")
    arguments = parser.parse_args()
    started, device = time.monotonic(), configs.device_name(tune.triton_device())
    results: dict[str, Any] = {"device": device, "jax": jax.__version__, "date": None, "records": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    done = {tuple(r[f.name] for f in dataclasses.fields(Case)) for r in results["records"]}
    todo = [case for case in cases()[: arguments.first] if dataclasses.astuple(case) not in done]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(todo), 8):
            if time.monotonic() - started > 60 * arguments.minutes:
                break
            built = list(pool.map(lambda case: compiled(case, arguments.search), todo[i : i + 8]))
            for case, (candidates, dense) in zip(todo[i : i + 8], built, strict=True):
                record = measure(case, candidates, dense)
                results["records"].append(record)
                results["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{case}: {record['time_us']:.2f} us, {record['speedup']:.2f} times dense", flush=True)
                for entry in record.get("best", ()):
                    print(f"    {entry['time_us']:.2f} {entry['kernels']} {entry['config']}", flush=True)


if __name__ == "__main__":
    main()
