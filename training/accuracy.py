"""The accuracy record: every pattern on four tasks, dense and pruned models trained alike.

    python -m training.accuracy --minutes 9

trains a dense model for each seed; every pattern then goes on from it, pruned gradually, while the dense model trains
on for as many steps. It writes benchmarks/results/<device>/accuracy.json after every case, skips cases that are there,
and can be stopped at any time. `--table` only prints what is there: means over the seeds, and whether the claims hold.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shfl_jax import BW, NM, TEW, TVW, TW, VW, Pattern, ShflBW, ShflTVW, Unstructured
from training import claims
from training.compare import device
from training.sweep import Models, Sweep, make_sweep, sparsities
from training.tasks import TASKS, Task

SEEDS = 3
MAIN = 0.75
"""The sparsity at which all patterns are compared."""
OTHERS = (0.5, 0.875, 0.9)
SHARE = 0.25
"""The floor of every row group (`min_share`) of VW, Shfl-BW and Shfl-TVW: no group is left without inputs."""

_grouped = {"min_share": SHARE}
PATTERNS: dict[str, Callable[[float], Pattern] | None] = {
    "dense": None,
    "EW": Unstructured,
    "Shfl-BW 64": functools.partial(ShflBW, group_size=64, **_grouped),
    "VW 64": functools.partial(VW, group_size=64, **_grouped),
    "BW 32": functools.partial(BW, block_size=32),
    "Shfl-BW 64, K-means": functools.partial(ShflBW, group_size=64, search="kmeans", **_grouped),
    "TVW 128": functools.partial(TVW, tile_size=128),
    "TW 128": functools.partial(TW, tile_size=128),
    "Shfl-BW 32": functools.partial(ShflBW, group_size=32, **_grouped),
    "Shfl-BW 128": functools.partial(ShflBW, group_size=128, **_grouped),
    "VW 32": functools.partial(VW, group_size=32, **_grouped),
    "VW 128": functools.partial(VW, group_size=128, **_grouped),
    "TEW 128": functools.partial(TEW, tile_size=128),
    "Shfl-TVW 64": functools.partial(ShflTVW, group_size=64, **_grouped),
    "2:4": lambda sparsity: NM(),
}
"""Label -> pattern at a sparsity. The number is V, the tile or the block; those of the claims come first."""
EVERYWHERE = ("EW", "Shfl-BW 64", "TVW 128", "BW 32")
"""The labels that are trained at the other sparsities too."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model of every seed: a label of `PATTERNS` and a sparsity, 0 for dense."""

    label: str
    sparsity: float

    @property
    def pattern(self) -> Pattern | None:
        """The pattern, None for dense."""
        make = PATTERNS[self.label]
        return None if make is None else make(self.sparsity)


def cases() -> Iterator[Case]:
    """All cases of a task, those of the claims first."""
    yield Case("dense", 0.0)
    for label, make in PATTERNS.items():
        if make is not None and label != "2:4":
            yield Case(label, MAIN)
    yield Case("2:4", 0.5)
    for sparsity in OTHERS:
        for label in EVERYWHERE:
            yield Case(label, sparsity)


def run(
    path: Path, names: Sequence[str], minutes: float, seeds: int, smoke: bool = False, labels: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains the cases that the file lacks until the minutes are over, and writes the file after each.

    Args:
        path: the results file; made if it does not exist.
        names: of the tasks.
        minutes: no case begins later.
        seeds: number of seeds, from 0.
        smoke: tiny models of a few steps, to try the program.
        labels: of the patterns; all unless given.

    Returns:
        The results file's content.

    Raises:
        ValueError: the file holds records of the other kind, of `smoke` or not, or by another recipe.
    """
    deadline = time.monotonic() + 60 * minutes
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": []}
    records = [record for record in document["records"] if record["op"] == "accuracy"]
    if any(record["smoke"] != smoke for record in records):
        raise ValueError(f"{path} holds {'full' if smoke else 'smoke'} records; name another file with --out")
    wanted = [case for case in cases() if not labels or case.label in labels]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*columns, TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in names:
            done = {(r["label"], r["sparsity"], r["seed"]) for r in records if r["task"] == name}
            missing = [c for c in wanted if any((c.label, c.sparsity, s) not in done for s in range(seeds))]
            if not missing or time.monotonic() > deadline:
                continue
            task = TASKS[name](smoke)
            recipe = dataclasses.asdict(task.recipe)
            if any(r.get("recipe", recipe) != recipe for r in records if r["task"] == name):
                raise ValueError(f"{path} holds records of {name} by another recipe; name another file with --out")
            for found in _train_task(task, missing, seeds, deadline, progress):
                # All seeds are trained together, those that are there already too.
                records += [r for r in found if (r["label"], r["sparsity"], r["seed"]) not in done]
                for record in found:
                    record["smoke"] = smoke
                document = _write(path, records)
                if not console.is_terminal:
                    console.print(_line(found), soft_wrap=True)
    return document


def merge(path: Path, others: Sequence[Path], names: Sequence[str] = tuple(TASKS)) -> dict[str, Any]:
    """Adds the tasks of other results files, such as those that were trained at the same time.

    A task comes whole from one file, the first that has it: differences are paired with the dense models of one run,
    and another run's are others, because sums on a GPU are not the same twice.

    Args:
        path: the results file; made if it does not exist. What it holds stays as it is.
        others: the other ones.
        names: of the tasks that are added.

    Returns:
        The results file's content.

    Raises:
        ValueError: files of different devices or versions of JAX, or records of `smoke` models among others.
    """
    sources = [path, *others] if path.exists() else others
    documents = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    parts = [[r for r in document["records"] if r["op"] == "accuracy"] for document in documents]
    origins = {(document["device"], document["jax"]) for document in documents}
    if len(origins) > 1 or len({record["smoke"] for part in parts for record in part}) > 1:
        raise ValueError(f"these files do not belong together: {sorted(origins)}, or smoke models among others")
    found: list[dict[str, Any]] = []
    for source, part in zip(sources, parts, strict=True):
        there = {record["task"] for record in found}
        found += [r for r in part if r["task"] not in there and (source == path or r["task"] in names)]
    order = {key: i for i, key in enumerate((name, c.label, c.sparsity) for name in TASKS for c in cases())}
    records = sorted(found, key=lambda r: (order[r["task"], r["label"], r["sparsity"]], r["seed"]))
    return _write(path, records, documents[0] | {"date": max(document["date"] for document in documents)})


def _write(path: Path, records: list[dict[str, Any]], origin: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes a results file, of this device unless `origin` names another, and returns its content."""
    made = {
        "device": device(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    summary = [*records, *claims.summary(records), *claims.verdicts(records)]
    document = {name: (origin or made)[name] for name in made} | {"records": summary}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def _train_task(
    task: Task, wanted: Sequence[Case], seeds: int, deadline: float, progress: Progress
) -> Iterator[list[dict[str, Any]]]:
    """Trains the cases of one task: the records of a case, one for each seed, after another."""
    programs, recipe = make_sweep(task, tuple(range(seeds))), task.recipe
    begin = time.monotonic()
    bar = progress.add_task(task.name, total=recipe.dense_steps + len(wanted) * recipe.prune_steps)
    # A program of masks serves every sparsity of its pattern; they are compiled beside the training.
    nominal = {case.label: case.pattern for case in reversed(wanted) if case.pattern is not None}
    pool = concurrent.futures.ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 1) // 2)))
    try:
        renewals = {
            label: pool.submit(programs.compile_renewal, nominal[label])
            for label in dict.fromkeys(case.label for case in wanted)
            if label in nominal
        }
        models, everything = programs.start(), programs.everything()
        for step in range(0, recipe.dense_steps, recipe.every):
            progress.update(bar, description=f"{task.name}: dense")
            models, losses = programs.train(models, everything, step)
            jax.block_until_ready(losses)
            progress.update(bar, advance=recipe.every)
        for case in wanted:
            if time.monotonic() > deadline:
                return
            progress.update(bar, description=f"{task.name}: {case.label} {case.sparsity:.1%}")
            renewal = renewals[case.label].result() if case.label in renewals else None
            start = begin if case is wanted[0] else time.monotonic()
            # Training donates its models, so it gets a copy.
            found = _train_case(
                programs,
                case,
                jax.tree.map(jnp.copy, models),
                nominal.get(case.label),
                renewal,
                lambda: progress.update(bar, advance=recipe.every),
            )
            seconds = round(time.monotonic() - start, 1)
            yield [record | {"seconds": seconds} for record in found]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _train_case(
    programs: Sweep,
    case: Case,
    models: Models,
    nominal: Pattern | None,
    renewal: Callable | None,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """Prunes the dense models, or trains them on, and measures them."""
    task, recipe, kept = programs.task, programs.task.recipe, programs.everything()
    masks = None if nominal is None else programs.whole(nominal)
    for i in range(recipe.prune_steps // recipe.every):
        if renewal is not None and i < len(recipe.fractions):
            sparsity, fraction = np.float32(case.sparsity), np.float32(recipe.fractions[i])
            models, masks, kept = renewal(models, masks, sparsity, fraction)
        models, losses = programs.train(models, kept, recipe.dense_steps + i * recipe.every)
        jax.block_until_ready(losses)
        advance()
    measured = programs.evaluate(models)
    pruned = np.zeros(len(programs.seeds)) if masks is None else sparsities(masks, programs.specs)
    pattern = case.pattern
    first = next(iter(programs.specs.values()))
    records = []
    for i, seed in enumerate(programs.seeds):
        records.append(
            {
                "op": "accuracy",
                "task": task.name,
                "label": case.label,
                "pattern": "dense" if pattern is None else pattern.name,
                "implementation": "xla",
                "m": first.matrix_shape[0],
                "k": first.matrix_shape[1],
                "n": recipe.batch,
                "dtype": jnp.dtype(getattr(task.model, "dtype", jnp.float32)).name,
                "sparsity": case.sparsity,
                "group_size": None if pattern is None else pattern.group_size,
                "counts": None if pattern is None or pattern.group_size == 1 else "ragged",
                "measured_sparsity": round(float(pruned[i]), 6),
                "seed": seed,
                "steps": recipe.steps,
                "recipe": dataclasses.asdict(recipe),
                "measure": task.measure,
                "higher": task.higher,
                **measured[i],
            }
        )
    # Every compressed model compiles a program of its own: one sparsity is enough.
    chosen = task.compressed and case.sparsity == MAIN
    if chosen and pattern is not None and masks is not None and pattern.group_size > 1:
        found = programs.evaluate_compressed(models, masks, pattern)
        records[0] |= {f"compressed_{name}": value for name, value in found.items()}
    return records


def _line(records: Sequence[dict[str, Any]]) -> str:
    """One case, for a log without bars."""
    first, name = records[0], records[0]["measure"]
    values = ", ".join(f"{record[name]:.4f}" for record in records)
    return f"{first['task']}: {first['label']}, {first['sparsity']:.1%}: {name} {values} ({first['seconds']:.0f} s)"


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=tuple(TASKS), help="only these tasks")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=(), metavar="LABEL", help="only these")
    parser.add_argument("--minutes", type=float, default=60, help="begin no case after this many (default 60)")
    parser.add_argument("--out", type=Path, help="the results file (default: that of this device)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to runs/accuracy/accuracy.json")
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="train nothing, add these files' tasks")
    parser.add_argument("--plot", type=Path, help="draw the results file's picture there; needs matplotlib")
    options = parser.parse_args(argv)
    name = json.loads(options.merge[0].read_text(encoding="utf-8"))["device"] if options.merge else device()
    default = Path(__file__).parent.parent / "benchmarks" / "results" / name / "accuracy.json"
    path = options.out or (Path("runs/accuracy/accuracy.json") if options.smoke else default)
    if options.merge:
        document = merge(path, options.merge, options.task)
    elif options.table:
        if not path.exists():
            parser.error(f"{path} does not exist; name a results file with --out")
        document = json.loads(path.read_text(encoding="utf-8"))
    else:
        document = run(path, options.task, options.minutes, options.seeds, options.smoke, options.patterns)
    Console().print(*claims.tables(document))
    if options.plot:
        from training import accuracy_plot

        accuracy_plot.draw(options.plot, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
