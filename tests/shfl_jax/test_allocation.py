import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax


def spec(path, shape, pattern, batch=0):
    axes = tuple(range(len(shape)))
    return shfl_jax.LayerSpec(path, shape, axes[:batch], (axes[batch],), (axes[batch + 1],), pattern)


SPECS = {
    "a": spec("a", (12, 16), shfl_jax.VW(0.5, 4)),
    "b": spec("b", (3, 8, 10), shfl_jax.Unstructured(0.9), batch=1),
}
SCORES = {"a": jnp.ones((16, 12)), "b": jnp.ones((3, 10, 8))}


def test_uniform_meets_every_sparsity_and_follows_a_traced_fraction():
    counts = shfl_jax.allocate(SCORES, SPECS)
    assert {path: int(c) for path, c in counts.items()} == {"a": 24, "b": 8}
    half = jax.jit(lambda s, f: shfl_jax.allocate(s, SPECS, f))(SCORES, 0.5)
    assert {path: int(c) for path, c in half.items()} == {"a": 36, "b": 44}
    masks = {path: shfl_jax.mask(s, SPECS[path].pattern, counts[path]) for path, s in SCORES.items()}
    np.testing.assert_allclose(masks["b"].density(), [0.1] * 3, rtol=1e-6)


def test_errors_name_the_layer():
    with pytest.raises(ValueError, match="unknown allocation method 'magic'"):
        shfl_jax.allocate(SCORES, SPECS, method="magic")
    with pytest.raises(ValueError, match="c: scores without a spec"):
        shfl_jax.allocate({"c": SCORES["a"]}, SPECS)
    with pytest.raises(ValueError, match=r"a: scores of shape \(12, 16\)"):
        shfl_jax.allocate({"a": SCORES["a"].T}, SPECS)
