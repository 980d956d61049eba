"""Programs that train sparse models: training loops, tasks, the accuracy record and the demo. Not installed.

The pruning methods that were here are `shfl_jax.pruning`, in the wheel: `training.prune` is `shfl_jax.pruning.prune`.
"""

__all__: list[str] = []
