"""The compressed model: masks of a parameter tree, compression, checkpoints, reports."""

from shfl_jax.sparse._checkpoint import CheckpointError, load, save
from shfl_jax.sparse._compress import CompressedLayer, compress, compress_kernel, decompress, layers, matrices, prepare
from shfl_jax.sparse._masks import Masks
from shfl_jax.sparse._report import report

__all__ = [
    "CheckpointError",
    "CompressedLayer",
    "Masks",
    "compress",
    "compress_kernel",
    "decompress",
    "layers",
    "load",
    "matrices",
    "prepare",
    "report",
    "save",
]
