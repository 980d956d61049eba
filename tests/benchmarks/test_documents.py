import json

import pytest

from benchmarks import documents

SPEC = {"file": "cpu/x.json", "where": {"op": ["a", "b"]}, "sort": ["t"], "columns": {"op": "{op}", "µs": "{t:.1f}"}}


@pytest.fixture
def results(tmp_path):
    (tmp_path / "cpu").mkdir()
    records = [{"op": "b", "t": 2.25}, {"op": "a", "t": 1}, {"op": "c", "t": 0}]
    (tmp_path / "cpu" / "x.json").write_text(json.dumps({"records": records}))
    return tmp_path


def test_table_selects_sorts_and_formats(results):
    assert documents.table(SPEC, results) == "| op | µs |\n| --- | --- |\n| a | 1.0 |\n| b | 2.2 |\n"


def test_the_fastest_record_of_each_kind(results):
    spec = SPEC | {"where": {}, "fastest_by": ["kind"], "columns": {"op": "{op}"}}
    records = [{"op": "slow", "kind": 1, "t": 2}, {"op": "fast", "kind": 1, "t": 1}, {"op": "other", "kind": 2, "t": 3}]
    records = [{**r, "time_us": r["t"]} for r in records]
    (results / "cpu" / "x.json").write_text(json.dumps({"records": records}))
    assert documents.table(spec, results).splitlines()[2:] == ["| fast |", "| other |"]
    columns = {"best": "{op}", "slow": "{slow[t]}", "fast": "{fast[t]}"}
    spec |= {"where": {"kind": 1}, "beside": "op", "columns": columns}
    assert documents.table(spec, results).splitlines()[2:] == ["| fast | 2 | 1 |"]


def test_fill_replaces_only_the_block_and_is_idempotent(results):
    text = f"before\n<!-- table {json.dumps(SPEC)} -->\nold\n<!-- end table -->\nafter\n"
    filled = documents.fill(text, results)
    assert filled.startswith("before\n<!-- table")
    assert filled.endswith("<!-- end table -->\nafter\n")
    assert "old" not in filled
    assert "| a | 1.0 |" in filled
    assert documents.fill(filled, results) == filled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "cpu/none.json"}, "does not exist"),
        ({"where": {"op": "z"}}, "no record"),
        ({"columns": {"op": "{missing}"}}, "missing"),
    ],
)
def test_errors_name_the_file_and_the_fault(results, change, message):
    with pytest.raises(ValueError, match=message):
        documents.table(SPEC | change, results)


def test_the_tables_of_this_project_are_up_to_date():
    assert documents.main(["--check"]) == 0
