"""Training sparse models: pruning schedules, Optax transformations, training loops and the demo."""

from training.admm import ADMMMemory, admm, admm_penalty
from training.finetune import compressed_state
from training.losses import distillation
from training.masking import PruneState
from training.prune import masks, prune, sparse_params
from training.regrow import regrow
from training.schedules import (
    LayerSchedule,
    RowSchedule,
    Schedule,
    Turn,
    constant,
    cubic,
    grow_and_prune,
    linear,
    one_shot,
    stages,
)
from training.straight_through import straight_through

__all__ = [
    "ADMMMemory",
    "LayerSchedule",
    "PruneState",
    "RowSchedule",
    "Schedule",
    "Turn",
    "admm",
    "admm_penalty",
    "compressed_state",
    "constant",
    "cubic",
    "distillation",
    "grow_and_prune",
    "linear",
    "masks",
    "one_shot",
    "prune",
    "regrow",
    "sparse_params",
    "stages",
    "straight_through",
]
