"""Sensitivity is the loss of a model with one layer pruned."""

import io
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import shfl_jax
from shfl_jax.oneshot._sensitivity import sensitivity


@pytest.fixture(scope="module")
def task():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(6, 8)).astype(np.float32) for _ in range(2)]
    params = model.init(jax.random.key(0), batches[0])["params"]
    specs = shfl_jax.linen.resolve(shfl_jax.Plan({".*": shfl_jax.Unstructured(0.5)}), model, batches[0])

    def loss(params, x):
        return jnp.mean((model.apply({"params": params}, x) - x[:, :4]) ** 2)

    return loss, params, specs, batches


def test_losses_are_those_of_models_with_one_layer_pruned(task):
    loss, params, specs, batches = task
    found = sensitivity(loss, params, specs, iter(batches), sparsities=(0.0, 0.5, 0.75))
    assert found.dense == pytest.approx(np.mean([loss(params, x) for x in batches]), rel=1e-5)
    assert list(found.losses) == ["layers_0/kernel", "layers_2/kernel"]
    for path, losses in found.losses.items():
        assert losses[0] == pytest.approx(found.dense, rel=1e-6)
        kernel = np.asarray(shfl_jax.path_leaves(params)[path])
        cut = np.sort(np.abs(kernel).ravel())[int(0.75 * kernel.size)]
        pruned = shfl_jax.update_paths(params, {path: jnp.asarray(np.where(np.abs(kernel) >= cut, kernel, 0))})
        assert losses[2] == pytest.approx(np.mean([loss(pruned, x) for x in batches]), rel=1e-5)


def test_table_and_plot(task, tmp_path: Path):
    loss, params, specs, batches = task
    found = sensitivity(loss, params, specs, batches, sparsities=(0.5,))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(found)
    assert f"{found.losses['layers_2/kernel'][0]:.4f}" in console.export_text()
    found.plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input(task):
    loss, params, specs, batches = task
    for sparsities in ((1.0,), (-0.1,)):
        with pytest.raises(ValueError, match=r"layers_0/kernel: .*cannot have a sparsity"):
            sensitivity(loss, params, specs, batches, sparsities)
    with pytest.raises(ValueError, match="at least one batch"):
        sensitivity(loss, params, specs, [])
    with pytest.raises(ValueError, match="nan with nothing pruned"):
        sensitivity(loss, params, specs, [batches[0] * np.nan])
