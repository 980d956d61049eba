"""The command line: `shfl-jax COMMAND ...`.

A command is an entry point of the group `shfl_jax.commands`: a function `main(argv: list[str] | None) -> int`, whose
module says in its first line what it does. So commands of higher packages need no import from here.
"""

import argparse
import ast
import importlib.util
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from rich.console import Console

from shfl_jax.checkpoint import load
from shfl_jax.report import report

GROUP = "shfl_jax.commands"


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        The exit status: 0 on success, 1 on a failure that was explained, 2 on wrong usage.
    """
    commands = {point.name: point for point in entry_points(group=GROUP)}
    parser = argparse.ArgumentParser(
        prog="shfl-jax",
        description="Prune Flax models in patterns that really run faster, compress them, and see what it gives.",
        epilog="Start with `shfl-jax demo`. `shfl-jax COMMAND --help` explains a command.",
    )
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    choices.add_parser("report", help="show the layers of a compressed checkpoint, and time them", add_help=False)
    for name, point in sorted(commands.items()):
        choices.add_parser(name, help=_summary(point), add_help=False)
    argv = sys.argv[1:] if argv is None else argv
    chosen, rest = parser.parse_known_args(argv[:1])[0].command, argv[1:]
    return report_command(rest) if chosen == "report" else int(commands[chosen].load()(rest) or 0)


def report_command(argv: list[str] | None = None) -> int:
    """Prints the report of a checkpoint.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        0, or 1 if the checkpoint cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="shfl-jax report",
        description="Shows every masked layer of a compressed checkpoint: pattern, sparsity, bytes, and how it runs.",
        epilog="Example: shfl-jax report runs/demo/shfl_bw --tokens 16 4096",
    )
    parser.add_argument("checkpoint", type=Path, help="a directory that shfl_jax.save wrote")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="also measure every layer against dense on this machine, for N tokens at a time (batch x sequence length)",
    )
    options = parser.parse_args(argv)
    try:
        Console().print(report(load(options.checkpoint), options.tokens))
    except ValueError as error:
        print(f"shfl-jax report: {error}", file=sys.stderr)
        return 1
    return 0


def _summary(point: EntryPoint) -> str:
    """The first line of the docstring of a command's module, without running the module."""
    spec = importlib.util.find_spec(point.module)
    if spec is None or spec.origin is None:
        return ""
    document = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return document.partition("\n")[0].replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
