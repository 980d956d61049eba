import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shfl_jax import BW, NM, TW, VW, LayerSpec, ShflTVW, pruning

V, M, K = 4, 12, 8


def test_vectors_are_dropped_by_magnitude_and_grown_by_gradient():
    rng = np.random.default_rng(0)
    spec = LayerSpec("w", (M, K), (), (1,), (0,), VW(0.5, V))
    tx = pruning.regrow(optax.adam(0.01), [spec], pruning.linear(0, 7, 2), drop=0.5)
    update = jax.jit(tx.update)
    params = {"w": jnp.asarray(rng.normal(size=(M, K)), jnp.float32)}
    state, count, exchanged = tx.init(params), M // V * K // 2, 0
    keep = None
    for i in range(9):
        grads = rng.normal(size=(M, K)).astype(np.float32)
        weight = np.abs(np.asarray(params["w"])).reshape(-1, V, K).sum(1)
        if i == 0:
            keep = weight >= np.sort(weight.ravel())[-count]
        elif i in (2, 4, 6):
            share = 0.25 * (1 + np.cos(np.pi * i / 7))
            staying = count - round(count * share)
            stay = keep & (weight >= np.sort(weight[keep])[::-1][staying - 1])
            slope = np.where(stay, -1, np.abs(grads).reshape(-1, V, K).sum(1))
            grown = np.zeros(keep.size, bool)
            grown[np.argsort(-slope.ravel(), kind="stable")[: count - staying]] = True
            new = stay | grown.reshape(keep.shape)
            exchanged += int((new & ~keep).sum())
            fresh = np.repeat(new & ~keep, V, axis=0)
            keep = new
        updates, state = update({"w": jnp.asarray(grads)}, state, params)
        if i in (2, 4, 6):  # what is grown starts from zero, with moments of this one gradient
            np.testing.assert_allclose(np.asarray(state.inner_state[0].mu["w"])[fresh], 0.1 * grads[fresh], rtol=1e-5)
            assert not np.asarray(params["w"])[fresh].any()
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(pruning.masks(state)["w"].kept, keep)
        assert keep.sum() == count
        assert not np.asarray(params["w"])[~np.repeat(keep, V, axis=0)].any()
    assert exchanged


@pytest.mark.parametrize("pattern", [VW(0.5, V, balanced=True), VW(0.75, V, min_share=0.5)], ids=repr)
def test_equal_counts_floors_and_stacks_hold(pattern):
    shape = (2, M, K)
    spec = LayerSpec("w", shape, (0,), (2,), (1,), pattern)
    tx = pruning.regrow(optax.sgd(0.1), [spec], pruning.linear(0, 9), drop=1.0)
    update, params = jax.jit(tx.update), {"w": jax.random.normal(jax.random.key(0), shape)}
    state, seen = tx.init(params), []
    for i in range(5):
        # The gradient would have one group take all.
        grads = {"w": jax.random.normal(jax.random.key(i), shape).at[:, :V].multiply(100)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(pruning.masks(state)["w"].kept))
    for kept in seen:
        counts = kept.sum(-1)
        assert (counts.sum(-1) == M // V * K * (1 - pattern.sparsity)).all()
        assert (counts == K / 2).all() if pattern.balanced else (counts >= 1).all()
    assert (seen[0] != seen[-1]).any()


@pytest.mark.parametrize("pattern", [NM(2, 4), BW(0.5, 4), TW(0.5, 4), ShflTVW(0.5, 4)], ids=repr)
def test_other_patterns_are_refused(pattern):
    spec = LayerSpec("up/kernel", (K, M), (), (0,), (1,), pattern)
    with pytest.raises(ValueError, match=r"up/kernel \(8, 12\): regrow exchanges columns of row groups"):
        pruning.regrow(optax.sgd(1.0), [spec], pruning.linear(0, 1))
    with pytest.raises(ValueError, match="share"):
        pruning.regrow(optax.sgd(1.0), [], pruning.linear(0, 1), drop=1.5)
