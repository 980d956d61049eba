"""Results files: the records of a program and where, with what and when they were measured."""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from training.compare import device

RESULTS = pathlib.Path(__file__).parent / "results"


def write(path: pathlib.Path, records: Sequence[Mapping[str, Any]], origin: Mapping[str, Any] | None = None) -> None:
    """Writes a results file, measured on this device today unless `origin`, another file's content, says otherwise."""
    made = {"device": device(), "jax": jax.__version__, "date": str(datetime.date.today())}
    document = {name: (origin or made)[name] for name in made} | {"records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
