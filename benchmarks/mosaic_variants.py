"""The study behind `pallas_kernels.mosaic_gpu`: its configs against Triton and XLA's dense product, in one call.

`python -m benchmarks.mosaic_variants --out FILE` checks configs on small ragged matrices against float64, and on large
ones against float32, and writes kernel times (CUPTI, cold L2, medians). A config that does not compile or is wrong is
reported and left out. JAX compiles the Mosaic kernels of a process one after the other, so several processes share the
cases; a lock lets one at a time use the GPU. Where a kernel hangs or breaks the GPU's context, its process ends and
another goes on without that kernel.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _tables as tables
from pallas_kernels import timing, tune
from pallas_kernels._matrix import to_dense
from pallas_kernels.mosaic import _matmul as mosaic_gpu
from pallas_kernels.mosaic._forward import Config
from pallas_kernels.triton import _matmul as triton

PATIENCE = 45  # seconds without an answer after which a kernel counts as hanging
LARGEST_ERROR = 5e-3  # relative, in the Frobenius norm: rounding a result to bfloat16 costs 1.7e-3
BROKEN = 3  # exit status of a subprocess that has to be started again


@dataclasses.dataclass(frozen=True)
class Case:
    """One product."""

    m: int
    k: int
    n: int
    sparsity: float = 0.75
    group_size: int = 128
    counts: str = "equal"
    dtype: str = "bfloat16"
    epilogue: str | None = None  # None, or an activation with a bias

    @property
    def name(self) -> str:
        """The case as one word."""
        words = [f"{self.m}x{self.k}x{self.n}", f"{self.sparsity:g}", f"V{self.group_size}", self.counts]
        return "/".join(words + [self.dtype] * (self.dtype != "bfloat16") + ([self.epilogue] if self.epilogue else []))


ROWS, TOKENS = Config(split="rows"), Config(split="tokens")
vary = dataclasses.replace


def variants(case: Case) -> list[Config]:
    """The configs measured for a case, the likeliest first."""
    if case.group_size == 256:
        base = Config(block_tokens=128, split="rows")
        return [base, vary(base, persistent=False), vary(base, band=4), vary(base, split="tokens")]
    if case.group_size == 64:
        wide, narrow = vary(TOKENS, block_tokens=512, stages=3), vary(TOKENS, block_tokens=128, stages=8)
        return [
            TOKENS,
            vary(TOKENS, stages=5),
            vary(TOKENS, persistent=False),
            wide,
            vary(wide, persistent=False),
            narrow,
        ]
    few = [ROWS, TOKENS, vary(ROWS, persistent=False), vary(TOKENS, persistent=False), vary(ROWS, band=4)]
    if case.epilogue or case.dtype != "bfloat16":
        return few[:2]
    if case == SQUARE:
        narrow = vary(ROWS, block_tokens=128, stages=6)
        few += [vary(TOKENS, band=4), vary(ROWS, band=16), vary(ROWS, ahead=8), vary(ROWS, stages=3), narrow]
        few += [vary(ROWS, registers=(224, 56)), vary(ROWS, registers=(208, 88)), vary(ROWS, stages=4, ahead=2)]
    return few


SQUARE = Case(4096, 4096, 4096)
# What the processes share. Small cases divide nothing and have sentinel rows; they are checked, not timed.
SHARDS = (
    (
        Case(1000, 700, 1048, 0.6, 128, "ragged"),
        SQUARE,
        vary(SQUARE, epilogue="gelu"),
        vary(SQUARE, dtype="float16"),
    ),
    (
        Case(1000, 700, 776, 0.5, 128, "ragged", "bfloat16", "relu"),
        vary(SQUARE, sparsity=0.5),
        vary(SQUARE, sparsity=0.875),
        vary(SQUARE, counts="ragged"),
    ),
    (
        Case(300, 200, 264, 0.6, 64, "ragged", "float16", "silu"),
        Case(1000, 700, 520, 0.5, 256, "ragged", "bfloat16", "gelu"),
        vary(SQUARE, group_size=64),
        vary(SQUARE, group_size=256),
    ),
    (Case(8192, 8192, 8192), Case(14336, 4096, 4096), Case(4096, 14336, 4096)),
)
SMALL = 2048  # a case with fewer rows is only checked


def operands(case: Case, seed: int = 0) -> tuple:
    """(prepared matrix, x, bias or None), feature-major."""
    matrix = tune.random_matrix(
        case.m, case.k, case.sparsity, case.group_size, equal=case.counts == "equal", dtype=case.dtype, seed=seed
    )
    keys = jax.random.split(jax.random.key(seed + 1))
    x = jax.random.normal(keys[0], (case.k, case.n), case.dtype)
    bias = jax.random.normal(keys[1], (case.m,), case.dtype) if case.epilogue else None
    return mosaic_gpu.prepare(matrix), x, bias


def forward(backend, case: Case, config) -> Callable:
    """The product of one backend and config as a function of `operands`."""
    return functools.partial(
        backend.forward, activation=case.epilogue, layout="feature_major", precision=None, config=config
    )


def dense(layout: str) -> Callable:
    """XLA's dense product of (w, x); token-major reads the bytes of x as (N, K), so that no transpose is timed."""

    def dot(a, b, i, j):
        return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32).astype(a.dtype)

    if layout == "feature_major":
        return lambda w, x: dot(w, x, 1, 0)
    return lambda w, x: dot(x.reshape(x.shape[::-1]), w, 1, 1)


@jax.jit
def float32_product(matrix, x):
    """W x in float32."""
    w = to_dense(matrix).astype(jnp.float32)
    return jnp.dot(w, x.astype(jnp.float32), precision="highest")


def float64_product(matrix, x) -> jax.Array:
    """W x in float64, rounded to float32."""
    w, x = (np.asarray(a.astype(jnp.float32), np.float64) for a in (to_dense(matrix), x))
    return jnp.asarray(w @ x, jnp.float32)


@functools.partial(jax.jit, static_argnames="activation")
def errors(got, product, bias, activation):
    """The relative error in the Frobenius norm, the largest one, and which rows and tokens are far off."""
    want = product if bias is None else product + bias[:, None].astype(jnp.float32)
    want = {None: lambda y: y, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}[activation](want)
    wrong = jnp.abs(got.astype(jnp.float32) - want)
    far = ~(wrong <= 0.03 * jnp.abs(want).max())  # NaN counts
    return jnp.linalg.norm(wrong) / jnp.linalg.norm(want), wrong.max() / jnp.abs(want).max(), far.any(1), far.any(0)


class Watch:
    """Says what runs now, and ends the process where it takes too long."""

    def __init__(self, on_hang: Callable[[str], None]):
        self.on_hang, self.name, self.since, self.patience = on_hang, "", 0.0, PATIENCE
        threading.Thread(target=self._look, daemon=True).start()

    def begin(self, name: str, patience: int = PATIENCE) -> None:
        """Prints what begins and starts its clock."""
        print(f"  .. {name}", flush=True)
        self.since, self.patience = time.monotonic(), patience
        self.name = name  # last: from now on the clock counts

    def end(self) -> None:
        """Stops the clock."""
        self.name = ""

    def _look(self) -> None:
        while True:
            time.sleep(1)
            if self.name and time.monotonic() - self.since > self.patience:
                self.on_hang(self.name)
                os._exit(BROKEN)


def label(config: Config | None) -> str:
    """What differs from the default config."""
    if config is None:
        return ""
    words: list[str] = [config.split] if config.persistent else [f"{config.split} one-tile"]
    default = Config()
    for field in ("block_tokens", "stages", "ahead", "band", "registers"):
        if getattr(config, field) != getattr(default, field):
            words.append(f"{field}={getattr(config, field)}")
    return " ".join(words)


class Study:
    """The state of a measuring process, kept in the results file so that a next process goes on."""

    def __init__(self, out: pathlib.Path, minutes: float):
        self.out, self.deadline = out, time.monotonic() + 60 * minutes
        self.result: dict[str, Any] = {"device": "", "jax": jax.__version__, "date": "", "records": [], "bad": {}}
        if out.exists():
            self.result = json.loads(out.read_text())
        self.watch = Watch(lambda name: self.blame(name, "hangs"))

    def save(self) -> None:
        """Writes the file."""
        self.result["device"] = tables.file_name(jax.devices()[0].device_kind)
        self.result["date"] = str(datetime.date.today())
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def blame(self, name: str, why: str) -> None:
        """Leaves a variant out from now on."""
        print(f"BAD {name}: {why}", flush=True)
        self.result["bad"][name] = why
        self.save()

    def guarded(self, name: str, function: Callable) -> Any:
        """Runs a function on the GPU; None where that fails, and then the name is bad."""
        with timing.alone():
            self.watch.begin(name)
            try:
                return jax.block_until_ready(function())
            except Exception as error:
                self.blame(name, first_line(error))
                if "CUDA" in str(error):
                    os._exit(BROKEN)  # nothing more runs in this process
                return None
            finally:
                self.watch.end()


def first_line(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:220]}"


def build(function: Callable, *arguments) -> Any:
    """The compiled function, or the exception as text."""
    try:
        return jax.jit(function).lower(*arguments).compile()
    except Exception as error:  # any failure is a result here
        return first_line(error)


def measure(study: Study, case: Case, compiled: dict[str, tuple]) -> None:
    """Checks, and times where the case is large, what was compiled: {label: (implementation, config, future)}."""
    records, small = study.result["records"], case.m < SMALL
    done = {r["label"] for r in records if r["case"] == case.name}
    base = {"op": "matmul", "m": case.m, "k": case.k, "n": case.n, "dtype": case.dtype, "counts": case.counts,
            "epilogue": case.epilogue, "case": case.name}  # fmt: skip

    def prepare():
        arguments = operands(case)
        matrix, x, _ = arguments
        if small:
            return float64_product(matrix, x), [arguments], []
        return float32_product(matrix, x), tune.copies(arguments), tune.copies((to_dense(matrix), x))

    found = study.guarded(f"{case.name} reference", prepare)
    if found is None:
        return
    reference, sets, dense_sets = found
    bias = sets[0][2]
    for key, (implementation, config, future) in compiled.items():
        name = f"{case.name} {key}"
        if key in done or name in study.result["bad"]:
            continue
        if time.monotonic() > study.deadline:
            print(f"{case.name}: out of time", flush=True)
            break
        function, plain = future.result(), implementation == "xla"
        if isinstance(function, str):
            study.blame(name, function)
            continue
        record = base | {"implementation": implementation, "label": key, "time_us": None}
        record |= {"sparsity": 0.0 if plain else case.sparsity, "group_size": 0 if plain else case.group_size}
        record["pattern"] = "dense" if plain else "shfl_bw" if case.counts == "equal" else "vw"
        record["config"] = dataclasses.asdict(config) if config is not None else None
        used = dense_sets if plain else sets
        got = study.guarded(name, functools.partial(function, *used[0]))
        if got is None:
            continue
        if key != "dense token_major":  # which reads other bytes
            with timing.alone():
                epilogue = (None, None) if plain else (bias, case.epilogue)
                error, largest, rows, tokens = map(np.asarray, errors(got, reference, *epilogue))
            record |= {"relative_error": float(error), "largest_error": float(largest)}
            if not float(error) < LARGEST_ERROR:
                where = f"{rows.sum()} of {rows.size} rows from {rows.argmax()}"
                where += f", {tokens.sum()} of {tokens.size} tokens from {tokens.argmax()}"
                study.blame(name, f"wrong: error {error:.2e}, largest {largest:.2e}; far off: {where}")
                continue
        del got
        if not small:
            timed = study.guarded(name, functools.partial(timing.median_us, function, used))
            if timed is None:
                continue
            record["time_us"], record["kernels"] = float(timed[0]), int(timed[1])
        records.append(record)
        study.save()
    mine = [r for r in records if r["case"] == case.name]
    best = min((r["time_us"] for r in mine if r["implementation"] == "xla" and not small), default=None)
    for r in mine:
        r |= {"dense_time_us": best, "speedup": best / r["time_us"] if best and r["time_us"] else None}
    study.save()
    print(f"done {case.name}", flush=True)


def work(study: Study, cases: list[Case]) -> None:
    """One measuring process."""
    pool = concurrent.futures.ThreadPoolExecutor(4)
    dense_products: dict[tuple, concurrent.futures.Future] = {}
    compiled: dict[Case, dict[str, tuple]] = {case: {} for case in cases}
    with timing.alone():  # XLA tries its dense kernels while it compiles them
        shapes = {case: abstract(operands(case)) for case in cases}
        for case in cases:
            if case.m < SMALL:
                continue
            weight = jax.ShapeDtypeStruct((case.m, case.k), case.dtype)
            for layout in ("feature_major", "token_major"):
                key = case.m, case.k, case.n, case.dtype, layout
                if key not in dense_products:
                    dense_products[key] = pool.submit(build, dense(layout), weight, shapes[case][1])
                compiled[case][f"dense {layout}"] = "xla", None, dense_products[key]
            future = pool.submit(build, forward(triton, case, None), *shapes[case])
            compiled[case]["triton"] = "triton", None, future
        concurrent.futures.wait([f for jobs in compiled.values() for *_, f in jobs.values()])
    print(f"compiled what is not Mosaic for {len(cases)} cases", flush=True)
    for case in cases:
        for c in variants(case):
            if f"{case.name} {label(c)}" not in study.result["bad"]:
                future = pool.submit(build, forward(mosaic_gpu, case, c), *shapes[case])
                compiled[case][label(c)] = "mosaic_gpu", c, future
    # CUPTI sees every kernel of the process; nothing runs while a Mosaic kernel is compiled.
    for case in cases:
        measure(study, case, compiled[case])
    pool.shutdown(cancel_futures=True)


def abstract(arguments):
    """The shapes of arguments."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)


def table(result: dict) -> str:
    """What was measured, short enough to read at a glance."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in result["records"]):
        mine = [r for r in result["records"] if r["case"] == case]
        if mine[0]["m"] < SMALL:
            lines.append(f"{case}: {len(mine)} right, errors up to {max(r['relative_error'] for r in mine):.1e}")
            continue
        lines.append(case)
        for r in sorted(mine, key=lambda r: r["time_us"]):
            speedup = f"{r['speedup']:.2f}" if r.get("speedup") else "?"
            error = f"{r['relative_error']:.1e}" if "relative_error" in r else "-"
            lines.append(f" {r['time_us']:7.1f} x{speedup} {error} {r['implementation'][:6]} {r['label']}")
    lines += [f"BAD {name}: {why[:160]}" for name, why in result["bad"].items()]
    return "\n".join(lines)[:8000]


def run_shard(shard: int, options, folder: pathlib.Path, deadline: float) -> None:
    """Runs the processes of a shard, one after the other until one ends well."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    for _ in range(5):
        minutes = (deadline - time.monotonic()) / 60
        if minutes < 0.4:
            break
        command = [sys.executable, "-m", "benchmarks.mosaic_variants", "--shard", str(shard)]
        command += ["--out", str(folder / f"{shard}.json"), "--minutes", f"{minutes:.2f}"]
        command += ["--case", *options.case] if options.case else []
        try:
            status = subprocess.run(command, env=environment, check=False, timeout=60 * minutes + 25).returncode
        except subprocess.TimeoutExpired:
            status = 0
            print(f"shard {shard} did not end by itself", flush=True)
        if status not in (0, BROKEN):
            print(f"shard {shard} ended with status {status}", flush=True)
        if status == 0:
            break


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.2, help="begin nothing new after this time")
    parser.add_argument("--case", nargs="+", help="only cases whose name holds one of these words")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shard is not None:
        cases = [c for c in SHARDS[options.shard] if options.case is None or any(w in c.name for w in options.case)]
        work(Study(options.out, options.minutes), cases)
        os._exit(0)  # not waiting for what still compiles
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary, concurrent.futures.ThreadPoolExecutor(len(SHARDS)) as pool:
        folder = pathlib.Path(temporary)
        jobs = [pool.submit(run_shard, i, options, folder, deadline) for i in range(len(SHARDS))]
        concurrent.futures.wait(jobs)
        parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not parts:
        sys.exit("nothing was measured")
    result = parts[0] | {
        "records": [r for part in parts for r in part["records"]],
        "bad": {name: why for part in parts for name, why in part["bad"].items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
