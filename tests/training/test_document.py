"""The code of the documents runs, block after block."""

import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run(document):
    """The names that all blocks of a document leave behind."""
    text = (DOCS / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names = {"__name__": "document"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{document}, block {number}", "exec"), names)
    return names


def test_the_examples_of_training_run():
    names = run("training.md")
    assert names["logits"].shape == (32, 8)
    assert names["fast"](names["x"]).shape == (32, 8)
    assert names["loss_with_teacher"](names["params"]) > 0


def test_the_examples_of_extending_run(registry, capsys):
    names = run("extending.md")
    np.testing.assert_allclose(names["y"], names["x"] @ names["found"].params["hidden"]["kernel"], rtol=1e-5, atol=1e-5)
    assert names["loaded"]["topology"]["hidden"]["kernel"].spec.pattern == names["Columns"](0.75, spared=4)
    kept = np.asarray(names["found"].masks["hidden/kernel"].kept)
    assert kept[:, :4].all()
    assert kept.mean() == 0.25
    said = capsys.readouterr().out
    assert "columns" in said
    assert "it takes 16 tokens or more, got 3" in said
    assert np.mean(np.asarray(names["trained"]["hidden"]["kernel"]) == 0) == pytest.approx(0.75, abs=0.001)
