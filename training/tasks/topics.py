"""The help topics of Python, character by character, and a small GPT."""

from typing import Any

import jax
import jax.numpy as jnp

from shfl_jax.pruning import bits_per_token
from training import text
from training.gpt import GPT
from training.loop import sample_windows
from training.tasks.task import Recipe, Task

RECIPE = Recipe(32, 800, 1000, 50, 2e-3, weight_decay=0.1, dropout=0.2)
"""How all models are trained; see docs/accuracy.md for how it was chosen."""


def task(smoke: bool = False) -> Task:
    """The task; `smoke` makes a tiny one of it, to try the program."""
    content = text.topics()
    vocab = len(content.alphabet)
    if smoke:
        model = GPT(vocab, 16, 32, 1, 2, 64)
    else:
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        model = GPT(vocab, 128, 256, 4, 4, 256, RECIPE.dropout, dtype)
    windows = text.windows(content.validation, model.context)
    test_batch = 16 if smoke else 64
    windows = windows[: 16 if smoke else len(windows) // test_batch * test_batch]

    def draw(data: Any, key: jax.Array, batch: int) -> dict[str, jax.Array]:
        return {"windows": sample_windows(data["codes"], key, batch, model.context)}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, batch["windows"][:, :-1], True, rngs={"dropout": key})
        return bits_per_token(jnp.asarray(logits), batch["windows"][:, 1:]).mean()

    def evaluate(apply: Any, batch: Any) -> dict[str, jax.Array]:
        logits = apply(batch["windows"][:, :-1])
        targets = batch["windows"][:, 1:]
        right = (logits.argmax(-1) == targets).mean(dtype=jnp.float32)
        return {"bits_per_char": bits_per_token(logits, targets).mean(), "character_accuracy": right}

    return Task(
        name="topics",
        measure="bits_per_char",
        higher=False,
        model=model,
        example=(jnp.zeros((1, model.context), jnp.int32),),
        pruned=r"(.*/)?(mlp|attn)/.*",
        recipe=Recipe(4, 4, 4, 2, 1e-3) if smoke else RECIPE,
        train={"codes": content.train},
        test={"windows": windows},
        test_batch=test_batch,
        draw=draw,
        loss=loss,
        evaluate=evaluate,
    )
