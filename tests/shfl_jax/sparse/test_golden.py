"""What earlier versions wrote, this one reads: see tests/golden/write.py."""

import importlib.util
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import shfl_jax

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
CHECKPOINTS = sorted(path.parent.relative_to(GOLDEN).parts for path in GOLDEN.glob("v*/*/header.json"))
STATES = sorted(path.parent.name for path in GOLDEN.glob("v*/optax"))
_spec = importlib.util.spec_from_file_location("golden_write", GOLDEN / "write.py")
write = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write)


def assert_same_bits(found, file):
    with np.load(file) as expected:
        assert set(found) == set(expected)
        for path, array in expected.items():
            assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape)
            assert found[path].tobytes() == array.tobytes()


@pytest.mark.parametrize(("version", "name"), CHECKPOINTS)
def test_a_golden_checkpoint_loads_bit_for_bit(version, name, tmp_path):
    sparse = shfl_jax.load(GOLDEN / version / name)
    assert_same_bits(write.flat(shfl_jax.decompress(sparse)), GOLDEN / version / f"{name}.npz")
    # What is written today holds the same.
    shfl_jax.save(tmp_path / name, sparse)
    again = shfl_jax.load(tmp_path / name)
    assert jax.tree.structure(again) == jax.tree.structure(sparse)
    for old, new in zip(jax.tree.leaves(sparse), jax.tree.leaves(again), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


@pytest.mark.parametrize("version", STATES)
def test_training_resumes_from_a_golden_optimizer_state_bit_for_bit(version):
    tx, params = write.training_run()
    target = {"params": params, "opt_state": jax.eval_shape(tx.init, params)}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), target)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(GOLDEN / version / "optax", target)
    resumed = write.steps(tx, saved["params"], saved["opt_state"], write.SAVED_AT, write.RESUMED_TO)
    found = write.flat(dict(zip(("params", "opt_state"), resumed, strict=True)))
    assert_same_bits(found, GOLDEN / version / "optax.npz")


def test_every_form_has_golden_files():
    assert {name for version, name in CHECKPOINTS if version == "v1"} == {
        "row_grouped", "two_four", "stacked", "convolution"
    }  # fmt: skip
    assert ("v2", "unchosen") in CHECKPOINTS
    assert shfl_jax.load(GOLDEN / "v2" / "unchosen")["topology"]["packed"]["kernel"].topology.chosen is not None
    assert STATES == ["v1"]
