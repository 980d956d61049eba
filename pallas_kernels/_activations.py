"""The activations that an epilogue may compute, by name."""

import math
from collections.abc import Callable

import jax

ACTIVATIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {
    None: lambda y: y,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
"""Exact ones; "gelu" is the tanh approximation."""

GELU = (math.sqrt(2 / math.pi), 0.044715 * math.sqrt(2 / math.pi))
"""gelu(y) = y / 2 (1 + tanh(a y + b y^3)), for kernels whose tanh is one instruction."""
