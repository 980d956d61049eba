"""Sparsity patterns, masks and formats for Flax models that really run faster."""

from shfl_jax import linen
from shfl_jax.layers import LayerSpec
from shfl_jax.masks import Mask, Masks
from shfl_jax.paths import path_leaves, update_paths
from shfl_jax.plan import Plan

__all__ = ["LayerSpec", "Mask", "Masks", "Plan", "linen", "path_leaves", "update_paths"]
