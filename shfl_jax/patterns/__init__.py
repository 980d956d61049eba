"""Sparsity patterns: which weights may be pruned together, and which of them are kept."""

from shfl_jax.patterns.base import Pattern
from shfl_jax.patterns.block import BW
from shfl_jax.patterns.nm import NM
from shfl_jax.patterns.shuffled import ShflBW
from shfl_jax.patterns.tile import TW
from shfl_jax.patterns.tile_element import TEW
from shfl_jax.patterns.tvw import TVW, ShflTVW
from shfl_jax.patterns.unstructured import Unstructured
from shfl_jax.patterns.vector import VW

__all__ = ["BW", "NM", "TEW", "TVW", "TW", "VW", "Pattern", "ShflBW", "ShflTVW", "Unstructured"]
