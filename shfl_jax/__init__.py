"""Sparsity patterns, masks and formats for Flax models that really run faster."""

from shfl_jax import linen
from shfl_jax.allocation import allocate, mask
from shfl_jax.layers import LayerSpec
from shfl_jax.masks import Mask, Masks
from shfl_jax.paths import path_leaves, update_paths
from shfl_jax.patterns import BW, NM, TW, VW, Pattern, ShflBW, Unstructured
from shfl_jax.plan import Plan

__all__ = [
    "BW",
    "NM",
    "TW",
    "VW",
    "LayerSpec",
    "Mask",
    "Masks",
    "Pattern",
    "Plan",
    "ShflBW",
    "Unstructured",
    "allocate",
    "linen",
    "mask",
    "path_leaves",
    "update_paths",
]
