"""Tile configs: the heuristic is legal everywhere, tables are read and used, the tuner's parts work without a GPU."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import configs, triton_tiles, tune
from pallas_kernels.configs import Config, Problem

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
PROBLEM = Problem("forward", 4096, 4096, 4096, 32768, 128, "bfloat16")


@pytest.mark.parametrize("op", ["forward", "grad_values", "grad_input"])
def test_the_heuristic_is_legal(op):
    sizes = (37, 768, 4096), (30, 4096), (1, 7, 64, 256, 1000, 4096), (16, 32, 64, 128, 256)
    for (m, k, n, v), dtype in itertools.product(itertools.product(*sizes), ("bfloat16", "float32")):
        problem = Problem(op, m, k, n, -(-m // v) * max(1, k // 4), v, dtype)
        config = configs.heuristic(problem)
        for size in (config.block_rows, config.block_tokens, config.block_k, config.num_warps):
            assert size & (size - 1) == 0
        assert min(config.block_rows, config.block_tokens, config.block_k) >= 16
        assert configs.shared_memory(problem, config) <= configs.SHARED_MEMORY
        assert configs.search_space(problem)[0] == config


def test_a_config_is_frozen_and_hashable():
    assert hash(Config()) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().block_k = 1


@pytest.fixture
def table(tmp_path, monkeypatch):
    configs._table.cache_clear()
    monkeypatch.setattr(configs, "TABLES", tmp_path)

    def write(*entries):
        rows = [dataclasses.asdict(p) | {"config": dataclasses.asdict(c), "time_us": 1.0} for p, c in entries]
        (tmp_path / "my-gpu.json").write_text(json.dumps({"entries": rows}))

    yield write
    configs._table.cache_clear()


def test_the_nearest_measured_entry_is_used(table):
    near, far = Config(num_stages=4), Config(num_stages=5)
    table((dataclasses.replace(PROBLEM, m=5000), near), (dataclasses.replace(PROBLEM, m=9000), far))
    assert configs.config(PROBLEM, "My GPU") == near
    assert configs.config(dataclasses.replace(PROBLEM, m=8000), "My GPU") == far


def test_without_a_near_entry_the_heuristic_decides(table):
    table((PROBLEM, Config(num_stages=4)))
    for other in (
        dataclasses.replace(PROBLEM, n=128),
        dataclasses.replace(PROBLEM, group_size=64),
        dataclasses.replace(PROBLEM, dtype="float32"),
        dataclasses.replace(PROBLEM, m=100_000),
        dataclasses.replace(PROBLEM, equal=False),
    ):
        assert configs.config(other, "My GPU") == configs.heuristic(other)
    assert configs.config(PROBLEM, "Unknown GPU") == configs.config(PROBLEM, None) == configs.heuristic(PROBLEM)


def test_packaged_tables_hold_legal_configs():
    tables = sorted(configs.TABLES.glob("*.json"))
    assert [path.stem for path in tables] == ["nvidia-h200"]
    for path in tables:
        entries = json.loads(path.read_text())["entries"]
        assert len(entries) > 50
        for entry in entries:
            problem = Problem(**{field.name: entry[field.name] for field in dataclasses.fields(Problem)})
            config = Config(**entry["config"])
            assert configs.shared_memory(problem, config) <= configs.SHARED_MEMORY
            assert configs.config(problem, path.stem) == config
            assert entry["time_us"] > 0
            assert entry["dense_time_us"] > 0


@pytest.mark.parametrize("equal", [True, False])
def test_random_matrix(equal):
    matrix = tune.random_matrix(100, 200, 0.75, 16, equal=equal)
    counts = np.diff(np.asarray(matrix.topology.group_ptr))
    assert matrix.shape == (100, 200)
    assert abs(counts.mean() - 50) < 2
    assert (counts.std() == 0) == equal
    other = tune.random_matrix(100, 200, 0.75, 16, equal=equal, seed=1)
    np.testing.assert_array_equal(other.topology.group_ptr, matrix.topology.group_ptr)
    assert (np.asarray(other.topology.rows) != np.asarray(matrix.topology.rows)).any()


@pytest.mark.skipif(triton_tiles.device_kind() is not None, reason="there is a GPU: it would be tuned")
def test_tune_without_a_gpu_says_so(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path / "table.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_problems():
    found = tune.problems([(256, 128)], [16, 512], [0.5], [32], ["forward", "grad_input"], "bfloat16")
    assert Problem("forward", 256, 128, 512, 512, 32, "bfloat16", equal=False) in found
    assert len(found) == len(set(found)) == 5


def test_the_cost_model_decides_as_measured():
    """Over all measured products: dense where sparse is clearly slower, sparse where it is clearly faster."""
    records = json.loads((RESULTS / "nvidia-h200" / "matmul.json").read_text())["records"]
    decided = 0
    for r in records:
        if r["implementation"] != "triton" or r["op"] != "matmul" or r["epilogue"] or r["group_size"] == 256:
            continue  # the table has no entry for groups of 256 rows
        slots = -(-r["m"] // r["group_size"]) * round(r["k"] * (1 - r["sparsity"]))
        prediction = pk.predict(
            r["m"], r["k"], r["n"], slots=slots, group_size=r["group_size"], equal=r["counts"] == "equal",
            layout=r["layout"], device="NVIDIA H200",
        )  # fmt: skip
        if not 0.97 / 1.15 < r["speedup"] < 0.97 * 1.15:
            assert (prediction.speedup < 0.97) == (r["speedup"] < 0.97), (r["case"], r["speedup"], prediction)
            decided += 1
    assert decided > 50
    assert pk.predict(64, 64, 8, slots=32, group_size=32, device="cpu") is None
    assert pk.predict(64, 64, 8, slots=32, group_size=32) is None
