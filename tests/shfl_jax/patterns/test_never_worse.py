"""A searched mask never keeps less than what its search starts from: 200 matrices of four kinds, and orders of 2:4."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax import TVW, VW, ShflBW, ShflTVW
from shfl_jax.patterns import padded_rows
from shfl_jax.patterns.search import _fours as fours
from training import bert

SHAPE, V, EACH = (22, 18), 4, 50
RELATIVE = 1 + 1e-6  # what float32 sums may be off
installed = all(importlib.util.find_spec(name) for name in (bert.PACKAGE, "safetensors", "tokenizers"))


def matrices(kind):
    """Scores (EACH, M, K), float32."""
    m, k = SHAPE
    rng = np.random.default_rng(len(kind))
    if kind == "random":
        scores = rng.standard_normal((EACH, m, k))
    elif kind == "log-normal rows":
        scores = rng.standard_normal((EACH, m, k)) * np.exp(rng.standard_normal((EACH, m, 1)))
    elif kind == "planted clusters":
        supports = rng.random((EACH, 5, k)) < 0.4
        member = rng.integers(0, 5, (EACH, m))
        scores = (0.1 + np.take_along_axis(supports, member[:, :, None], 1)) * rng.standard_normal((EACH, m, k))
    else:
        weights = jax.tree.leaves(bert.load()[1])
        large = [np.asarray(w) for w in weights if w.ndim == 2 and min(w.shape) > 64][:10]
        scores = [w[i * m : (i + 1) * m, i * k : (i + 1) * k] for w in large for i in range(EACH // len(large))]
    return jnp.asarray(np.abs(scores), jnp.float32)


@functools.partial(jax.jit, static_argnames=("pattern", "against"))
def kept_by_both(scores, pattern, against):
    """What the pattern keeps, and what another keeps, or the pattern with rows in order: two (EACH,) float32."""

    def both(scores):
        count = pattern.count(SHAPE)
        if against is None:
            other = pattern.mask_of_rows(scores, padded_rows(SHAPE[0], V), count)
        else:
            other = against.mask(scores, count)
        return [jnp.where(mask.elements(), scores, 0).sum() for mask in (pattern.mask(scores, count), other)]

    return jax.lax.map(both, scores)


KINDS = ["random", "planted clusters", "log-normal rows"]
PRETRAINED = pytest.param("pretrained", marks=pytest.mark.skipif(not installed, reason="the encoder is not installed"))


@pytest.mark.parametrize("kind", [*KINDS, PRETRAINED])
def test_a_searched_mask_keeps_no_less_than_rows_in_order(kind):
    scores = matrices(kind)
    assert scores.shape == (EACH, *SHAPE)
    for pattern, against in [(ShflBW(0.75, V), VW(0.75, V)), (ShflTVW(0.75, V), None)]:
        kept, in_order = kept_by_both(scores, pattern, against)
        assert (kept * RELATIVE >= in_order).all()
        assert kept.sum() > in_order.sum()


@pytest.mark.parametrize("pattern", [TVW(0.5, V), TVW(0.5, V, outputs=False), ShflTVW(0.5, V)], ids=repr)
def test_weights_that_are_two_of_four_already_stay_whole(pattern):
    scores = np.abs(np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)
    in_place = shfl_jax.mask(scores, shfl_jax.NM()).elements()
    mask = jax.jit(pattern.mask)(scores * in_place, int(in_place.sum()))
    assert (mask.elements() | ~in_place).all()


@pytest.mark.parametrize("count", [18, 16])
def test_the_order_is_never_worse_than_any_of_its_starts(count):
    @jax.jit
    def values(scores, kept, previous):
        rows = jnp.arange(16, dtype=jnp.int32)
        found = fours.order_columns(scores, rows, kept, V, rounds=2, previous=previous)
        starts = [fours.order_columns(scores, rows, kept, V, rounds=0), fours._in_order(kept), previous, found]
        return jnp.stack([jnp.where(fours.choose_two(scores, rows, o, V), scores, 0).sum() for o in starts])

    rng = np.random.default_rng(count)
    better = np.zeros(3, int)
    for _ in range(30):
        scores = rng.integers(0, 10, (16, 18)).astype(np.float32)
        kept = np.sort(rng.permuted(np.tile(np.arange(18), (4, 1)), axis=1)[:, :count])
        previous = np.full((4, 20), 18, np.int32)
        previous[:, :count] = rng.permuted(kept, axis=1)
        if rng.random() < 0.5:  # what the previous order keeps is whole
            two = rng.permuted(np.tile([1, 1, 0, 0], (16, 5)).reshape(16, 5, 4), axis=2).reshape(16, 20)
            scores = np.zeros((16, 19), np.float32)
            np.put_along_axis(scores, np.repeat(previous, 4, axis=0), two * rng.integers(1, 10, (16, 20)), axis=1)
            scores = scores[:, :18]
        flags = np.zeros((4, 18), bool)
        np.put_along_axis(flags, kept, True, axis=1)
        *starts, found = np.asarray(values(scores, jnp.asarray(flags), jnp.asarray(previous)))
        assert found >= max(starts)
        better[np.argmax(starts)] += 1
    assert better[0]
    assert better[2]
