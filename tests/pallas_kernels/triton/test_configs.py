"""Tile configs: the heuristic is legal everywhere, tables are read and used, the tuner's parts work without a GPU."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import _devices as devices
from pallas_kernels import _tables as tables
from pallas_kernels import tune
from pallas_kernels._backend import Problem, choose
from pallas_kernels._devices import GPU
from pallas_kernels.mosaic import _configs as mosaic_configs
from pallas_kernels.mosaic._backend import Mosaic
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton._configs import Config

MOSAIC = Mosaic()
HOPPER = GPU("My GPU H100")
RESULTS = pathlib.Path(__file__).parents[3] / "benchmarks" / "results"
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
    tables._read.cache_clear()
    monkeypatch.setattr(tables, "TABLES", tmp_path)

    def write(*entries, **more):
        rows = [dataclasses.asdict(p) | {"config": dataclasses.asdict(c), "time_us": 1.0} | more for p, c in entries]
        (tmp_path / "my-gpu-h100.json").write_text(json.dumps({"entries": rows}))

    yield write
    tables._read.cache_clear()


def test_the_nearest_measured_entry_is_used(table):
    near, far = Config(num_stages=4), Config(num_stages=5)
    table((dataclasses.replace(PROBLEM, m=5000), near), (dataclasses.replace(PROBLEM, m=9000), far))
    assert configs.config(PROBLEM, "My GPU H100") == near
    assert configs.config(dataclasses.replace(PROBLEM, m=8000), "My GPU H100") == far


def test_without_a_near_entry_the_heuristic_decides(table):
    table((PROBLEM, Config(num_stages=4)))
    for other in (
        dataclasses.replace(PROBLEM, n=128),
        dataclasses.replace(PROBLEM, group_size=64),
        dataclasses.replace(PROBLEM, dtype="float32"),
        dataclasses.replace(PROBLEM, m=100_000),
        dataclasses.replace(PROBLEM, equal=False),
    ):
        assert configs.config(other, "My GPU H100") == configs.heuristic(other)
    assert configs.config(PROBLEM, "Unknown GPU") == configs.config(PROBLEM, None) == configs.heuristic(PROBLEM)


def test_an_entry_serves_its_own_implementation(table):
    config = mosaic_configs.Config(stages=3, split="rows", registers=(208, 88))
    table((PROBLEM, config), implementation="mosaic_gpu", triton_time_us=1.1)
    assert MOSAIC.config(PROBLEM, HOPPER) == config
    assert configs.config(PROBLEM, "My GPU H100") == configs.heuristic(PROBLEM)
    for other in (dataclasses.replace(PROBLEM, group_size=64), dataclasses.replace(PROBLEM, n=100_000)):
        assert MOSAIC.config(other, HOPPER) == mosaic_configs.heuristic(other, 132)
    assert MOSAIC.config(PROBLEM, None) == mosaic_configs.heuristic(PROBLEM, 132)


@pytest.mark.parametrize(("triton_time_us", "faster"), [(1.1, True), (0.9, False)])
def test_the_mosaic_kernel_is_taken_where_it_was_measured_faster(table, triton_time_us, faster):
    config = mosaic_configs.Config()
    table((PROBLEM, config), implementation="mosaic_gpu", triton_time_us=triton_time_us)
    assert MOSAIC.pays(dataclasses.replace(PROBLEM, m=4000), HOPPER) == faster
    far = dataclasses.replace(PROBLEM, k=100_000, slots=10**6)
    assert MOSAIC.pays(far, HOPPER)  # 32 groups, 16 tiles of tokens
    assert not MOSAIC.pays(far, HOPPER._replace(multiprocessors=1000))


def test_what_the_mosaic_kernel_can_do_has_a_search_space():
    for v, n, dtype in itertools.product((32, 64, 128, 256), (16, 264, 300, 4096), ("bfloat16", "float32")):
        problem = dataclasses.replace(PROBLEM, n=n, group_size=v, dtype=dtype)
        able = v >= 64 and n in (264, 4096) and dtype == "bfloat16"
        assert able == (not MOSAIC.why_not(problem))
        if able:
            space = MOSAIC.configs(problem, HOPPER)
            assert space[0] == mosaic_configs.heuristic(problem, 132)
            assert max(c.shared_memory(v) for c in space) <= mosaic_configs.SHARED_MEMORY


def test_packaged_tables_hold_legal_configs():
    packaged = sorted(tables.TABLES.glob("*.json"))
    assert [path.stem for path in packaged] == ["nvidia-h200"]
    for path in packaged:
        entries = json.loads(path.read_text())["entries"]
        assert len(entries) > 50
        for entry in entries:
            problem = Problem.of(entry)
            if entry.get("implementation") == "mosaic_gpu":
                gpu = GPU(path.stem)
                config = MOSAIC.config(problem, gpu)
                assert config.shared_memory(problem.group_size) <= mosaic_configs.SHARED_MEMORY
                assert MOSAIC.pays(problem, gpu) == (entry["time_us"] < entry["triton_time_us"])
            else:
                config = configs.config(problem, path.stem)
                assert configs.shared_memory(problem, config) <= configs.SHARED_MEMORY
            assert json.loads(json.dumps(dataclasses.asdict(config))) == entry["config"]
            assert entry["time_us"] > 0
            assert entry["triton_time_us" if entry.get("implementation") == "mosaic_gpu" else "dense_time_us"] > 0


@pytest.mark.parametrize("equal", [True, False])
def test_random_matrix(equal):
    matrix = tune.random_matrix(100, 200, 0.75, 16, equal=equal)
    counts = np.diff(np.asarray(matrix.integers.group_ptr))
    assert matrix.shape == (100, 200)
    assert abs(counts.mean() - 50) < 2
    assert (counts.std() == 0) == equal
    other = tune.random_matrix(100, 200, 0.75, 16, equal=equal, seed=1)
    np.testing.assert_array_equal(other.topology.group_ptr, matrix.integers.group_ptr)
    assert (np.asarray(other.topology.rows) != np.asarray(matrix.integers.rows)).any()


@pytest.mark.skipif(devices.gpu() is not None, reason="there is a GPU: it would be tuned")
def test_tune_without_a_gpu_says_so(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path / "table.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tuning_keeps_the_fastest_config_and_goes_on_where_it_stopped(monkeypatch, tmp_path):
    problem = Problem("forward", 16, 16, 16, 8, 16, "float32")
    slow, fast, wrong = (Config(16, 16, 16, num_stages=stages) for stages in (2, 3, 4))
    times = {2: 5.0, 3: 3.0, 4: 1.0}

    def product(op, config, implementation="triton"):
        def kernel(matrix, x, dy):
            return (matrix.values.sum() + x) * (-1 if config == wrong else 1)

        kernel.time_us = times[config.num_stages]
        return kernel

    monkeypatch.setattr(tune, "triton_device", lambda: "My GPU")
    monkeypatch.setattr(configs, "search_space", lambda problem: (slow, fast, wrong))
    monkeypatch.setattr(tune, "product", product)
    monkeypatch.setattr(tune, "_build", lambda function, *arguments: function)
    measured = []

    def median_us(function, sets):
        measured.append(function)
        return getattr(function, "time_us", 9.0), 1

    monkeypatch.setattr(tune.timing, "median_us", median_us)
    path = tmp_path / "tables" / "my-gpu.json"
    for _ in range(2):
        tune.tune([problem], ["triton", "mosaic_gpu"], path, 1.0)
    assert len(measured) == 4  # two dense products, and two configs that are right
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["implementation"] == "triton"
    assert Config(**entry["config"]) == fast
    assert (entry["time_us"], entry["dense_time_us"], entry["tried"]) == (3.0, 9.0, 3)


def test_problems():
    found = tune.problems([(256, 128)], [16, 512], [0.5], [32], ["forward", "grad_input"], "bfloat16")
    assert Problem("forward", 256, 128, 512, 512, 32, "bfloat16", equal=False) in found
    assert len(found) == len(set(found)) == 5


def test_the_cost_model_decides_as_measured():
    """Over all measured products: dense where the kernel taken is clearly slower, sparse where it is clearly faster."""
    records = json.loads((RESULTS / "nvidia-h200" / "matmul.json").read_text())["records"]
    measured = {}
    for r in records:
        row_groups = r["op"] == "matmul" and r["pattern"] in ("shfl_bw", "vw") and not r["epilogue"]
        if row_groups and r["implementation"] in ("triton", "mosaic_gpu"):
            measured.setdefault(r["case"], {})[r["implementation"]] = r
    decided = set()
    for name, of_case in measured.items():
        r = of_case["triton"]
        slots = -(-r["m"] // r["group_size"]) * round(r["k"] * (1 - r["sparsity"]))
        sizes = {"slots": slots, "group_size": r["group_size"], "equal": r["counts"] == "equal"}
        problem = Problem("forward", r["m"], r["k"], r["n"], dtype="bfloat16", **sizes)
        if choose(problem, [MOSAIC], GPU("NVIDIA H200")) is not None:
            r = of_case.get("mosaic_gpu", r)
        prediction = pk.predict(r["m"], r["k"], r["n"], layout=r["layout"], device="NVIDIA H200", **sizes)
        if prediction is not None and not 0.97 / 1.15 < r["speedup"] < 0.97 * 1.15:
            assert (prediction.speedup < 0.97) == (r["speedup"] < 0.97), (name, r["speedup"], prediction)
            decided.add((name, r["implementation"]))
    assert len(decided) > 50
    assert len([name for name, implementation in decided if implementation == "mosaic_gpu"]) >= 10
    assert pk.predict(64, 64, 8, slots=32, group_size=32, device="cpu") is None
    assert pk.predict(64, 64, 8, slots=32, group_size=32) is None
