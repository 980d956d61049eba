"""Sparsity patterns, masks and formats for Flax models that really run faster."""

from shfl_jax import linen, nnx
from shfl_jax.allocation import allocate, mask
from shfl_jax.checkpoint import CheckpointError, load, save
from shfl_jax.compress import LayerTopology, compress, decompress, prepare
from shfl_jax.layers import LayerSpec
from shfl_jax.masks import Mask, Masks
from shfl_jax.one_shot import OneShot, prune_one_shot
from shfl_jax.paths import path_leaves, update_paths
from shfl_jax.patterns import BW, NM, TEW, TVW, TW, VW, Pattern, ShflBW, ShflTVW, Unstructured
from shfl_jax.plan import Plan
from shfl_jax.report import report
from shfl_jax.sensitivity import Sensitivity, sensitivity

__all__ = [
    "BW",
    "NM",
    "TEW",
    "TVW",
    "TW",
    "VW",
    "CheckpointError",
    "LayerSpec",
    "LayerTopology",
    "Mask",
    "Masks",
    "OneShot",
    "Pattern",
    "Plan",
    "Sensitivity",
    "ShflBW",
    "ShflTVW",
    "Unstructured",
    "allocate",
    "compress",
    "decompress",
    "linen",
    "load",
    "mask",
    "nnx",
    "path_leaves",
    "prepare",
    "prune_one_shot",
    "report",
    "save",
    "sensitivity",
    "update_paths",
]
