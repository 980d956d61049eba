"""The benchmark of the row-permutation search: its cases, its means, its resuming."""

import importlib.util
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import search
from shfl_jax import VW
from training import bert

installed = all(importlib.util.find_spec(name) for name in (bert.PACKAGE, "safetensors", "tokenizers"))
WEIGHTS = {"0/query": np.ones((4, 4)), "0/up": np.ones((8, 4))}
RETAINED = {"vw": 0.2, "unstructured": 0.6, "kmeans": 0.3, "annealing": 0.34}


@pytest.mark.skipif(not installed, reason="the pretrained model is not installed")
def test_all_encoder_matrices_are_measured():
    weights = search.encoder_weights()
    assert len(weights) == 36
    assert {w.shape for w in weights.values()} == {(384, 384), (1536, 384), (384, 1536)}
    shapes = {name: w.shape for name, w in weights.items()} | {
        name: spec[1:] for name, spec in search.SYNTHETIC.items()
    }
    cases = list(search.cases(shapes))
    assert len(set(cases)) == len(cases) == (36 + len(search.SYNTHETIC)) * 3 * 4 + 36 * 3


def test_retained_saliency_is_that_of_the_mask():
    scores = jnp.abs(jnp.asarray(search.synthetic("low_rank", 8, 12)))
    best = np.sort(np.asarray(scores, np.float64).reshape(2, 4, 12).sum(1), axis=None)[-6:].sum()
    retained, seconds = search.run(VW(0.5, 4), scores, 0.75)
    assert retained == pytest.approx(best / np.asarray(scores, np.float64).sum())
    assert seconds > 0
    assert search.peak_bytes(search.compiled(VW(0.5, 4), (8, 12))[0]) >= 8 * 12 * 4


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurements by constants; the names of what was measured."""
    calls = []

    def run(pattern, scores, sparsity):
        name = getattr(pattern, "search", pattern.name)
        calls.append(name)
        return RETAINED.get(name, 0.5), 1.0

    monkeypatch.setattr(search, "run", run)
    monkeypatch.setattr(search, "compiled", lambda pattern, shape: (None, 2.0))
    monkeypatch.setattr(search, "peak_bytes", lambda program: 1000)
    monkeypatch.setattr(search, "encoder_weights", lambda: WEIGHTS)
    monkeypatch.setattr(search, "SYNTHETIC", {})
    monkeypatch.setattr(search, "TIMED", ((8, 4),))
    return calls


def test_resumes_and_keeps_the_baseline(measured, tmp_path):
    path = tmp_path / "search.json"
    search.measure_all(path, 0.0, again=False)
    assert not path.exists()
    document = search.measure_all(path, 1.0, again=False)
    assert document == json.loads(path.read_text())
    assert measured.count("kmeans") == 2 * (3 * 4 + 3)  # 2:4 inside is measured with K-means too
    measured.clear()
    search.measure_all(path, 1.0, again=False)
    assert measured == []
    search.measure_all(path, 1.0, again=True)
    assert measured.count("annealing") == 2 * (3 * 4 + 2 * 3)
    assert measured.count("kmeans") == 2 * 3
    search.time_all(path, again=False)
    measured.clear()
    search.time_all(path, again=False)
    assert measured == []
    search.time_all(path, again=True)
    records = json.loads(path.read_text())["records"]
    assert sum(r["op"] == "search_time" for r in records) == 3 * (len(search.TIMED) + 1)
    assert sum(r["op"] == "search" for r in records) == 2 * 3 * 4


def test_means_and_tables(measured, tmp_path):
    document = search.measure_all(tmp_path / "search.json", 1.0, again=False)
    for record in document["records"]:
        if record.get("weights") == "0/up" and record["op"] == "search" and record["sparsity"] == 0.5:
            record["retained_annealing"] = 0.28
    means = search.summary(document["records"])
    overall = next(r for r in means if r["op"] == "search_summary" and r["group_size"] == "all")
    assert overall["closed_kmeans"] == pytest.approx(0.25)
    assert overall["closed_ratio"] == pytest.approx(0.35 / 0.25)
    assert (overall["cases"], overall["below_kmeans"]) == (24, 3)
    assert overall["least_gain"] == pytest.approx(-0.02)
    inside = next(r for r in means if r["op"] == "two_four_summary" and r["group_size"] == "all")
    assert inside["tvw_above_shfl_bw"] == pytest.approx(0.5 - 0.34)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(*search.table(document["records"]))
    assert "pretrained" in console.export_text()
