"""`shfl-jax prune` writes a compressed checkpoint, and explains what it cannot do."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import shfl_jax
from shfl_jax.cli import _prune as prune_command

MODEL = """
import flax.linen as nn, jax, numpy as np

def load():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16)])
    batches = [np.random.default_rng(i).normal(size=(20, 16)).astype(np.float32) for i in range(2)]
    return model, model.init(jax.random.key(0), batches[0])["params"], iter(batches)

def wrong():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model in a module of the current directory; its name."""
    name = f"model_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_model_becomes_a_compressed_checkpoint(module, tmp_path, capsys):
    arguments = [
        "--model",
        f"{module}:load",
        "--out",
        "out",
        "--pattern",
        "vw",
        "--sparsity",
        "0.5",
        "--group-size",
        "4",
    ]
    assert prune_command.main(arguments) == 0
    assert "layers_0/kernel" in capsys.readouterr().out
    dense = shfl_jax.decompress(shfl_jax.load(tmp_path / "out"))
    for name in ("layers_0", "layers_2"):
        assert np.count_nonzero(dense[name]["kernel"]) == 128

    # The same with parameters from a checkpoint, of one layer alone, unrepaired.
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16)])
    params = model.init(jax.random.key(7), jnp.ones((1, 16)))["params"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", params)
    more = ["--checkpoint", "dense", "--layers", "layers_2/.*", "--no-repair", "--score", "magnitude"]
    more += ["--allocation", "erk"]
    assert prune_command.main(arguments + more) == 0
    pruned = shfl_jax.decompress(shfl_jax.load(tmp_path / "out"))
    np.testing.assert_array_equal(pruned["layers_0"]["kernel"], params["layers_0"]["kernel"])
    kernel = np.asarray(pruned["layers_2"]["kernel"])
    assert np.count_nonzero(kernel) == 128
    np.testing.assert_array_equal(kernel[kernel != 0], np.asarray(params["layers_2"]["kernel"])[kernel != 0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "{}"], "MODULE:FUNCTION"),
        (["--model", "{}:missing"], "no function 'missing'"),
        (["--model", "{}:wrong"], "must return (model, params, batches), got int"),
        (["--model", "no_such_module_here:load"], "no_such_module_here"),
        (["--model", "{}:load", "--layers", "encoder/.*"], "'encoder/.*' matches no kernel"),
        (["--model", "{}:load", "--sparsity", "1.5"], "sparsity"),
        (["--model", "{}:load", "--pattern", "nm", "--sparsity", "0.75"], "always prunes 50%"),
        (["--model", "{}:load", "--pattern", "nm", "--sparsity", "0.5", "--group-size", "4"], "has none"),
        (["--model", "{}:load", "--checkpoint", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_done_is_explained(module, tmp_path, capsys, arguments, text):
    arguments = [argument.format(module) for argument in arguments]
    assert prune_command.main([*arguments, "--out", "out"]) == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
