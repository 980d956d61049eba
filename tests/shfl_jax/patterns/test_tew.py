"""TEW: tiles, and the best single weights of what the tiles have pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax import TEW, TW

SHAPE = (12, 16)
PATTERN = TEW(0.75, 4, restored=0.1)


@jax.jit
def run(scores, fraction):
    specs = {"layer": shfl_jax.LayerSpec("layer", (2, 16, 12), (0,), (1,), (2,), PATTERN)}
    counts = shfl_jax.allocate({"layer": scores}, specs, fraction, "global", min_share=0)["layer"]
    return counts, shfl_jax.mask(scores, PATTERN, counts), shfl_jax.mask(scores, TW(0.75, 4), counts.tiles)


def test_the_best_weights_of_both_slices_return_to_their_tiles():
    scores = np.random.default_rng(0).random((2, *SHAPE), np.float32) * np.array([[[1]], [[0.9]]], np.float32)
    for fraction, kept in ((0, 384), (0.5, 240), (1, 96)):
        counts, mask, tiles = run(scores, jnp.float32(fraction))
        mask, tiles = np.asarray(mask.elements()), np.asarray(tiles.elements())
        assert mask.sum() == kept
        np.testing.assert_array_equal(mask.sum((1, 2)), counts.weights)
        assert tiles.sum() == pytest.approx(kept - 38, abs=12)  # a tenth less, but for an output
        assert mask[tiles].all()
        # Restored over both slices together, by the weights' own scores.
        assert scores[mask & ~tiles].min() > scores[~mask].max(initial=0)
    assert len(set(counts.weights.tolist())) == 2
    assert run._cache_size() == 1


def test_nothing_holds_tiles_and_single_weights_so_the_layer_stays_dense():
    kernel = np.random.default_rng(2).random(SHAPE[::-1], np.float32)
    spec = shfl_jax.LayerSpec("kernel", kernel.shape, (), (0,), (1,), PATTERN)
    mask = shfl_jax.mask(jnp.asarray(kernel.T), PATTERN)
    assert int(mask.elements().sum()) == 48
    assert mask.group_size == PATTERN.group_size == 1
    sparse = shfl_jax.compress({"kernel": kernel}, shfl_jax.Masks({"kernel": mask}, (spec,)))
    assert sparse["topology"]["kernel"].dense_because == "tew is element-wise: no kernel"
    np.testing.assert_array_equal(sparse["params"]["kernel"], np.where(mask.elements(), kernel.T, 0).T)


@pytest.mark.parametrize("restored", [-0.1, 0.25, float("nan")])
def test_what_is_restored_is_less_than_what_is_kept(restored):
    with pytest.raises(ValueError, match=r"TEW's restored must lie in \[0, 1 - sparsity\) = \[0, 0.25\), got"):
        TEW(0.75, restored=restored)
