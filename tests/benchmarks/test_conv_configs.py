"""What the study of the convolutions' configs concludes from its records."""

import json

import pytest

from benchmarks import conv_configs


def record(case, time_us, cluster=None, heuristic=False):
    config = None if cluster is None else {"cluster": cluster}
    implementation = "triton" if cluster is None else "mosaic_gpu"
    return {"op": "conv2d", "case": case, "group_size": 64, "batch": 16, "implementation": implementation,
            "config": config, "time_us": time_us, "heuristic": heuristic}  # fmt: skip


def test_summaries_compare_with_the_best_of_each_layer_and_are_written_once(tmp_path):
    first = [record("a", 10.0, 1, True), record("a", 8.0, 1), record("a", 16.0, 2), record("a", 24.0)]
    first += [record("a", None, 2)]  # could not be compiled
    second = [record("b", 5.0, 1, True), record("b", 20.0, 2), record("b", 10.0, 2), record("b", 15.0)]
    records = [r | {"heuristic_time_us": 10.0, "best_time_us": 8.0} for r in first]
    records += [r | {"heuristic_time_us": 5.0, "best_time_us": 5.0} for r in second]
    path = tmp_path / "conv_configs.json"
    origin = {"device": "some-gpu", "jax": "1.2.3", "date": "2026-01-02"}
    path.write_text(json.dumps(origin | {"records": records}))
    conv_configs.main(["--summary", "--out", str(path)])
    before = path.read_text()
    assert origin.items() <= json.loads(before).items()
    conv_configs.main(["--summary", "--out", str(path)])
    assert path.read_text() == before
    *same, summary = json.loads(before)["records"]
    assert same == records
    assert summary.pop("heuristic_of_best") == pytest.approx(1.25**0.5)
    assert summary.pop("clusters_of_best") == pytest.approx(2.0)
    assert summary.pop("triton_of_best") == pytest.approx(3.0)
    want = {"op": "conv2d_configs_summary", "group_size": 64, "batch": 16, "layers": 2, "worst_of_best": 1.25}
    assert summary == want


def test_a_machine_without_a_gpu_measures_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        conv_configs.main(["--out", str(tmp_path / "conv_configs.json")])
    assert "Hopper GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
