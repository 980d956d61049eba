"""The tasks of the accuracy record, one module each."""

from collections.abc import Callable

from training.tasks import digits, shapes, topics, translation
from training.tasks.task import Recipe, Task

TASKS: dict[str, Callable[[bool], Task]] = {
    "digits": digits.task,
    "topics": topics.task,
    "translation": translation.task,
    "shapes": shapes.task,
}
"""Name -> what builds the task; its argument asks for a tiny version."""

__all__ = ["TASKS", "Recipe", "Task"]
