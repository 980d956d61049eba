"""The benchmark of the convolutions: its cases, and the whole program on small images."""

import json

import pytest

import pallas_kernels
from benchmarks import conv
from pallas_kernels import conv_cost


def test_the_layers_are_those_of_a_resnet50():
    assert len(set(conv.RESNET50)) == len(conv.RESNET50) == 23
    assert sum(layer.count for layer in conv.RESNET50) == 53
    weights = sum(layer.count * layer.window.features * layer.features for layer in conv.RESNET50)
    assert weights == 23_454_912  # of its convolutions
    flops = sum(c.layer.count * c.product[0] * c.product[1] * c.product[2] for c in conv.cases() if c.layout == "CHWN"
                and (c.batch, c.sparsity, c.group_size, c.counts) == (16, 0.75, 64, "equal"))  # fmt: skip
    assert flops / 16 == pytest.approx(4.09e9, rel=0.01)


def test_the_acceptance_cases_come_first():
    found = list(conv.cases())
    assert all((c.batch, c.sparsity, c.group_size, c.layout) == (64, 0.75, 64, "CHWN") for c in found[:23])
    assert len({conv.key_of(case) for case in found}) == len(set(found))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_the_program_runs_and_resumes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "cpu" / "conv.json"
    monkeypatch.setattr(conv, "TINY", conv.TINY[:1])
    monkeypatch.setattr(conv, "Torch", lambda: type("None", (), {"measure": lambda self, case: [],
                                                                 "close": lambda self: None})())  # fmt: skip
    arguments = ["--size", "tiny", "--acceptance", "--out", str(out)]
    conv.main(arguments)
    records = json.loads(out.read_text())["records"]
    assert {r["case"] for r in records} == {"tiny/3x3s1/4to32/image5/batch8/0.75/V64/equal/CHWN/bfloat16"}
    assert {(r["pattern"], r["implementation"], r["layout"]) for r in records} == {
        ("dense", "xla", "NHWC"), ("dense", "xla", "NCHW"), ("shfl_bw", "triton", "CHWN"), ("shfl_bw", "xla", "CHWN"),
    }  # fmt: skip
    assert len(records) == 4
    assert all(record["relative_error"] < 1e-2 and record["time_us"] > 0 for record in records)
    capsys.readouterr()
    conv.main(arguments)
    assert capsys.readouterr().out == ""
    conv.main(["--size", "tiny", "--model", "--out", str(out)])
    models = json.loads(out.read_text())["records"][len(records) :]
    assert [(r["pattern"], r["layout"]) for r in models] == [("dense", "NHWC"), ("dense", "NHWC"), ("shfl_bw", "CHWN")]
    assert all(r["relative_error"] < 3e-2 and r["time_us"] > 0 for r in models)
    assert models[-1]["compressed_layers"] == 5
    monkeypatch.setattr(conv_cost, "FOLDER", tmp_path)
    out.write_text(json.dumps({"records": [r | {"group_size": 32} for r in records]}))
    conv.main(["--size", "tiny", "--table", "--out", str(out)])
    entries = json.loads((tmp_path / "cpu.json").read_text())["entries"]
    (measured,) = [r for r in records if r.get("default")]
    assert measured["implementation"] == "xla"
    problem = {"taps": 9, "slots": 9, "group_size": 32, "device": "cpu"}
    conv_cost._table.cache_clear()
    found = pallas_kernels.predict_convolution(32, 36, 8 * 25, **problem)
    assert found == (measured["time_us"], measured["dense_time_us"])
    assert len(entries) == 1
    twice = pallas_kernels.predict_convolution(32, 36, 16 * 25, **problem)
    assert twice == pytest.approx((2 * measured["time_us"], 2 * measured["dense_time_us"]))
    for other in ({"taps": 1}, {"device": "gpu"}, {"group_size": 64}, {"dtype": "float32"}):
        assert pallas_kernels.predict_convolution(32, 36, 200, **(problem | other)) is None
    conv_cost._table.cache_clear()
    with pytest.raises(SystemExit):
        conv.main([])
