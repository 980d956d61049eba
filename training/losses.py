"""Losses of language models."""

import math

import jax
import jax.numpy as jnp
import optax


def bits_per_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross entropy in bits: logits (..., vocab) floating, targets (...) integer, float32 scalar."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return nats.mean() / math.log(2)
