"""From a model to its layers: plans, traced axes, and the adapters that run Linen and NNX models compressed."""

from shfl_jax.models import linen, nnx
from shfl_jax.models._pieces import Piece, cut
from shfl_jax.models._plan import Plan

__all__ = ["Piece", "Plan", "cut", "linen", "nnx"]
