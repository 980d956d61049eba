"""Hardware counters of the GPU kernels: `python -m benchmarks.counters`.

Writes `benchmarks/results/<device>/counters.json`: for the cases of the acceptance tables, what Nsight Compute counts
in each kernel of a call with a cold L2 cache: bytes through the cache and memory, use of the tensor cores, stalls.
Where `ncu` is missing or may not read the counters the program says so and leaves the file alone.

A few processes run under ncu side by side, because JAX compiles the Mosaic kernels of a process one after the other;
one at a time uses the GPU. Only the second call of each case is profiled, and a small marker kernel behind it
tells the kernels of the cases apart.
"""

import argparse
import concurrent.futures
import csv
import ctypes
import dataclasses
import glob
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks import records as files
from pallas_kernels import timing, tune
from pallas_kernels._backend import BACKENDS, Call, Op

MARKER = "cosine"  # in the name of the kernel that XLA makes of `mark`
PROCESSES = 4
SECTIONS = ("WarpStateStats", "LaunchStats", "Occupancy")
# Asked for where this version of ncu knows them for this GPU.
METRICS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "lts__t_bytes.sum",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one implementation."""

    implementation: str
    m: int = 4096
    k: int = 4096
    n: int = 4096
    sparsity: float = 0.75
    group_size: int = 128
    op: Op = "forward"
    epilogue: str | None = None  # None, or an activation with a bias


_FORWARD: tuple[dict[str, Any], ...] = (
    {},
    {"sparsity": 0.5},
    {"sparsity": 0.875},
    {"group_size": 64},
    {"group_size": 256},
    {"m": 14336},
    {"k": 14336},
    {"epilogue": "gelu"},
)
CASES = (
    *(Case(name, **change) for change in _FORWARD for name in ("mosaic_gpu", "triton")),
    Case("triton", 14336, n=16),
    Case("triton", n=16),
    *(Case(name, op="grad_values") for name in ("mosaic_gpu", "triton")),
    Case("triton", n=256, op="grad_input"),
    Case("triton", op="grad_input"),
    Case("xla"),
)


def call(case: Case) -> tuple[Callable, tuple]:
    """The function of a case and its arguments, feature-major; "xla" is the dense product."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (case.k, case.n), jnp.bfloat16)
    dy = jax.random.normal(keys[1], (case.m, case.n), jnp.bfloat16)
    if case.implementation == "xla":
        weight = jax.random.normal(keys[2], (case.m, case.k), jnp.bfloat16)
        return tune.dense_products(case.op)[0], (weight, x, dy)
    matrix = pallas_kernels.prepare(tune.random_matrix(case.m, case.k, case.sparsity, case.group_size), "triton")
    if case.op != "forward":
        return tune.product(case.op, None, case.implementation), (matrix, x, dy)
    backend, product = BACKENDS[case.implementation], Call(case.epilogue)
    bias = jax.random.normal(keys[2], (case.m,), jnp.bfloat16) if case.epilogue else None
    return lambda matrix, x, bias: backend.forward(product, matrix, x, bias, None), (matrix, x, bias)


def launch(cases: Sequence[Case]) -> None:
    """What runs under ncu: compiles the cases, and calls each once before and once while ncu looks."""
    driver = ctypes.CDLL("libcuda.so.1")
    with timing.alone():
        marked = jnp.zeros(64)
        mark = jax.jit(jnp.cos).lower(marked).compile()
        calls = [call(case) for case in cases]
        jax.block_until_ready([arguments for _, arguments in calls])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        compiled = list(pool.map(lambda c: jax.jit(c[0]).lower(*c[1]).compile(), calls))
    with timing.alone():
        for function, (_, arguments) in zip(compiled, calls, strict=True):
            jax.block_until_ready((function(*arguments), mark(marked)))
            driver.cuProfilerStart()
            jax.block_until_ready(function(*arguments))
            jax.block_until_ready(mark(marked))
            driver.cuProfilerStop()


def find_ncu() -> str | None:
    """Nsight Compute's command line: from the PATH, else the newest one where it is installed."""
    places = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu") + glob.glob("/usr/local/cuda*/bin/ncu"))
    return shutil.which("ncu") or (places[-1] if places else None)


def known_metrics(listing: str) -> list[str]:
    """Those of `METRICS` that `ncu --query-metrics` lists, by the names without what follows the first dot."""
    names = {line.split()[0].split(".")[0] for line in listing.splitlines() if line.split()}
    return [metric for metric in METRICS if metric.split(".")[0] in names]


def profile(ncu: str, metrics: Sequence[str], indices: Sequence[int], folder: pathlib.Path) -> tuple[str, str]:
    """Profiles some cases in a process of their own; returns ncu's log with its CSV, and what was printed."""
    log = folder / f"{indices[0]}.csv"
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    command += ["--clock-control", "none", "--cache-control", "all", "--target-processes", "all"]
    command += ["--profile-from-start", "off", "--metrics", ",".join(metrics)]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "benchmarks.counters", "--launch"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="  # kernels one by one, not as a graph
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        command + [str(i) for i in indices], env=environment, capture_output=True, text=True, check=False
    )
    text = log.read_text() if log.exists() else ""
    return text, f"{done.stdout}{done.stderr}"[-4000:]


def parse(text: str) -> list[list[dict[str, str]]]:
    """The kernels of each case, as rows of ncu's CSV: those between markers. ValueError where there is no table."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        raise ValueError("ncu wrote no table:\n" + text[-2000:])
    rows = list(csv.DictReader(lines))[1:]  # the first one holds units
    found: list[list[dict[str, str]]] = [[]]
    for row in rows:
        if MARKER in row["Kernel Name"]:
            found.append([])
        else:
            found[-1].append(row)
    return found[:-1]


def number(text: str | None) -> float | None:
    """A number as ncu prints it; None where it is none."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def record(case: Case, row: dict[str, str]) -> dict[str, Any]:
    """What the counters say of one kernel of a case. Times in microseconds, bytes in megabytes, shares in percent."""

    def value(name: str, scale: float = 1.0) -> float | None:
        found = number(row.get(name))
        return None if found is None else found * scale

    stalls = {match[1]: value(name) or 0.0 for name in row if (match := STALL.fullmatch(name))}
    total = sum(stalls.values()) or 1.0
    top = sorted(stalls, key=lambda name: -stalls[name])[:3]
    share = ".avg.pct_of_peak_sustained_elapsed"
    l2, cycles = value("lts__t_bytes.sum", 1e-6), value("sm__cycles_elapsed.max")
    time_us = value("gpu__time_duration.sum", 1e-3)
    return dataclasses.asdict(case) | {
        "case": f"{case.op} {case.m}x{case.k}x{case.n}",
        "kernel": row["Kernel Name"],
        "time_us": time_us,
        "clock_mhz": cycles / time_us if cycles and time_us else None,
        "l2_mb": l2,
        "l2_tb_per_s": l2 / time_us if l2 and time_us else None,
        "l2_hit_percent": value("lts__t_sector_hit_rate.pct"),
        "dram_read_mb": value("dram__bytes_read.sum", 1e-6),
        "dram_write_mb": value("dram__bytes_write.sum", 1e-6),
        "tensor_percent": value(f"sm__pipe_tensor_cycles_active{share}"),
        "shared_percent": value(f"l1tex__data_pipe_lsu_wavefronts_mem_shared{share}"),
        "special_percent": value(f"sm__inst_executed_pipe_xu{share}"),
        "registers": value("launch__registers_per_thread"),
        "warps_percent": value("sm__warps_active.avg.pct_of_peak_sustained_active"),
        "stalls": {name: round(stalls[name] / total, 3) for name in top},
        "top_stalls": ", ".join(f"{name} {stalls[name] / total:.0%}" for name in top),
    }


def main(arguments: Iterable[str] | None = None) -> int:
    """Command line; returns its exit status."""
    parser = files.command_line("counters", __doc__)
    parser.add_argument("--case", type=int, nargs="+", default=range(len(CASES)), help="indices into the cases")
    parser.add_argument("--launch", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.launch is not None:
        launch([CASES[i] for i in options.launch])
        return 0
    ncu = find_ncu()
    if ncu is None:
        print("no ncu (Nsight Compute) on this machine: nothing is written", file=sys.stderr)
        return 1
    version = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False).stdout
    query = subprocess.run([ncu, "--query-metrics", "--chips", "gh100"], capture_output=True, text=True, check=False)
    metrics = known_metrics(query.stdout) or list(METRICS[:6])
    print(f"{ncu}: {' '.join(version.split())}\nmetrics: {metrics}", flush=True)
    cases = list(options.case)
    parts = [cases[i::PROCESSES] for i in range(PROCESSES) if cases[i::PROCESSES]]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        outputs = pool.map(lambda part: profile(ncu, metrics, part, pathlib.Path(folder)), parts)
        for part, (text, printed) in zip(parts, outputs, strict=True):
            try:
                kernels = parse(text)
            except ValueError as error:
                print(f"{error}\n{printed}", file=sys.stderr)
                continue
            if len(kernels) != len(part):
                print(f"{len(kernels)} of {len(part)} cases were profiled:\n{printed}\n{text[:2000]}", file=sys.stderr)
            records += [record(CASES[i], row) for i, rows in zip(part, kernels, strict=False) for row in rows]
    for r in records:
        numbers = ("time_us", "clock_mhz", "l2_mb", "dram_read_mb", "tensor_percent", "registers")
        print(f"{r['implementation']} {r['case']} {r['sparsity']:g} V{r['group_size']} {r['epilogue'] or ''}",
              r["kernel"][:40], *(f"{name}={r[name]}" for name in numbers), r["top_stalls"], flush=True)  # fmt: skip
    if not records:
        print("ncu counted nothing: nothing is written", file=sys.stderr)
        return 1
    order = {dataclasses.astuple(case): i for i, case in enumerate(CASES)}
    fields = [field.name for field in dataclasses.fields(Case)]
    records.sort(key=lambda r: order[tuple(r[name] for name in fields)])
    if options.out is None and len({tuple(r[name] for name in fields) for r in records}) < len(CASES):
        print("not all cases were counted: nothing is written without --out", file=sys.stderr)
        return 1
    files.write(files.output(parser, options, "counters"), records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
