"""Losses of language models."""

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
