"""Losses: bits of language models, and learning from a teacher."""

import math

import jax
import jax.numpy as jnp
import optax


def bits_per_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in bits, mean over the last axis of tokens.

    Args:
        logits: (..., tokens, vocab) floating.
        targets: (..., tokens) integer.

    Returns:
        (...,) float32.
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return nats.mean(-1) / math.log(2)


def distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    task_loss: jax.Array | float = 0.0,
    *,
    temperature: float = 2.0,
    weight: float = 0.5,
) -> jax.Array:
    """A task's loss, and the student's divergence from a teacher, such as the dense model that is pruned.

    weight * T^2 * KL(teacher || student) + (1 - weight) * task_loss, the divergence in nats at temperature T (Hinton et
    al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531). The factor T^2 keeps its gradient from
    fading as T grows. No gradient reaches the teacher.

    Args:
        logits: (..., classes) floating, the student's.
        teacher_logits: (..., classes) floating.
        task_loss: the student's own loss: a scalar, or an array that broadcasts with (...,).
        temperature: T, above 0.
        weight: of the divergence, in [0, 1].

    Returns:
        (...,) float32: the mean is left to the caller.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive or a weight outside [0, 1].
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must have logits of one shape, got {logits.shape}, {teacher_logits.shape}"
        )
    if not temperature > 0 or not 0 <= weight <= 1:
        raise ValueError(f"need temperature > 0 and weight in [0, 1], got temperature={temperature}, weight={weight}")
    ours, theirs = (
        jax.nn.log_softmax(scores.astype(jnp.float32) / temperature)
        for scores in (logits, jax.lax.stop_gradient(teacher_logits))
    )
    # A class that the teacher rules out (a logit of -inf) adds nothing, whatever the student's logit is.
    chances = jnp.exp(theirs)
    divergence = jnp.sum(jnp.where(chances > 0, chances * (theirs - ours), 0), axis=-1)
    return weight * temperature**2 * divergence + (1 - weight) * jnp.asarray(task_loss, jnp.float32)
