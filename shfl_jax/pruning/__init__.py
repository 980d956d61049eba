"""Pruning inside an Optax training loop: schedules, methods, losses, fine-tuning of compressed values."""

from shfl_jax.pruning._admm import ADMMMemory, admm, admm_penalty
from shfl_jax.pruning._finetune import compressed_state
from shfl_jax.pruning._losses import bits_per_token, distillation
from shfl_jax.pruning._masking import PruneState, choose_masks, keep_all, layer_kernels, zero_moments
from shfl_jax.pruning._prune import masks, prune, sparse_params
from shfl_jax.pruning._regrow import regrow
from shfl_jax.pruning._schedules import (
    LayerSchedule,
    RowSchedule,
    Schedule,
    Turn,
    constant,
    cubic,
    cubic_fraction,
    grow_and_prune,
    linear,
    one_shot,
    stages,
)
from shfl_jax.pruning._straight_through import straight_through

__all__ = [
    "ADMMMemory",
    "LayerSchedule",
    "PruneState",
    "RowSchedule",
    "Schedule",
    "Turn",
    "admm",
    "admm_penalty",
    "bits_per_token",
    "choose_masks",
    "compressed_state",
    "constant",
    "cubic",
    "cubic_fraction",
    "distillation",
    "grow_and_prune",
    "keep_all",
    "layer_kernels",
    "linear",
    "masks",
    "one_shot",
    "prune",
    "regrow",
    "sparse_params",
    "stages",
    "straight_through",
    "zero_moments",
]
