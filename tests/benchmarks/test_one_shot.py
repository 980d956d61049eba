"""The one-shot benchmark: its cases, its statistics, its resuming."""

import dataclasses
import importlib.util
import io
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from benchmarks import one_shot
from training import bert

installed = all(importlib.util.find_spec(name) for name in (bert.PACKAGE, "safetensors", "tokenizers"))


def test_cases_cover_every_pattern_once():
    cases = list(one_shot.cases(seeds=5))
    assert len(set(cases)) == len(cases) == 37 * (1 + 5 + 5)  # 19 labels at two sparsities, 2:4 at one of them
    assert {case.label for case in cases} == set(one_shot.PATTERNS)
    assert {case.sparsity for case in cases if case.label == "nm"} == {0.5}
    assert {case.seed for case in cases if case.method == "magnitude"} == {0}
    assert (cases[0].sparsity, cases[0].label) == (0.75, "unstructured")


def test_interval_is_students():
    values = [0.1, 0.3, 0.2, 0.5]
    mean, half = one_shot.interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(one_shot.interval([1.0])[1])


def test_spearman_compares_the_order_of_all_pairs():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(9, 4))
    turned = reference @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert one_shot.spearman(turned, reference) == pytest.approx(1)
    assert abs(one_shot.spearman(rng.normal(size=(9, 4)), reference)) < 0.9


def record(label, method, seed, cosine):
    case = {"label": label, "sparsity": 0.75, "method": method, "seed": seed}
    return {"op": "one_shot", **case, "cosine": cosine, "spearman": cosine, "output_error": 0.1}


def test_claims_are_paired_by_seed():
    records = (
        [record("vw 64", "magnitude", 0, 0.5)]
        + [record("vw 64", "repair", seed, 0.6 + 0.01 * seed) for seed in range(5)]
        + [record("shfl_bw 64", "repair", seed, 0.605 + 0.01 * seed) for seed in range(5)]
        + [record("bw 64", "repair", seed, 0.62 + 0.3 * (-1) ** seed) for seed in range(5)]
    )
    document = {"records": [*records, *one_shot.summary(records), *one_shot.claims(records)]}
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(*one_shot.tables(document))
    lines = console.export_text().splitlines()

    def verdict(claim):
        return next(line for line in lines if claim in line and "cosine" in line).strip("│ ").split("│")[-1].strip()

    assert verdict("vw 64: repair beats magnitude") == "yes"
    assert verdict("shfl_bw 64 beats vw 64 (repair)") == "yes"
    assert verdict("shfl_bw 64 beats bw 64 (repair)") == "undecided"
    assert not any("vw 32" in line for line in lines)


@pytest.mark.skipif(not installed, reason="pip install 'shfl-jax[bert]'; see training/bert.py")
def test_a_run_writes_records_and_resumes(tmp_path):
    path = tmp_path / "one_shot.json"
    settings = one_shot.Settings(count=1, size=32, length=64, held_out=8)
    with pytest.raises(ValueError, match="the text has"):
        one_shot.run(path, dataclasses.replace(settings, count=10_000), 10, ["vw 64"], 1)
    assert not path.exists()
    stopped = one_shot.run(path, settings, 0, ["vw 64"], 1)
    assert stopped["records"] == []
    document = one_shot.run(path, settings, 10, ["nm"], 1)
    assert json.loads(path.read_text()) == document
    measured = [record for record in document["records"] if record["op"] == "one_shot"]
    by_method = {record["method"]: record for record in measured}
    assert set(by_method) == set(one_shot.METHODS)
    assert by_method["repair"]["output_error"] < by_method["wanda"]["output_error"] < 0.2
    cosine = {method: record["cosine"] for method, record in by_method.items()}
    assert 0.5 < cosine["magnitude"] < cosine["wanda"] < cosine["repair"] - 0.1 < 0.9
    assert all(record["measured_sparsity"] == pytest.approx(0.5) for record in measured)
    written = path.stat().st_mtime_ns
    assert one_shot.run(path, settings, 10, ["nm"], 1) == document
    assert path.stat().st_mtime_ns == written
