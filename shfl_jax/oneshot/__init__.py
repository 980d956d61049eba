"""Pruning a trained model without training it: calibration, scores, repair, sensitivity."""

from shfl_jax.oneshot._prune import OneShot, prune_one_shot
from shfl_jax.oneshot._sensitivity import Sensitivity, sensitivity

__all__ = ["OneShot", "Sensitivity", "prune_one_shot", "sensitivity"]
