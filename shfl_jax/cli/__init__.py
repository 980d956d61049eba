"""The command line: `shfl-jax COMMAND ...`."""

from shfl_jax.cli._main import main

__all__ = ["main"]
