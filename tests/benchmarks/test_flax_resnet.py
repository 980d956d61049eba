"""The benchmark of ResNet-50 as Flax users have it, on a tiny network."""

import json

import pytest

from benchmarks import flax_resnet


def test_records_of_a_tiny_network(tmp_path):
    flax_resnet.main(["--smoke", "--out", str(tmp_path / "results.json")])
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [(r["form"], r["compressed_layers"]) for r in records] == [
        ("dense", 0), ("compressed but for the stem", 8), ("compressed", 9),
    ]  # fmt: skip
    for record in records:
        assert record["relative_error"] < 0.03
        assert record["speedup"] * record["time_us"] == pytest.approx(records[0]["time_us"])


def test_transpositions_are_those_of_images():
    text = """
      %a = bf16[64,7,7,512]{3,2,1,0} transpose(%x), dimensions={3,1,2,0}
      ROOT %b = f32[512,3136]{1,0} copy(%a), metadata={op_name="y"}
      %c = bf16[4608,512]{1,0} copy(%kernel)
      %d = bf16[64,7,7,512]{3,2,1,0} bitcast(%e)
    """
    assert flax_resnet.transpositions(text, 64 * 7 * 7) == 2
