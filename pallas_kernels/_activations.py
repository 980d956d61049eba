"""The activations that an epilogue may compute, by name."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda y: y,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
"""Exact ones; "gelu" is the tanh approximation."""

GELU = (math.sqrt(2 / math.pi), 0.044715 * math.sqrt(2 / math.pi))
"""gelu(y) = y / 2 (1 + tanh(a y + b y^3)), for kernels whose tanh is one instruction."""


def activate(name: str | None, y: jax.Array) -> jax.Array:
    """An activation of an array of any floating dtype, computed in float32 or wider: GELU's cube overflows float16."""
    return ACTIVATIONS[name](_widened(y)).astype(y.dtype)


def activation_gradient(name: str | None, y: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient by y of `activate(name, y)` whose own is dy, computed in float32 or wider."""
    return jax.vjp(ACTIVATIONS[name], _widened(y))[1](_widened(dy))[0].astype(dy.dtype)


def _widened(y: jax.Array) -> jax.Array:
    return y.astype(jnp.promote_types(y.dtype, jnp.float32))
