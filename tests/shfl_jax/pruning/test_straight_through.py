import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shfl_jax import NM, TVW, VW, LayerSpec, pruning

RATE, DECAY = 0.1, 0.05


def two_four(weight):
    """The two largest of every four along the inputs, the last axis."""
    ranked = np.argsort(-np.abs(weight).reshape(len(weight), -1, 4), axis=-1, kind="stable")
    keep = np.zeros(ranked.shape, bool)
    np.put_along_axis(keep, ranked[..., :2], True, axis=-1)
    return keep.reshape(weight.shape)


def test_every_step_is_that_of_the_published_code():
    rng = np.random.default_rng(0)
    weight, goal = rng.normal(size=(2, 6, 8)).astype(np.float32)
    spec = LayerSpec("w", (6, 8), (), (1,), (0,), NM(2, 4))
    tx = pruning.straight_through(optax.sgd(RATE), [spec], pruning.constant(0, 100), DECAY)

    def loss(params):
        return jnp.sum((params["w"] - goal) ** 2) / 2

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(pruning.sparse_params(params, state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, changes = {"w": jnp.asarray(weight)}, 0
    state = tx.init(params)
    for _ in range(8):
        keep = two_four(weight)
        np.testing.assert_array_equal(pruning.masks(state)["w"].elements(), keep)
        gradient = np.where(keep, weight, 0) - goal + DECAY * np.where(keep, 0, weight)
        weight = weight - RATE * gradient
        changes += int((two_four(weight) != keep).sum())
        params, state = step(params, state)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-5, atol=1e-6)
    assert changes  # weights have come back
    assert np.asarray(params["w"]).all()


def test_the_schedule_says_when_masks_follow_and_when_they_rest():
    spec = LayerSpec("w", (8, 8), (), (1,), (0,), TVW(0.75, 4, rounds=1))
    tx = pruning.straight_through(optax.sgd(1.0), [spec], pruning.constant(1, 2))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    grads = {"w": jax.random.normal(jax.random.key(1), (8, 8))}
    state, shown, traces = tx.init(params), [], []

    @jax.jit
    def update(grads, state, params):
        traces.append(state)
        return tx.update(grads, state, params)

    shown.append(state.masks["w"].elements())
    for _ in range(3):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        shown.append(state.masks["w"].elements())
        assert not pruning.sparse_params(params, state)["w"][~shown[-1]].any()
    assert len(traces) == 1
    assert shown[0].all()
    assert abs(int(shown[1].sum()) - 16) <= 4
    assert (shown[1] != shown[2]).any()
    np.testing.assert_array_equal(shown[2], shown[3])


def test_a_broken_layer_keeps_its_mask():
    spec = LayerSpec("w", (4, 4), (), (1,), (0,), VW(0.5, 2))
    tx = pruning.straight_through(optax.sgd(1.0), [spec], pruning.constant(1, 9))
    params = {"w": jnp.ones((4, 4))}
    _, state = tx.update({"w": jnp.full((4, 4), jnp.nan)}, tx.init(params), params)
    assert state.masks["w"].density() == 1
    assert int(state.skipped["w"]) == 1


def test_errors():
    with pytest.raises(ValueError, match="decay"):
        pruning.straight_through(optax.sgd(1.0), [], pruning.constant(0, 1), -1.0)
    tx = pruning.straight_through(optax.sgd(1.0), [LayerSpec("w", (4, 4), (), (1,), (0,), NM())], pruning.one_shot(0))
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no 'w' among the parameters"):
        tx.init({"v": params["w"]})
