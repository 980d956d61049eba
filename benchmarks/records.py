"""Results files, and what the programs that write them share: the command line, and going on until a time is over.

A results file holds the records of a program, and on what device, with what and when they were measured.
"""

import argparse
import datetime
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.compare import device

RESULTS = pathlib.Path(__file__).parent / "results"
T = TypeVar("T")


def read(path: pathlib.Path) -> dict[str, Any]:
    """A results file; without records where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": []}


def write(path: pathlib.Path, records: Sequence[Mapping[str, Any]], on: str | None = None) -> dict[str, Any]:
    """Writes a results file as a whole or not at all: measured today, on a device or this one. Returns its content."""
    made = {"device": on or device(), "jax": jax.__version__, "date": str(datetime.date.today())}
    document = made | {"records": list(records)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
    return document


def command_line(
    program: str,
    description: str | None,
    *,
    minutes: float | None = None,
    smoke: str | None = None,
    again: str | None = None,
    table: bool = False,
) -> argparse.ArgumentParser:
    """The command line of a program, with `--out` and some of the options that others have too.

    Args:
        program: name of its module in `benchmarks`.
        description: its docstring.
        minutes: default of `--minutes`, after which a program begins nothing new; None: it has no such option.
        smoke: what `--smoke` measures, a check of the program; None: as above.
        again: what `--again` measures anew; None: as above.
        table: whether there is `--table`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, help="the results file (default: that of this device)")
    if minutes is not None:
        text = "begin nothing new after this time (default: %(default)g)"
        parser.add_argument("--minutes", type=float, default=minutes, help=text)
    if smoke is not None:
        parser.add_argument("--smoke", action="store_true", help=f"{smoke}, to try the program; needs --out")
    if again is not None:
        parser.add_argument("--again", action="store_true", help=f"measure anew {again}")
    if table:
        parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    return parser


def output(parser: argparse.ArgumentParser, options: argparse.Namespace, suite: str) -> pathlib.Path:
    """The results file that the options name, or that of a suite on this device."""
    if getattr(options, "smoke", False) and options.out is None:
        parser.error("--smoke needs --out")
    return options.out or RESULTS / device() / f"{suite}.json"


def until(minutes: float, todo: Sequence[T], describe: Callable[[T], str]) -> Iterator[T]:
    """Yields what is to be measured, behind a progress bar, until the minutes are over."""
    deadline = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(todo))
        for item in todo:
            if time.monotonic() > deadline:
                break
            bar.update(task, description=describe(item))
            yield item
            bar.advance(task)
