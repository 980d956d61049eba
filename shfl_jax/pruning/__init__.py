"""Pruning inside an Optax training loop: schedules, methods, losses, fine-tuning of compressed values."""

from shfl_jax.pruning._admm import ADMMMemory, admm, admm_penalty
from shfl_jax.pruning._finetune import compressed_state
from shfl_jax.pruning._losses import bits_per_token, distillation
from shfl_jax.pruning._masking import (
    PruneState,
    choose_masks,
    float32_like,
    hard,
    keep_all,
    layer_kernels,
    layers_of,
    search,
    soft,
    zero_moments,
)
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
    "float32_like",
    "grow_and_prune",
    "hard",
    "keep_all",
    "layer_kernels",
    "layers_of",
    "linear",
    "masks",
    "one_shot",
    "prune",
    "regrow",
    "search",
    "soft",
    "sparse_params",
    "stages",
    "straight_through",
    "zero_moments",
]
