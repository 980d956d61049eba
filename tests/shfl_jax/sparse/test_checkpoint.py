import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import shfl_jax
from shfl_jax import BW, NM, TW, VW, CheckpointError, LayerSpec, Mask, Masks, ShflBW, Unstructured
from shfl_jax.sparse._serialization import decode_spec, encode_spec


@pytest.fixture
def sparse():
    """A plain layer, a stacked bf16 one, one left dense, and another collection."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(8).astype(np.int32)
    kept = rng.random((3, 2, 6)) < np.array([0.2, 0.5, 0.9])[:, None, None]
    specs = (
        LayerSpec("mlp/kernel", (6, 8), (), (0,), (1,), ShflBW(0.5, group_size=4)),
        LayerSpec("stack/kernel", (3, 6, 8), (0,), (1,), (2,), VW(0.5, group_size=4)),
        LayerSpec("odd/kernel", (6, 8), (), (0,), (1,), NM(2, 4)),
    )
    masks = {
        "mlp/kernel": Mask(jnp.asarray(rows), jnp.asarray(kept[1]), 8),
        "stack/kernel": Mask(jnp.asarray(np.stack([rows, rows[::-1], rows])), jnp.asarray(kept), 8),
        "odd/kernel": Mask(jnp.arange(8, dtype=jnp.int32), jnp.asarray(rng.random((8, 6)) < 0.5), 8),
    }
    params = {
        "mlp": {"kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), "bias": jnp.ones(8)},
        "stack": {"kernel": jnp.asarray(rng.normal(size=(3, 6, 8)).astype(ml_dtypes.bfloat16))},
        "odd": {"kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)},
        "scale": jnp.float32(3),
    }
    return {**shfl_jax.compress(params, Masks(masks, specs), tokens=(16,)), "batch_stats": {"mean": jnp.arange(4.0)}}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)  # static halves too: specs, patterns, reasons, sizes
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype
        assert np.asarray(u).tobytes() == np.asarray(v).tobytes()


def test_a_checkpoint_gives_back_every_bit_and_replaces_an_older_one(tmp_path, sparse):
    path = tmp_path / "deep" / "model"
    shfl_jax.save(path, sparse)
    assert_same(shfl_jax.load(path), sparse)
    changed = {**sparse, "batch_stats": {"mean": jnp.arange(5.0)}}
    shfl_jax.save(str(path), changed)
    assert_same(shfl_jax.load(path), changed)
    assert len(list(path.iterdir())) == 2


def test_the_header_describes_layers_and_arrays(tmp_path, sparse):
    shfl_jax.save(tmp_path / "model", sparse)
    header = json.loads((tmp_path / "model" / "header.json").read_text())
    layer = header["layers"]["mlp/kernel"]
    assert (header["version"], layer["M"], layer["K"], layer["V"]) == (1, 8, 6, 4)
    assert layer["spec"]["pattern"]["name"] == "shfl_bw"
    assert layer["spec"]["pattern"]["sparsity"] == 0.5
    values = sparse["params"]["stack"]["kernel"]
    entry = header["arrays"]["params"]["stack/kernel"]
    assert (entry["shape"], entry["dtype"]) == (list(values.shape), "bfloat16")


def test_restoring_never_makes_a_dense_weight(tmp_path, monkeypatch):
    m, k, spec = 64, 96, LayerSpec("kernel", (96, 64), (), (0,), (1,), VW(0.75, group_size=32))
    mask = Mask(jnp.arange(64, dtype=jnp.int32), jnp.arange(96) < jnp.array([[20], [30]]), 64)
    sparse = shfl_jax.compress({"kernel": jnp.ones((k, m))}, Masks({"kernel": mask}, (spec,)))
    shfl_jax.save(tmp_path / "model", sparse)
    targets = []
    restore = ocp.StandardCheckpointer.restore

    def spy(self, directory, target, *args, **kwargs):
        targets.extend(jax.tree.leaves(target))
        return restore(self, directory, target, *args, **kwargs)

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", spy)
    before = {id(array) for array in jax.live_arrays()}
    loaded = shfl_jax.load(tmp_path / "model")
    assert len(targets) == 4
    assert max(target.size for target in targets) < m * k
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert made
    assert max(array.size for array in made) < m * k
    assert_same(loaded, sparse)


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(0.3),
        NM(1, 4),
        BW(0.5, 8),
        VW(0.5, 16, True, 0.2),
        ShflBW(0.5, 16, shards=2),
        TW(0.6, 32, outputs=False),
    ],
)
def test_specs_survive_json(pattern):
    spec = LayerSpec("a/kernel", (2, 3, 4), (0,), (1,), (2,), pattern)
    assert decode_spec(json.loads(json.dumps(encode_spec(spec)))) == spec


def test_unknown_patterns_and_fields_are_errors():
    encoded = encode_spec(LayerSpec("a/kernel", (3, 4), (), (0,), (1,), VW(0.5)))
    with pytest.raises(ValueError, match=r"unknown pattern 'later'.*'shfl_bw'.*update"):
        decode_spec({**encoded, "pattern": {"name": "later"}})
    with pytest.raises(ValueError, match="lacks a field or has a wrong one"):
        decode_spec({**encoded, "pattern": {"name": "vw", "colour": 1}})


def test_a_stopped_save_leaves_the_old_checkpoint(tmp_path, sparse, monkeypatch):
    path = tmp_path / "model"
    shfl_jax.save(path, sparse)

    def stop(*args):
        raise KeyboardInterrupt

    for target, name in ((ocp.StandardCheckpointer, "save"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            with pytest.raises(KeyboardInterrupt):
                shfl_jax.save(path, {**sparse, "batch_stats": {"mean": jnp.arange(9.0)}})
        assert_same(shfl_jax.load(path), sparse)
    shfl_jax.save(path, sparse)
    assert len(list(path.iterdir())) == 2  # what the stopped saves left is gone


def test_foreign_places_and_prepared_models_are_not_saved(tmp_path, sparse):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else"):
        shfl_jax.save(tmp_path, sparse)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for implementation in ("xla", "triton"):
        try:
            prepared = shfl_jax.prepare(sparse, implementation)
        except NotImplementedError:
            continue  # groups that Triton has no kernel for
        with pytest.raises(ValueError, match=r"mlp/kernel: .*not `prepare`"):
            shfl_jax.save(tmp_path / "model", prepared)
        with pytest.raises(ValueError, match=r"mlp/kernel: the model is prepared already"):
            shfl_jax.prepare(prepared)
    assert not (tmp_path / "model").exists()


def edit_header(path, edit, sign=True):
    """Rewrites a header, with a right checksum if `sign`."""
    from shfl_jax.sparse._checkpoint import _crc_of_header

    header = json.loads((path / "header.json").read_text())
    edit(header)
    if sign:
        header["crc32"] = _crc_of_header(header)
    (path / "header.json").write_text(json.dumps(header))


def test_damage_is_found_and_named(tmp_path, sparse):
    path = tmp_path / "model"

    def broken(text, damage):
        shfl_jax.save(path, sparse)
        damage()
        with pytest.raises(CheckpointError, match=text):
            shfl_jax.load(path)

    with pytest.raises(CheckpointError, match=r"nothing/header.json does not exist; give the directory"):
        shfl_jax.load(tmp_path / "nothing")
    broken(r"arrays\.\w+/\S+ is missing", lambda: shutil.rmtree(next(path.glob("arrays.*"))))
    broken(r"header.json is damaged", lambda: (path / "header.json").write_text('{"format": "shfl'))
    broken(r"header.json is no header", lambda: (path / "header.json").write_text("{}"))
    broken(
        r"header.json has format version 99, this library reads 1",
        lambda: edit_header(path, lambda h: h.update(version=99)),
    )
    broken(r"header.json has a wrong checksum", lambda: edit_header(path, lambda h: h.update(layers={}), sign=False))
    broken(
        r"arrays\.\w+ does not hold what the header says",
        lambda: edit_header(path, lambda h: h["arrays"]["topology"].pop("mlp/kernel/rows")),
    )
    broken(
        r"layer 'mlp/kernel' is damaged.*V=8",
        lambda: edit_header(path, lambda h: h["layers"]["mlp/kernel"].update(V=8)),
    )
    broken(
        r"layer 'mlp/kernel' is damaged.*rows must hold each of 0\.\.5",
        lambda: edit_header(path, lambda h: h["layers"]["mlp/kernel"]["spec"].update(shape=[6, 6])),
    )
    shfl_jax.save(path, sparse)
    assert_same(shfl_jax.load(path), sparse)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_every_truncated_or_changed_file_is_named(tmp_path, sparse, damage):
    shfl_jax.save(tmp_path, sparse)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        data = file.read_bytes()
        file.write_bytes(damage(data))
        with pytest.raises(CheckpointError, match=rf"{file.name} .*save the model again"):
            shfl_jax.load(tmp_path)
        file.write_bytes(data)
    assert_same(shfl_jax.load(tmp_path), sparse)
