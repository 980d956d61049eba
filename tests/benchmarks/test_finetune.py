import json

import pytest

from benchmarks import finetune


def test_a_tiny_model_is_measured(tmp_path):
    path = tmp_path / "finetune.json"
    finetune.main(["--smoke", "--rounds", "1", "--out", str(path)])
    dense, compressed = json.loads(path.read_text())["records"]
    case = finetune.SMOKE
    weights = 4 * case.d_model**2 + 2 * case.d_model * case.mlp
    assert dense["layer_bytes"] == 3 * 4 * weights
    # A quarter of every array, and integers.
    assert 0.25 < compressed["memory"] < 0.27
    assert dense["speedup"] == 1
    assert compressed["speedup"] == pytest.approx(dense["time_us"] / compressed["time_us"])
