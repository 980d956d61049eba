"""Saliency scores: how important every weight is."""

import jax
import jax.numpy as jnp


def magnitude(weight: jax.Array) -> jax.Array:
    """The magnitude of every weight: (..., M, K) floating in, (..., M, K) float32 out, whatever the precision."""
    return jnp.abs(weight).astype(jnp.float32)
