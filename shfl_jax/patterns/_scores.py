"""Saliency scores: how important every weight is."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves


def magnitude(weight: jax.Array) -> jax.Array:
    """The magnitude of every weight: (..., M, K) floating in, (..., M, K) float32 out, whatever the precision."""
    return jnp.abs(weight).astype(jnp.float32)


def wanda(weight: jax.Array, norms: jax.Array) -> jax.Array:
    """Magnitude times the norm of the input that the weight reads (Wanda, Sun et al., ICLR 2024).

    Args:
        weight: (..., M, K) floating.
        norms: (..., K), L2 norm of every input feature over the calibration tokens.

    Returns:
        (..., M, K) float32.
    """
    return magnitude(weight) * norms[..., None, :].astype(jnp.float32)


def obs(weight: jax.Array, inverse_diagonal: jax.Array) -> jax.Array:
    """The output error that pruning a weight causes once the others are repaired (Optimal Brain Surgeon), as a root.

    The root, |w| / sqrt([H^-1]_kk), is on the scale of a magnitude, so that sums over a unit compare with `wanda`'s.

    Args:
        weight: (..., M, K) floating.
        inverse_diagonal: (..., K), the diagonal of the inverse Gram matrix of the inputs.

    Returns:
        (..., M, K) float32.
    """
    return magnitude(weight) * jax.lax.rsqrt(inverse_diagonal)[..., None, :].astype(jnp.float32)


def taylor(
    loss: Callable[..., jax.Array], params: Any, specs: Mapping[str, LayerSpec], batches: Iterable[Any]
) -> dict[str, jax.Array]:
    """First-order Taylor scores: (gradient times weight)^2, summed over batches.

    Args:
        loss: `loss(params, *batch)`, a scalar.
        params: the parameter tree.
        specs: path -> spec of the layers to score.
        batches: each a tuple of positional arguments, or one array. Only one is held at a time.

    Returns:
        path -> (..., M, K) float32.

    Raises:
        ValueError: no batch, or a gradient with NaN or inf; the text names the layer and the batch.
    """

    @jax.jit
    def add(
        total: dict[str, jax.Array], params: Any, batch: tuple[Any, ...]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        gradients = path_leaves(jax.grad(loss)(params, *batch))
        weights = path_leaves(params)
        for path in specs:
            total[path] += (gradients[path].astype(jnp.float32) * weights[path].astype(jnp.float32)) ** 2
        return total, {path: jnp.isfinite(total[path]).all() for path in specs}

    total = {path: jnp.zeros(spec.shape, jnp.float32) for path, spec in specs.items()}
    number = -1
    for number, batch in enumerate(batches):
        total, finite = add(total, params, batch if isinstance(batch, tuple) else (batch,))
        bad = [path for path, ok in finite.items() if not ok]
        if bad:
            raise ValueError(
                f"{bad[0]} {specs[bad[0]].shape}: NaN or inf in the gradient of batch {number}; look at that batch"
            )
    if number < 0:
        raise ValueError("Taylor scores need at least one batch; `batches` yielded none")
    return {path: specs[path].to_matrix(score) for path, score in total.items()}
