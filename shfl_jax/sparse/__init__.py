"""The compressed model: masks of a parameter tree, compression, checkpoints, reports."""

from shfl_jax.sparse._checkpoint import CheckpointError, load, save
from shfl_jax.sparse._compress import LayerTopology, compress, decompress, prepare
from shfl_jax.sparse._masks import Masks
from shfl_jax.sparse._report import report

__all__ = [
    "CheckpointError",
    "LayerTopology",
    "Masks",
    "compress",
    "decompress",
    "load",
    "prepare",
    "report",
    "save",
]
