"""Kernel times of the acceptance cases, this checkout against another one, on one GPU in one run.

    git worktree add ../before REVISION
    python -m benchmarks.regression ../before

Every case is timed in three processes of each checkout, in turn, and the medians are compared. Writes
`results/<device>/regression.json`, and fails where a case takes over 5% longer than before.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
from rich.progress import track

HERE = pathlib.Path(__file__).resolve().parents[1]
ROUNDS = 3
WORKERS = 4  # of each checkout: a process compiles its kernels one after another
MOST = 1.05  # times as long as before
MEMORY = "0.1"  # of the GPU for each process


def cases() -> dict[str, Callable[[], tuple[Callable, tuple]]]:
    """The cases of the checkout that is imported: name -> (() -> (function, arguments))."""
    from benchmarks import conv, matmul

    found: dict[str, Callable[[], tuple[Callable, tuple]]] = {}
    for case in matmul.ACCEPTANCE:
        found[matmul.key_of(case)] = lambda case=case: (matmul.sparse_function(case, None), matmul.operands(case, None))
    for layer in conv.RESNET50:
        for case in (conv.Case("resnet50", layer, 64), conv.Case("resnet50", layer, 64, group_size=32)):
            found[conv.key_of(case)] = lambda case=case: convolution(case)
    return found


def convolution(case: Any) -> tuple[Callable, tuple]:
    """A convolution with channels first, and its operands."""
    import pallas_kernels
    from pallas_kernels import tune

    window, (m, k, _) = case.layer.window, case.product
    filters = tune.random_matrix(m, k, case.sparsity, case.group_size, dtype=case.dtype)
    filters = pallas_kernels.prepare(filters, None, window)
    x = jax.random.normal(jax.random.key(1), (window.channels, *window.image, case.batch), case.dtype)

    def function(filters, x):
        return pallas_kernels.conv2d(
            filters, x, kernel_size=window.kernel, strides=window.strides, padding=window.padding
        )

    return function, (filters, x)


def worker() -> None:
    """Compiles the cases that it is sent, then times one for every further line."""
    from pallas_kernels import timing, tune

    known, compiled = cases(), {}
    for name in json.loads(sys.stdin.readline()):
        function, arguments = known[name]()
        compiled[name] = jax.jit(function).lower(*arguments).compile(), tune.copies(arguments)
        jax.block_until_ready(compiled[name][0](*arguments))
    print(json.dumps(len(compiled)), flush=True)
    for line in sys.stdin:
        print(json.dumps(timing.median_us(*compiled[json.loads(line)])[0]), flush=True)


class Worker:
    """A subprocess that imports a checkout."""

    def __init__(self, checkout: pathlib.Path, names: list[str]):
        """Starts it on some cases."""
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = MEMORY
        command = [sys.executable, __file__, "--worker"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.say(names)

    def say(self, message: Any) -> None:
        """Sends a line."""
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def hear(self) -> Any:
        """Reads a line."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


def compare(before: pathlib.Path, only: str) -> list[dict[str, Any]]:
    """The records of the cases whose names match a regular expression."""
    names = [name for name in cases() if re.search(only, name)]
    shares = [names[i::WORKERS] for i in range(WORKERS)]
    checkouts = {"before": before, "after": HERE}
    times: dict[str, dict[str, list[float]]] = {name: {label: [] for label in checkouts} for name in names}
    for number in range(ROUNDS):
        # Where a process has its arrays in memory changes some times by several percent, so every round has new ones.
        teams = {label: [Worker(path, share) for share in shares] for label, path in checkouts.items()}
        for one in (one for team in teams.values() for one in team):
            one.hear()
        for i, name in enumerate(track(names, description=f"round {number + 1} of {ROUNDS}")):
            for label, team in teams.items():
                team[i % WORKERS].say(name)
                times[name][label].append(team[i % WORKERS].hear())
        for one in (one for team in teams.values() for one in team):
            one.process.kill()
    records = []
    for name, found in times.items():
        old, new = (statistics.median(found[label]) for label in checkouts)
        spread = max(max(values) / min(values) for values in found.values())
        records.append({"op": "regression", "case": name, "before_us": old, "time_us": new, "ratio": new / old,
                        "spread": spread})  # fmt: skip
    return records


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the records of all cases say together."""
    ratios = [record["ratio"] for record in records]
    return {"op": "regression_summary", "cases": len(ratios), "ratio": statistics.geometric_mean(ratios),
            "least": min(ratios), "most": max(ratios)}  # fmt: skip


def main() -> int:
    """Command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=pathlib.Path, nargs="?", help="another checkout, such as a git worktree")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names match")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.worker:
        worker()
        return 0
    if options.before is None or not (options.before / "benchmarks" / "matmul.py").exists():
        parser.error("name a checkout of this project to compare with, such as a git worktree")
    from benchmarks.records import RESULTS, write
    from pallas_kernels import tune

    records = compare(options.before.resolve(), options.only)
    device = tune.triton_device().lower().replace(" ", "-")
    found = summary(records)
    write(options.out or RESULTS / device / "regression.json", [found, *records])
    for record in records:
        print(f"{record['case']}: {record['before_us']:.1f} -> {record['time_us']:.1f} us ({record['ratio']:.3f})")
    slower = [record["case"] for record in records if record["ratio"] > MOST]
    print(f"{found['cases']} cases, geometric mean {found['ratio']:.3f}; over {MOST}: {', '.join(slower) or 'none'}")
    return bool(slower)


if __name__ == "__main__":
    sys.exit(main())
