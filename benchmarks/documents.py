"""Fills the tables of the documents from the results files, so that no number is typed by hand.

A document holds a block of this form, and `python -m benchmarks.documents` writes what stands between the two lines:

    <!-- table {"file": "cpu/demo.json", "columns": {"pattern": "{pattern}", "speed-up": "{speedup:.2f}"}} -->
    <!-- end table -->

`file` lies under `benchmarks/results`; `where` keeps the records whose keys
have these values (a list: one of them); `columns` maps headings to `str.format` templates over a record; `sort`, a list
of keys, orders the rows; `fastest_by`, a list of keys, keeps of the records that agree in them the one with the least
time. With `beside`, a key, a row holds all of these records, each by its value of that key: with "implementation",
`{triton[time_us]}` is the time of Triton's record.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(?P<open><!-- table (?P<spec>\{.*?\}) -->\n)(?P<body>.*?)(?P<close><!-- end table -->)", re.DOTALL)


def table(spec: Mapping[str, Any], results: Path = RESULTS) -> str:
    """Renders one table as Markdown.

    Args:
        spec: what the block's comment holds, see the module.
        results: the folder of the results files.

    Raises:
        ValueError: the file is missing, no record fits, or a record lacks a key that a column shows.
    """
    path = results / spec["file"]
    if not path.is_file():
        raise ValueError(f'{path} does not exist; run the benchmark that writes it, or correct the block\'s "file"')
    records = [r for r in json.loads(path.read_text())["records"] if _fits(r, spec.get("where", {}))]
    if by := spec.get("fastest_by"):
        alike: dict[tuple, list[dict[str, Any]]] = {}
        for record in sorted(records, key=lambda r: r["time_us"]):
            alike.setdefault(tuple(record[key] for key in by), []).append(record)
        beside = spec.get("beside")
        records = [some[0] | ({r[beside]: r for r in reversed(some)} if beside else {}) for some in alike.values()]
    if not records:
        raise ValueError(f"{path} has no record with {spec.get('where')}; run the benchmark or correct the block")
    records.sort(key=lambda r: [_order(r.get(key)) for key in spec.get("sort", ())])
    columns = spec["columns"]
    try:
        rows = [[template.format(**r) for template in columns.values()] for r in records]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: a record does not fit the columns {list(columns.values())}: {error!r}") from error
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def fill(text: str, results: Path = RESULTS) -> str:
    """Returns a document with all of its tables written anew."""
    return BLOCK.sub(lambda m: m["open"] + table(json.loads(m["spec"]), results) + m["close"], text)


def _fits(record: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(
        record.get(key) in wanted if isinstance(wanted, list) else record.get(key) == wanted
        for key, wanted in where.items()
    )


def _order(value: Any) -> tuple[bool, float, str]:
    return (value is None, value if isinstance(value, int | float) else 0.0, str(value))


def main(argv: Iterable[str] | None = None) -> int:
    """Writes the tables of README.md and docs/*.md; with --check only says which are out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    args = parser.parse_args(None if argv is None else list(argv))
    stale = 0
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        filled = fill(text)
        if filled != text:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'written'}")
            if not args.check:
                path.write_text(filled)
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
