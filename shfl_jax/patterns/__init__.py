"""Sparsity patterns: which weights may be pruned together, how many a layer keeps, and which."""

from shfl_jax.patterns._allocation import ALLOCATIONS, alike, all_units, allocate, kept_units, mask, to_sparsities
from shfl_jax.patterns._base import Pattern
from shfl_jax.patterns._block import BW
from shfl_jax.patterns._groups import Vectors, group_scores, padded_rows
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._nm import NM
from shfl_jax.patterns._ranking import rank_keys, scaled, top
from shfl_jax.patterns._registry import register, registered, registered_name
from shfl_jax.patterns._scores import magnitude, obs, taylor, wanda
from shfl_jax.patterns._shuffled import ShflBW
from shfl_jax.patterns._tile import TW
from shfl_jax.patterns._tile_element import TEW
from shfl_jax.patterns._two_four import TVW, ShflTVW
from shfl_jax.patterns._unstructured import Unstructured
from shfl_jax.patterns._vector import VW

__all__ = [
    "ALLOCATIONS",
    "BW",
    "NM",
    "TEW",
    "TVW",
    "TW",
    "VW",
    "Mask",
    "Pattern",
    "ShflBW",
    "ShflTVW",
    "Unstructured",
    "Vectors",
    "alike",
    "all_units",
    "allocate",
    "group_scores",
    "kept_units",
    "magnitude",
    "mask",
    "obs",
    "padded_rows",
    "rank_keys",
    "register",
    "registered",
    "registered_name",
    "scaled",
    "taylor",
    "to_sparsities",
    "top",
    "wanda",
]
