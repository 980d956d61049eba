import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_examples_of_the_document_run():
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names = {"__name__": "document"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{DOCUMENT.name}, block {number}", "exec"), names)
    assert names["logits"].shape == (32, 8)
    assert names["fast"](names["x"]).shape == (32, 8)
    assert names["loss_with_teacher"](names["params"]) > 0
