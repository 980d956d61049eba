"""The unit that scores are in does not matter: scores times a power of two have the same mask, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax import BW, NM, TEW, TVW, TW, VW, ShflBW, ShflTVW, Unstructured
from shfl_jax.patterns import _ranking as ranking

SHAPE = (14, 18)
EXPONENTS = np.array([0, 1, -1, -40, -63, -75, -120, 40, 63, 75, 124])
PATTERNS = [
    Unstructured(0.75),
    NM(),
    BW(0.75, 4),
    VW(0.75, 4),
    ShflBW(0.75, 4),
    TW(0.75, 4),
    TEW(0.75, 4, restored=0.05),
    TVW(0.75, 4),
    ShflTVW(0.75, 4),
]


def scaled_copies(shape=SHAPE, seed=0):
    """Numbers in [2^-6, 4) times 2^-120 to 2^124, which float32 holds without loss."""
    scores = np.random.default_rng(seed).integers(1, 256, shape) / 64
    return jnp.asarray(np.ldexp(scores, EXPONENTS.reshape(-1, *[1] * len(shape))), jnp.float32)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_the_same_mask_for_scores_times_any_power_of_two(pattern):
    masks = shfl_jax.mask(scaled_copies(), pattern)
    for array in jax.tree.leaves(masks):
        np.testing.assert_array_equal(array, jnp.broadcast_to(array[0], array.shape))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_scores_of_zero_have_a_mask(pattern):
    mask = shfl_jax.mask(jnp.zeros((len(EXPONENTS), *SHAPE)), pattern)  # of the shape above: one program for both
    kept = mask.elements().sum((1, 2))
    assert (kept > 0).all()
    assert (kept < np.prod(SHAPE)).all()


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.name not in ("tvw", "shfl_tvw")], ids=lambda p: p.name)
def test_layers_that_are_ranked_together_share_one_factor(pattern):
    copies = {path: scaled_copies(seed=seed) for path, seed in (("a", 1), ("b", 2))}
    specs = {path: shfl_jax.LayerSpec(path, SHAPE, (), (1,), (0,), pattern) for path in copies}

    @jax.jit
    def run(scores):
        return shfl_jax.allocate(scores, specs, method="global")

    found = [run({"a": a / 2, "b": b}) for a, b in zip(*copies.values(), strict=True)]
    leaves = [jax.tree.leaves(counts) for counts in found]
    assert all(each == leaves[0] for each in leaves)
    if pattern.name != "nm":  # which has one sparsity
        assert jax.tree.leaves(found[0]["a"]) != jax.tree.leaves(found[0]["b"])


def test_normalised_scores():
    a, b = ranking.normalised([jnp.array([0.0, 2e-30]), jnp.array([[1e-30]], jnp.bfloat16)])
    assert a.dtype == b.dtype == jnp.float32
    assert a[0] == 0
    assert 2**24 <= a[1] < 2**25
    assert float(b[0, 0] / a[1]) == pytest.approx(0.5, rel=1e-2)
    assert not ranking.normalised(jnp.zeros(3)).any()
