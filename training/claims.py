"""What the accuracy record says: means over the seeds, paired differences, and whether the claims hold."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

Record = dict[str, Any]

MAIN = 0.75
"""The sparsity of the claims."""
CLAIMS = (
    ("Shfl-BW 64 > BW 32", "Shfl-BW 64", "BW 32", 0.0, True, "every"),
    ("EW >= Shfl-BW 64", "EW", "Shfl-BW 64", 0.0, False, "every"),
    ("Shfl-BW 32 >= VW 32", "Shfl-BW 32", "VW 32", 0.0, False, "three"),
    ("Shfl-BW 64 >= VW 64", "Shfl-BW 64", "VW 64", 0.0, False, "three"),
    ("Shfl-BW 128 >= VW 128", "Shfl-BW 128", "VW 128", 0.0, False, "three"),
    ("Shfl-BW 64 loses at most 1 against dense", "Shfl-BW 64", "dense", -1.0, False, "three"),
    ("Shfl-BW 64: annealing > K-means", "Shfl-BW 64", "Shfl-BW 64, K-means", 0.0, True, "mean"),
)
"""Claim, the better label, the other, the least difference, whether it must be exceeded, and over which tasks."""
NUMBERS = ("accuracy", "bits_per_char", "token_accuracy", "bleu", "loss", "character_accuracy")
"""What records may hold."""
TASKS = 4
"""How many tasks a complete record has."""


def summary(records: Sequence[Record]) -> list[Record]:
    """Means over the seeds: a record of op "accuracy_mean" for every task, pattern and sparsity.

    `value` is the mean of the task's measure and `difference` that of the paired differences to dense (see `gain`),
    with the standard deviation over the seeds in the texts, and `differences` every seed's. `also` is a text about what
    else the task measures.
    """
    groups = collections.defaultdict(list)
    for record in records:
        groups[record["task"], record["label"], record["sparsity"]].append(record)
    dense = _by_seed(records, "dense")
    means = []
    for (task, label, sparsity), group in groups.items():
        first = group[0]
        values = [record[first["measure"]] for record in group]
        paired = [gain(r, dense[task, r["seed"]], dense[task, r["seed"]]) for r in group if (task, r["seed"]) in dense]
        compressed = [r[f"compressed_{r['measure']}"] for r in group if f"compressed_{r['measure']}" in r]
        means.append(
            {
                "op": "accuracy_mean",
                "task": task,
                "label": label,
                "pattern": first["pattern"],
                "sparsity": sparsity,
                "measured_sparsity": float(np.mean([record["measured_sparsity"] for record in group])),
                "seeds": len(group),
                "measure": first["measure"],
                "value": float(np.mean(values)),
                "value_text": _spread([100 * v for v in values], ".2f") if first["higher"] else _spread(values, ".4f"),
                "difference": float(np.mean(paired)) if paired else None,
                "difference_text": _spread(paired, "+.2f") if paired and label != "dense" else "",
                "differences": _list(paired),
                # The first seed alone is compressed.
                "masked_text": f"{100 * values[0]:.2f}" if compressed else "",
                "compressed_text": f"{100 * compressed[0]:.2f}" if compressed else "",
                "also": _also(group),
                **{f"mean_{name}": float(np.mean([r[name] for r in group])) for name in NUMBERS if name in first},
            }
        )
    return means


def _also(group: Sequence[Record]) -> str:
    """What a task measures besides, for a table."""
    first = group[0]
    if "bleu" in first:
        return f"BLEU {_spread([record['bleu'] for record in group], '.2f')}"
    if "character_accuracy" in first:
        return f"{_spread([100 * record['character_accuracy'] for record in group], '.2f')}% of characters right"
    return ""


def gain(record: Record, other: Record, dense: Record) -> float:
    """How much better one record is than another: in points, or in percent of the dense model's bits."""
    name = record["measure"]
    if record["higher"]:
        return 100 * (record[name] - other[name])
    return 100 * (other[name] - record[name]) / dense[name]


def verdicts(records: Sequence[Record]) -> list[Record]:
    """The claims at 75%, from differences paired by seed: a record of op "accuracy_claim" for every task.

    `holds` is "yes" or "no" by the mean over the seeds. One more record a claim, of the task "all", counts tasks; it is
    "undecided" as long as the tasks that are there do not settle it.
    """
    dense, found = _by_seed(records, "dense"), []
    tasks = dict.fromkeys(record["task"] for record in records)
    for claim, better, other, least, strictly, scope in CLAIMS:
        first, second = _by_seed(records, better), _by_seed(records, other)
        means, unbroken = [], 0
        for task in tasks:
            seeds = sorted(s for name, s in first if name == task and (task, s) in second and (task, s) in dense)
            if not seeds:
                continue
            pairs = [gain(first[task, s], second[task, s], dense[task, s]) for s in seeds]
            mean = float(np.mean(pairs))
            holds = mean > least if strictly else mean >= least
            means.append(mean)
            unbroken += holds
            found.append(_claim(claim, task, mean, _spread(pairs, "+.2f"), _list(pairs), len(seeds), holds))
        if not means:
            continue
        if scope == "mean":
            # The mean of all tasks is known when all of them are.
            verdict = None if len(means) < TASKS else float(np.mean(means)) > least
        else:
            needed = TASKS if scope == "every" else 3
            broken = len(means) - unbroken
            verdict = True if unbroken >= needed else False if broken > TASKS - needed else None
        text = f"{np.mean(means):+.2f} in the mean" if scope == "mean" else f"{unbroken} of {len(means)} tasks"
        found.append(_claim(claim, "all", float(np.mean(means)), text, "", len(means), verdict))
    return found


def _claim(claim: str, task: str, mean: float, text: str, each: str, count: int, holds: bool | None) -> Record:
    return {
        "op": "accuracy_claim",
        "claim": claim,
        "task": task,
        "sparsity": MAIN,
        "difference": mean,
        "difference_text": text,
        "differences": each,
        "count": count,
        "holds": "undecided" if holds is None else "yes" if holds else "no",
    }


def _by_seed(records: Sequence[Record], label: str) -> dict[tuple[str, int], Record]:
    """(task, seed) -> the record of a label at the sparsity of the claims."""
    sparsity = 0.0 if label == "dense" else MAIN
    return {(r["task"], r["seed"]): r for r in records if r["label"] == label and r["sparsity"] == sparsity}


def _spread(values: Sequence[float], template: str) -> str:
    """Mean and, of several values, their standard deviation."""
    mean = format(float(np.mean(values)), template)
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):{template.lstrip('+')}}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


def tables(document: Record) -> tuple[Table, Table]:
    """The means and the claims of a results file, for the terminal."""
    columns = ("task", "pattern", "sparsity", "seeds", "measure", "mean", "against dense", "compressed")
    means = Table(*columns, title="Accuracy (standard deviation over the seeds)")
    judged = Table("claim", "task", "difference", "of every seed", "holds", title=f"Claims at {MAIN:.0%}")
    for r in document["records"]:
        if r["op"] == "accuracy_mean":
            numbers = (str(r["seeds"]), r["measure"], r["value_text"], r["difference_text"], r["compressed_text"])
            means.add_row(r["task"], r["label"], f"{r['sparsity']:.1%}", *numbers)
        elif r["op"] == "accuracy_claim":
            judged.add_row(*(r[name] for name in ("claim", "task", "difference_text", "differences", "holds")))
    return means, judged
