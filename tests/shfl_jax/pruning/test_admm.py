import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shfl_jax import LayerSpec, Unstructured, pruning

RATE, RHO = 0.1, 0.5
SPEC = LayerSpec("w", (6, 8), (), (1,), (0,), Unstructured(0.75))


def project(weight):
    """The 12 largest of 48."""
    keep = np.zeros(weight.size, bool)
    keep[np.argsort(-np.abs(weight).ravel(), kind="stable")[:12]] = True
    return np.where(keep.reshape(weight.shape), weight, 0)


def test_w_z_and_u_are_those_of_the_textbook():
    rng = np.random.default_rng(0)
    weight, goal = rng.normal(size=(2, 6, 8)).astype(np.float32)
    tx = pruning.admm(optax.sgd(RATE), [SPEC], pruning.constant(1, 100, 2), RHO)

    def loss(params, state):
        return jnp.sum((params["w"] - goal) ** 2) / 2 + pruning.admm_penalty(params, state)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = {"w": jnp.asarray(weight)}
    state = tx.init(params)
    z, u, rho = weight, np.zeros_like(weight), 0.0
    for i in range(9):
        gap = weight - z + u
        wanted = ((weight - goal) ** 2).sum() / 2 + rho / 2 * (gap**2).sum()
        weight = weight - RATE * (weight - goal + rho * gap)
        params, state, value = step(params, state)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-4, atol=1e-5)
        if i % 2 == 0:  # the step after it is one of the schedule's
            z = project(weight + u)
            u = u + weight - z
            rho = RHO
            sums, keep = state.memory.sums["w"], state.masks["w"].elements()
            np.testing.assert_allclose(np.where(keep, sums, 0), z, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(np.where(keep, 0, sums), u, rtol=1e-4, atol=1e-5)
    sparse = pruning.sparse_params(params, state)["w"]
    assert int((sparse != 0).sum()) == 12


def test_the_penalty_pulls_pruned_weights_to_zero():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
    tx = pruning.admm(optax.sgd(0.1), [SPEC], pruning.constant(0, 1000, 5), 1.0)
    state = tx.init(params)
    before = jnp.linalg.norm(params["w"] - pruning.sparse_params(params, state)["w"])

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(pruning.admm_penalty)(params, state), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert jnp.linalg.norm(params["w"] - pruning.sparse_params(params, state)["w"]) < 0.1 * before


def test_a_broken_layer_keeps_its_mask_z_and_u():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 8))}
    tx = pruning.admm(optax.sgd(1.0), [SPEC], pruning.constant(0, 9), RHO)
    state = tx.init(params)
    _, after = tx.update({"w": jnp.full((6, 8), jnp.inf)}, state, params)
    jax.tree.map(np.testing.assert_array_equal, (after.masks, after.memory), (state.masks, state.memory))
    assert int(after.skipped["w"]) == 1


def test_a_layer_broken_at_its_first_update_is_not_pulled_to_zero():
    params = {"w": jnp.full((6, 8), jnp.nan)}
    tx = pruning.admm(optax.sgd(1.0), [SPEC], pruning.constant(0, 9), RHO)
    state = tx.init(params)
    assert int(state.skipped["w"]) == 1
    healed = {"w": jnp.ones((6, 8))}
    assert pruning.admm_penalty(healed, state) == 0
    _, state = tx.update(jax.tree.map(jnp.zeros_like, healed), state, healed)
    assert pruning.admm_penalty(healed, state) > 0


def test_errors():
    params = {"w": jnp.ones((6, 8))}
    with pytest.raises(ValueError, match="rho must be positive"):
        pruning.admm(optax.sgd(1.0), [SPEC], pruning.one_shot(0), 0.0)
    state = pruning.prune(optax.sgd(1.0), [SPEC], pruning.one_shot(0)).init(params)
    with pytest.raises(ValueError, match="no `admm`"):
        pruning.admm_penalty(params, state)
    state = pruning.admm(optax.sgd(1.0), [SPEC], pruning.one_shot(3)).init(params)
    with pytest.raises(ValueError, match="no 'w'"):
        pruning.admm_penalty({"v": params["w"]}, state)
    assert pruning.admm_penalty(params, state) == 0
