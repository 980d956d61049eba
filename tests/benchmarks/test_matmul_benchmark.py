import json

from benchmarks import matmul


def test_only_the_chosen_cases_are_forgotten(tmp_path):
    first, second = matmul.ACCEPTANCE[:2]
    out = tmp_path / "matmul.json"
    matmul.forget(out, [first])
    assert not out.exists()
    out.write_text(json.dumps({"records": [{"case": matmul.key_of(case)} for case in (first, second)]}))
    matmul.forget(out, [first])
    assert json.loads(out.read_text())["records"] == [{"case": matmul.key_of(second)}]
