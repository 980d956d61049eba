"""Pruning a trained model without training it: calibration, scores, repair, sensitivity."""

from shfl_jax.oneshot._prune import SCORES, OneShot, PrunedLayer, prune_one_shot
from shfl_jax.oneshot._sensitivity import Sensitivity, sensitivity

__all__ = ["SCORES", "OneShot", "PrunedLayer", "Sensitivity", "prune_one_shot", "sensitivity"]
