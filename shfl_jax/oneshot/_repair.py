"""Second-order reconstruction: new values for the kept weights, so that a layer's outputs change least.

Of all weights W' that a mask allows, the one is taken that minimises the squared error ||(W - W') X||^2 over the
calibration inputs X (K, tokens), plus a damping. For a row with kept columns S and H = X X^T + damping that is
w'[S] = w H[:, S] H[S, S]^-1, the joint solution of the problem that OBS (Hassibi and Stork) solves for one weight at a
time. Rows of a row group share S and hence the system, but conjugate gradients are still faster than factorising: they
take a few dozen products with H, for all rows and any pattern at once.
"""

import functools

import jax
import jax.numpy as jnp

from shfl_jax.patterns import Mask

HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames=("iterations",))
def repair(
    weight: jax.Array,
    mask: Mask,
    gram: jax.Array,
    *,
    damping: float = 0.01,
    tolerance: float = 1e-3,
    iterations: int = 200,
) -> jax.Array:
    """Recomputes the kept weights of one layer. Pure and of fixed shapes; memory is a few copies of the weight.

    Args:
        weight: (M, K) floating, the dense weights.
        mask: which of them are kept; any pattern's, without leading axes.
        gram: (K, K), X X^T over the calibration tokens.
        damping: added to the diagonal, as a fraction of its mean: the larger, the closer to the old weights. Positive.
        tolerance: of the residual, relative to that of the masked weights.
        iterations: the most products with H.

    Returns:
        (M, K) of the weight's dtype, zero where the mask prunes.

    Raises:
        ValueError: shapes disagree; the text names them.
    """
    if mask.shape != weight.shape or mask.kept.ndim != 2 or gram.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"a weight of shape {weight.shape} needs a mask of its shape and a square Gram matrix of its inputs, got "
            f"{mask.shape} and {gram.shape}"
        )
    kept, dense, gram = mask.elements(), weight.astype(jnp.float32), _damped(gram, damping)
    scale = 1 / jnp.diagonal(gram)  # the preconditioner

    def times(direction: jax.Array) -> jax.Array:
        return jnp.where(kept, jnp.matmul(direction, gram, precision=HIGHEST), 0)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=1, keepdims=True)

    # Solved for the change: w'[S] - w[S] = w[not S] H[not S, S] H[S, S]^-1. Every row has a system of its own.
    pull = times(jnp.where(kept, 0, dense))
    energy = dot(pull, pull * scale)
    goal = tolerance**2 * energy

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < iterations) & jnp.any(state[4] > goal)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, change, residual, direction, energy = state
        active = energy > goal
        image = times(direction)
        length = jnp.where(active, energy / jnp.where(active, dot(direction, image), 1), 0)
        residual -= length * image
        following = jnp.where(active, dot(residual, residual * scale), energy)
        ratio = jnp.where(active, following / jnp.where(active, energy, 1), 0)
        return count + 1, change + length * direction, residual, residual * scale + ratio * direction, following

    start = (jnp.int32(0), jnp.zeros_like(pull), pull, pull * scale, energy)
    change = jax.lax.while_loop(unfinished, step, start)[1]
    return jnp.where(kept, dense + change, 0).astype(weight.dtype)


def output_error(weight: jax.Array, repaired: jax.Array, gram: jax.Array) -> jax.Array:
    """The relative squared error of a layer's outputs, ||(W - W') X||^2 / ||W X||^2: float32 scalar.

    Args:
        weight: (M, K), W.
        repaired: (M, K), W'.
        gram: (K, K), X X^T.
    """

    def energy(w: jax.Array) -> jax.Array:
        w = w.astype(jnp.float32)
        return jnp.sum(jnp.matmul(w, gram, precision=HIGHEST) * w)

    whole = energy(weight)
    return jnp.where(whole > 0, energy(weight - repaired) / whole, 0)


def inverse_diagonal(gram: jax.Array, *, damping: float = 0.01) -> jax.Array:
    """The diagonal of the inverse of the damped Gram matrix (K, K): (K,) float32."""
    factor = jnp.linalg.cholesky(_damped(gram, damping))
    eye = jnp.eye(len(gram), dtype=jnp.float32)
    return jnp.sum(jax.scipy.linalg.solve_triangular(factor, eye, lower=True) ** 2, axis=0)


def _damped(gram: jax.Array, damping: float) -> jax.Array:
    gram = jnp.asarray(gram, jnp.float32)
    mean = jnp.mean(jnp.diagonal(gram))
    # Inputs that were always zero leave every weight as it is.
    return gram + jnp.where(mean > 0, damping * mean, 1) * jnp.eye(len(gram), dtype=jnp.float32)
