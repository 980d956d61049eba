"""The benchmark of the convolutions: its cases, and the whole program on small images."""

import json
import math

import pytest

import pallas_kernels
from benchmarks import conv, workers
from pallas_kernels import _tables as tables


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


def test_the_cases_of_a_shape_share_a_gpu_and_its_baselines():
    todo = list(conv.cases())
    shares = conv.spread(todo, conv.BATCHES, ["0", "1", "2", "3"])
    assert [shares[gpu][0] for gpu in "0123"] == [("model", 64), ("model", 16), ("dense", todo[0]), ("dense", todo[1])]
    loads, homes = [], []
    for share in shares.values():
        share = [item for item in share if item[0] != "model"]
        homes += {case.shape_key for _, case in share}
        sparse = [case for kind, case in share if kind == "sparse"]
        assert sparse == sorted(sparse, key=todo.index)
        loads.append(len(sparse))
        seen = set()
        for i, (kind, case) in enumerate(share):
            assert (kind == "dense") == (case.shape_key not in seen)
            assert kind == "sparse" or share[i + 1] == ("sparse", case)
            seen.add(case.shape_key)
    assert len(homes) == len(set(homes)) == 46
    assert sum(loads) == len(todo)
    assert max(loads[2:]) - min(loads[2:]) <= 11
    assert loads[2] - loads[0] == pytest.approx(conv.MODEL_LOAD, abs=11)


def test_the_program_shares_its_cases_among_workers_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0", "1"])  # each has a lock of its own
    out = tmp_path / "cpu" / "conv.json"
    arguments = ["--size", "tiny", "--acceptance", "--out", str(out)]
    conv.main(arguments)
    records = json.loads(out.read_text())["records"]
    assert list(dict.fromkeys(r["case"] for r in records)) == [
        "tiny/3x3s1/4to32/image5/batch8/0.75/V64/equal/CHWN/bfloat16",
        "tiny/1x1s2/8to32/image6/batch8/0.75/V64/equal/CHWN/bfloat16",
    ]
    ours = [("shfl_bw", "triton", "CHWN"), ("shfl_bw", "xla", "CHWN")]
    dense = [("dense", "xla", layout) for layout in ("NHWC", "NCHW", "CHWN")]
    assert [(r["pattern"], r["implementation"], r["layout"]) for r in records] == [*dense[:2], *ours, *dense, *ours]
    assert all(record["relative_error"] < 1e-2 and record["time_us"] > 0 for record in records)
    measured = [r for r in records if r.get("default")]
    assert [r["implementation"] for r in measured] == ["xla", "xla"]
    capsys.readouterr()
    conv.main(arguments)
    assert capsys.readouterr().out == ""

    conv.main(["--size", "tiny", "--model", "--out", str(out)])
    models = [r for r in json.loads(out.read_text())["records"] if r["op"] == "model"]
    assert [(r["pattern"], r["layout"]) for r in models] == [("dense", "NHWC"), ("dense", "NHWC"), ("shfl_bw", "CHWN")]
    assert all(r["relative_error"] < 3e-2 and r["time_us"] > 0 for r in models)
    assert models[-1]["compressed_layers"] == 5

    monkeypatch.setattr(tables, "TABLES", tmp_path)
    out.write_text(json.dumps({"records": [r | {"group_size": 32} for r in records]}))
    conv.main(["--size", "tiny", "--table", "--out", str(out)])
    entries = json.loads((tmp_path / "convolutions" / "cpu.json").read_text())["entries"]
    assert [entry["taps"] for entry in entries] == [9, 1]
    problem = {"taps": 9, "slots": 9, "group_size": 32, "device": "cpu"}
    tables._read.cache_clear()
    found = pallas_kernels.predict_convolution(32, 36, 8 * 25, **problem)
    assert found == (measured[0]["time_us"], measured[0]["dense_time_us"])
    for before, after in zip(found, pallas_kernels.predict_convolution(32, 36, 16 * 25, **problem), strict=True):
        assert before < after < 2 * before  # a kernel of this size takes its launch
    for before, after in zip(found, pallas_kernels.predict_convolution(32, 36, 2**30, **problem), strict=True):
        assert after > 1e3 * before
    for other in ({"device": "gpu"}, {"group_size": 64}, {"dtype": "float32"}):
        assert pallas_kernels.predict_convolution(32, 36, 200, **(problem | other)) is None
    tables._read.cache_clear()
    with pytest.raises(SystemExit):
        conv.main([])


def record(case, time_us, default=True):
    """A record of a case whose dense convolution takes 12 us."""
    dense = {"time_us": 12.0, "implementation": "xla", "layout": "NHWC", "pattern": "dense"}
    return conv.with_dense(case, [dense], [{"time_us": time_us, "default": default, "implementation": "triton"}])[1]


def test_what_follows_from_the_records():
    three, one, narrow = conv.RESNET50[0], conv.RESNET50[7], conv.RESNET50[-3]
    records = [
        record(conv.Case("resnet50", three, 64), 6.0),
        record(conv.Case("resnet50", conv.RESNET50[1], 64), 3.0),
        record(conv.Case("resnet50", one, 64), 10.0),
        record(conv.Case("resnet50", narrow, 64), 24.0),
        record(conv.Case("resnet50", one, 64), 1.0, False),
        record(conv.Case("resnet50", one, 64, counts="ragged"), 1.0),
        record(conv.Case("resnet50", three, 64, layout="NHWC"), 9.0),
        record(conv.Case("resnet50", narrow, 64, layout="NHWC"), 48.0),
        record(conv.Case("resnet50", one, 16, layout="NHWC"), 1.0),
        record(conv.Case("resnet50", one, 32), 1.0),  # a summary is of both kinds
        record(conv.Case("resnet50", one, 64, layout="NHWC"), None),
    ]
    (summary,) = conv.summaries(records)
    assert summary == {
        "op": "conv2d_summary", "batch": 64, "sparsity": 0.75, "group_size": 64, "layers": 4,
        "speedup_3x3": pytest.approx(math.sqrt(2 * 4)), "speedup_1x1": pytest.approx(1.2), "slow_share": 0.25,
    }  # fmt: skip
    one, three = conv.transposes(records)
    base = {"op": "conv2d_transposes", "batch": 64, "sparsity": 0.75, "group_size": 64, "stride": 1, "layers": 1}
    assert one == base | {"kernel": 1, "native_time_us": 24.0, "time_us": 48.0, "slowdown": 2.0, "speedup": 0.25}
    assert three == pytest.approx(base | {"kernel": 3, "native_time_us": 6.0, "time_us": 9.0, "slowdown": 1.5,
                                          "speedup": 4 / 3})  # fmt: skip


def test_a_case_is_complete_with_all_of_its_baselines(tmp_path):
    case, out = conv.cases()[0], tmp_path / "gpu" / "conv.json"
    results = conv.Results(out, (), ("dense", "torch"))
    base = {"pattern": "dense", "layout": "NHWC", "time_us": 8.0}
    assert results.add("sparse", case, [{"pattern": "shfl_bw", "implementation": "triton", "time_us": 4.0}]) == []
    assert results.add("torch", case, [base | {"implementation": "torch_cudnn", "time_us": 6.0}]) == []
    new = results.add("dense", case, [base | {"implementation": "xla"}])
    assert [(r["implementation"], r["speedup"]) for r in new] == [("xla", 0.75), ("torch_cudnn", 1.0), ("triton", 1.5)]
    assert {r["dense"] for r in new} == {"torch_cudnn NHWC"}
    results.save({})
    assert len(conv.Results(out, (), ()).records) == 3
    assert conv.Results(out, [conv.key_of(case)], ()).records == []
