"""The commands, and what `shfl-jax --help` says of them."""

import argparse
import sys
from collections.abc import Callable

from pallas_kernels import tune
from shfl_jax.cli import _prune, _report

COMMANDS: dict[str, tuple[str, Callable[[list[str] | None], int]]] = {
    "prune": ("prune a trained model in one shot, and save it compressed", _prune.main),
    "report": ("show the layers of a compressed checkpoint, and time them", _report.main),
    "tune": ("measure tile configs of the kernels on this GPU", tune.main),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        The exit status: 0 on success, 1 on a failure that was explained, 2 on wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="shfl-jax",
        description="Prune Flax models in patterns that really run faster, compress them, and see what it gives.",
        epilog="`shfl-jax COMMAND --help` explains a command.",
    )
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, _) in COMMANDS.items():
        choices.add_parser(name, help=summary, add_help=False)
    argv = sys.argv[1:] if argv is None else argv
    command = parser.parse_known_args(argv[:1])[0].command
    return COMMANDS[command][1](argv[1:])
