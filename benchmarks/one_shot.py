"""One-shot pruning of a pretrained sentence encoder: every pattern, score and repair, over calibration seeds.

    python -m benchmarks.one_shot --minutes 30

prunes all 36 encoder matrices of all-MiniLM-L6-v2, embeds held-out sentences and compares with the dense embeddings:
the mean cosine, and Spearman's rank correlation of the similarities of all pairs of sentences. It appends to
benchmarks/results/<device>/one_shot.json, skips cases that are there, and can be stopped at any time. `--table` only
prints what is there: means with 95% intervals over the seeds, and whether the claims hold.
"""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import records as files
from shfl_jax import BW, NM, TVW, TW, VW, Pattern, Plan, ShflBW, Unstructured
from shfl_jax.oneshot import prune_one_shot
from training import bert

GROUP_SIZES = (64, 32, 128)
PATTERNS: dict[str, Callable[[float], Pattern]] = {
    "unstructured": Unstructured,
    "nm": lambda sparsity: NM(),
    "tw 128": lambda sparsity: TW(sparsity, tile_size=128),
    "tvw 128": lambda sparsity: TVW(sparsity, tile_size=128),
}
"""Label -> pattern at a sparsity. The number is V, the tile or the block; "equal": all groups keep as many columns."""
for _v in GROUP_SIZES:
    PATTERNS |= {
        f"shfl_bw {_v}": functools.partial(ShflBW, group_size=_v),
        f"vw {_v}": functools.partial(VW, group_size=_v),
        f"shfl_bw {_v} equal": functools.partial(ShflBW, group_size=_v, balanced=True),
        f"vw {_v} equal": functools.partial(VW, group_size=_v, balanced=True),
        f"bw {_v}": functools.partial(BW, block_size=_v),
    }
FIRST = tuple(PATTERNS)[:9]
"""The labels that are measured before the others."""
METHODS = {"magnitude": ("magnitude", False), "repair": ("wanda", True), "wanda": ("wanda", False)}
"""Method -> score, and whether kept weights are repaired."""
SPARSITIES = (0.75, 0.5)
SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One pruned model: a label of `PATTERNS`, a sparsity, a method of `METHODS`, a calibration seed."""

    label: str
    sparsity: float
    method: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much text: batches of `size` windows of `length` tokens to calibrate on, `held_out` sentences to measure."""

    count: int = 4
    size: int = 16
    length: int = 64
    held_out: int = 128


def cases(labels: Sequence[str] = tuple(PATTERNS), seeds: int = SEEDS) -> Iterator[Case]:
    """All cases, those of the claims first. Magnitude does not see the calibration text: one seed is all there is."""
    for sparsity in SPARSITIES:
        for tier in (FIRST, [label for label in PATTERNS if label not in FIRST]):
            for method in METHODS:
                for seed in range(1 if method == "magnitude" else seeds):
                    for label in tier:
                        if label in labels and PATTERNS[label](sparsity).sparsity == sparsity:
                            yield Case(label, sparsity, method, seed)


def spearman(embeddings: np.ndarray, reference: np.ndarray) -> float:
    """Rank correlation of the similarities of all pairs of sentences: two sets of unit vectors (n, D)."""
    pairs = np.triu_indices(len(reference), 1)
    return float(stats.spearmanr((embeddings @ embeddings.T)[pairs], (reference @ reference.T)[pairs]).statistic)


def measure(encoder: bert.Pretrained, case: Case, settings: Settings, dense: np.ndarray, text: list[str]) -> dict:
    """Prunes and measures one case: its record."""
    start = time.perf_counter()
    pattern, (score, repair) = PATTERNS[case.label](case.sparsity), METHODS[case.method]
    batches = bert.batches(encoder, case.seed, settings.count, settings.size, settings.length)
    pruned = prune_one_shot(encoder.model, encoder.params, Plan({".*": pattern}), batches, score=score, repair=repair)
    seconds = time.perf_counter() - start
    embeddings = encoder.encode(text, pruned.params)
    return {
        "op": "one_shot",
        "pattern": pattern.name,
        "label": case.label,
        "group_size": pattern.group_size,
        "sparsity": case.sparsity,
        "method": case.method,
        "score": score,
        "repair": repair,
        "seed": case.seed,
        "model": "all-MiniLM-L6-v2",
        **dataclasses.asdict(settings),
        "measured_sparsity": float(np.mean([layer.sparsity for layer in pruned.layers])),
        "retained_saliency": float(np.mean([layer.retained for layer in pruned.layers])),
        "masked_error": float(np.mean([layer.masked_error for layer in pruned.layers])),
        "output_error": float(np.mean([layer.error for layer in pruned.layers])),
        "cosine": float((embeddings * dense).sum(1).mean()),
        "spearman": spearman(embeddings, dense),
        "seconds": round(seconds, 2),
    }


def run(path: Path, settings: Settings, minutes: float, labels: Sequence[str], seeds: int) -> dict[str, Any]:
    """Measures the cases that the file lacks until the minutes are over, and writes the file after each."""
    document = files.read(path)
    measured = [record for record in document["records"] if record["op"] == "one_shot"]
    done = {_key(record) for record in measured}
    text_key = dataclasses.asdict(settings)
    wanted = [case for case in cases(labels, seeds) if _key(dataclasses.asdict(case) | text_key) not in done]
    if not wanted:
        return document
    encoder = bert.pretrained()
    text = bert.sentences(held_out=True)[: settings.held_out]
    dense = encoder.encode(text)
    for case in files.until(minutes, wanted, lambda c: f"{c.label} {c.sparsity:.0%} {c.method} seed {c.seed}"):
        measured.append(measure(encoder, case, settings, dense, text))
        document = files.write(path, [*measured, *summary(measured), *claims(measured)])
    return document


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t); the half-width is NaN for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds with 95% intervals: a record of op "one_shot_mean" for a pattern, sparsity and method."""
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["sparsity"], record["label"], record["method"]].append(record)
    means = []
    for (sparsity, label, method), group in sorted(groups.items(), key=_order):
        mean = {"op": "one_shot_mean", "sparsity": sparsity, "label": label, "method": method, "seeds": len(group)}
        for name in ("cosine", "spearman", "output_error"):
            value, half = interval([record[name] for record in group])
            mean |= {name: value, f"{name}_text": f"{value:.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")}
        means.append(mean)
    return means


def claims(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims, each a mean difference with its 95% interval, paired by seed: records of op "one_shot_claim"."""
    scores = {(r["sparsity"], r["label"], r["method"], r["seed"]): r for r in records}
    found = []

    def add(claim: str, sparsity: float, better: tuple[str, str], worse: tuple[str, str]) -> None:
        for name in ("cosine", "spearman"):
            pairs = []
            for seed in range(SEEDS):
                reference = 0 if worse[1] == "magnitude" else seed  # magnitude is the same for every seed
                first, second = scores.get((sparsity, *better, seed)), scores.get((sparsity, *worse, reference))
                if first and second:
                    pairs.append(first[name] - second[name])
            if len(pairs) > 1:
                mean, half = interval(pairs)
                found.append(
                    {
                        "op": "one_shot_claim",
                        "claim": claim,
                        "sparsity": sparsity,
                        "measure": name,
                        "difference": f"{mean:+.4f} ± {half:.4f}",
                        "seeds": len(pairs),
                        "holds": "yes" if mean - half > 0 else "no" if mean + half < 0 else "undecided",
                    }
                )

    for sparsity in SPARSITIES:
        for label in PATTERNS:
            add(f"{label}: repair beats magnitude", sparsity, (label, "repair"), (label, "magnitude"))
    for v in GROUP_SIZES:
        for counts in ("", " equal"):
            for other in (f"vw {v}{counts}", f"bw {v}"):
                for method in ("repair", "wanda"):
                    claim = f"shfl_bw {v}{counts} beats {other} ({method})"
                    add(claim, 0.75, (f"shfl_bw {v}{counts}", method), (other, method))
    return found


def tables(document: dict[str, Any]) -> tuple[Table, Table]:
    """The means and the claims of a results file, for the terminal."""
    columns = ("sparsity", "pattern", "method", "seeds", "cosine", "rank correlation", "output error")
    means = Table(*columns, title="One-shot pruning of all-MiniLM-L6-v2 (95% intervals)")
    judged = Table("claim", "sparsity", "measure", "difference", "seeds", "holds", title="Claims")
    for r in document["records"]:
        if r["op"] == "one_shot_mean":
            texts = (r[f"{name}_text"] for name in ("cosine", "spearman", "output_error"))
            means.add_row(f"{r['sparsity']:.0%}", r["label"], r["method"], str(r["seeds"]), *texts)
        elif r["op"] == "one_shot_claim":
            names = ("measure", "difference", "seeds", "holds")
            judged.add_row(r["claim"], f"{r['sparsity']:.0%}", *(str(r[name]) for name in names))
    return means, judged


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = files.command_line("one_shot", __doc__, minutes=60, table=True)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=tuple(PATTERNS), metavar="LABEL")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="calibration seeds (default 5)")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, metavar="N")
    options = parser.parse_args(argv)
    path = files.output(parser, options, "one_shot")
    settings = Settings(*(getattr(options, field.name) for field in dataclasses.fields(Settings)))
    if options.table:
        document = files.read(path)
    else:
        document = run(path, settings, options.minutes, options.patterns, options.seeds)
    Console().print(*tables(document))
    return 0


def _key(record: dict[str, Any]) -> tuple:
    names = ("label", "sparsity", "method", "seed", *(field.name for field in dataclasses.fields(Settings)))
    return tuple(record[name] for name in names)


def _order(item: tuple[tuple[float, str, str], Any]) -> tuple:
    sparsity, label, method = item[0]
    return sparsity, list(PATTERNS).index(label), list(METHODS).index(method)


if __name__ == "__main__":
    sys.exit(main())
