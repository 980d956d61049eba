"""Training sparse models: pruning schedules, Optax transformations, training loops and the demo."""

from training.prune import PruneState, masks, prune, sparse_params
from training.schedules import Schedule, cubic, one_shot

__all__ = ["PruneState", "Schedule", "cubic", "masks", "one_shot", "prune", "sparse_params"]
