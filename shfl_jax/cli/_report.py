"""`shfl-jax report`: the layers of a compressed checkpoint."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from shfl_jax.sparse import load, report


def main(argv: list[str] | None = None) -> int:
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
