"""Sparsity patterns, masks and formats for Flax models that really run faster."""

from shfl_jax import patterns, pruning
from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.models import Plan, linen, nnx
from shfl_jax.oneshot import OneShot, Sensitivity, prune_one_shot, sensitivity
from shfl_jax.patterns import (
    BW,
    NM,
    TEW,
    TVW,
    TW,
    VW,
    Mask,
    Pattern,
    ShflBW,
    ShflTVW,
    Unstructured,
    allocate,
    mask,
)
from shfl_jax.sparse import (
    CheckpointError,
    CompressedLayer,
    Masks,
    compress,
    decompress,
    load,
    prepare,
    report,
    save,
)

__all__ = [
    "BW",
    "NM",
    "TEW",
    "TVW",
    "TW",
    "VW",
    "CheckpointError",
    "CompressedLayer",
    "LayerSpec",
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
    "patterns",
    "prepare",
    "prune_one_shot",
    "pruning",
    "report",
    "save",
    "sensitivity",
    "update_paths",
]
