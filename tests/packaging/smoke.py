"""What a user does first, with the installed wheel, in a folder with a `training` package of its own (`wheel.py`)."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pallas_kernels
import shfl_jax
import training
from shfl_jax import pruning

HERE = Path(__file__).parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


class Model(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="out")(nn.relu(nn.Dense(64, name="hidden")(x)))


def check_imports() -> None:
    """The wheel installs its two packages and leaves the user's names alone."""
    assert training.MINE
    assert Path(training.__file__).parent == HERE / "training"
    for package in (pallas_kernels, shfl_jax):
        assert Path(package.__file__).parent == SITE_PACKAGES / package.__name__
    for name in ("benchmarks", "tests"):
        assert importlib.util.find_spec(name) is None, name
    for point in importlib.metadata.distribution("shfl-jax").entry_points:
        assert point.module.partition(".")[0] in ("pallas_kernels", "shfl_jax"), point
        assert callable(point.load())


def check_model() -> None:
    """A model is pruned as it is trained, compressed, saved, loaded and run."""
    x = jax.random.normal(jax.random.key(0), (16, 48))
    y = jnp.sin(x[:, :8])
    model = Model()
    params = model.init(jax.random.key(1), x)["params"]

    plan = shfl_jax.Plan({"hidden/kernel": shfl_jax.ShflBW(sparsity=0.75, group_size=16)})
    specs = shfl_jax.linen.resolve(plan, model, x)
    schedule = pruning.cubic(begin=2, end=10, every=4)
    tx = pruning.prune(optax.adam(1e-2), specs, schedule)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(40):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert np.mean(np.asarray(params["hidden"]["kernel"]) == 0) == 0.75

    sparse = shfl_jax.compress(params, pruning.masks(state))
    shfl_jax.save(HERE / "checkpoint", sparse)
    loaded = shfl_jax.prepare(shfl_jax.load(HERE / "checkpoint"))
    found = jax.jit(lambda sparse, x: shfl_jax.linen.apply(model, sparse, x))(loaded, x)
    np.testing.assert_allclose(found, model.apply({"params": params}, x), rtol=1e-5, atol=1e-5)


def check_commands() -> None:
    """The command line starts, explains every command, and reads what was saved."""
    shfl = Path(sysconfig.get_path("scripts")) / "shfl-jax"
    text = subprocess.check_output([shfl, "--help"], text=True)
    for name in ("prune", "report", "tune"):
        assert name in text
        assert name in subprocess.check_output([shfl, name, "--help"], text=True)
    wide = os.environ | {"COLUMNS": "200"}  # so that no path in the table is folded
    assert "hidden/kernel" in subprocess.check_output([shfl, "report", "checkpoint"], text=True, env=wide)


if __name__ == "__main__":
    check_imports()
    check_model()
    check_commands()
    print("The wheel works: imported, pruned, compressed, saved, loaded, run, reported.")
