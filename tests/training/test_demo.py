import json
import math

import numpy as np
import pytest

import shfl_jax
from training import demo, figures


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    status = demo.main(["--preset", "smoke", "--out", str(out), "--seed", "3"])
    return status, out, json.loads((out / "demo.json").read_text())


def test_the_smoke_run_says_that_compressed_logits_are_right(smoke):
    status, _, results = smoke
    assert status == 0
    for record in results["records"]:
        assert record["logits_error"] <= 1e-4


def test_every_model_is_trained_alike_and_learns(smoke):
    _, _, results = smoke
    assert [r["pattern"] for r in results["records"]] == ["dense", "shfl_bw", "vw"]
    assert {r["steps"] for r in results["records"]} == {120}
    for record in results["records"]:
        curve = results["curves"][record["label"]]
        assert curve[-1][0] == 120
        assert curve[-1][1] < curve[0][1] < math.log2(110)
        assert record["bits_per_char"] == pytest.approx(curve[-1][1], rel=0.1)


def test_pruned_models_reach_their_sparsity_and_are_small(smoke):
    _, _, results = smoke
    dense, *pruned = results["records"]
    assert dense["sparsity"] == 0
    assert dense["speedup"] == 1
    for record in pruned:
        assert record["sparsity"] == 0.75
        assert record["counts"] == "equal"
        assert record["nbytes"] <= 0.30 * record["dense_nbytes"]
        assert record["speedup"] == pytest.approx(record["dense_time_us"] / record["time_us"])


def test_checkpoints_and_picture_are_left_behind(smoke):
    _, out, results = smoke
    for name in ("shfl_bw", "vw"):
        report = shfl_jax.report(shfl_jax.load(out / name))
        assert [layer.pattern for layer in report.layers] == [name] * 6
        assert report.nbytes == next(r["nbytes"] for r in results["records"] if r["pattern"] == name)
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_ragged_mask_is_drawn(tmp_path):
    scores = np.random.default_rng(0).uniform(size=(20, 9)).astype(np.float32)
    mask = shfl_jax.mask(scores, shfl_jax.ShflBW(0.6, group_size=8))
    curves = {"dense": [(5, 3.0), (10, 2.0)], "Shfl-BW": [(5, 3.0), (10, 2.5)]}
    figures.draw(tmp_path / "a.png", curves, pruning=(5, 8), baseline=2.1, mask=mask, layer="layer")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_presets_divide_into_whole_blocks():
    for preset in demo.PRESETS.values():
        assert preset.dense_steps % preset.block == preset.prune_steps % preset.block == 0
