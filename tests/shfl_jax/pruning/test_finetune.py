"""Fine-tuning of compressed values: the same training as with masks, without an array of the dense weight's size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pallas_kernels
import shfl_jax
from pallas_kernels._layout import as_prepared
from pallas_kernels.xla import _matmul as xla
from shfl_jax import TVW, VW, pruning

K, M, TOKENS = 64, 96, 4


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(K, name="down")(nn.relu(nn.Dense(M, name="up")(x)))


MODEL = Model()
X, Y = jax.random.normal(jax.random.key(0), (2, TOKENS, K))


def pruned(inner, pattern):
    params = MODEL.init(jax.random.key(1), X)["params"]
    specs = shfl_jax.linen.resolve(shfl_jax.Plan({".*": pattern}), MODEL, X)
    tx = pruning.prune(inner, specs, pruning.one_shot(0))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(dense_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    return step, params, state


def dense_loss(params):
    return jnp.mean((MODEL.apply({"params": params}, X) - Y) ** 2)


def fine_tuning(inner, topology):
    def loss(values):
        return jnp.mean((shfl_jax.linen.apply(MODEL, {"params": values, "topology": topology}, X) - Y) ** 2)

    def step(values, state):
        updates, state = inner.update(jax.grad(loss)(values), state, values)
        return optax.apply_updates(values, updates), state

    return step


@pytest.mark.parametrize("pattern", [VW(0.75, 16), TVW(0.75, 16, rounds=0)], ids=["VW", "TVW"])
def test_it_is_the_training_of_the_masked_weights(pattern):
    inner = optax.adamw(1e-2)
    masked_step, params, state = pruned(inner, pattern)
    sparse = shfl_jax.compress(params, pruning.masks(state))
    values, values_state = sparse["params"], pruning.compressed_state(inner, state, sparse)
    step = jax.jit(fine_tuning(inner, sparse["topology"]))
    for _ in range(3):
        params, state = masked_step(params, state)
        values, values_state = step(values, values_state)
    got = shfl_jax.decompress({**sparse, "params": values})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, params)
    pruning.masks(state).apply(got)
    for path, keep in pruning.masks(state).items():
        spec = pruning.masks(state).spec(path)
        kernel = spec.to_matrix(shfl_jax.path_leaves(got)[path])
        assert not np.asarray(kernel)[~np.asarray(keep.elements())].any()


def sizes(jaxpr):
    """Name and shape of everything that a jaxpr computes, in the jaxprs within too."""
    for eqn in jaxpr.eqns:
        yield from ((eqn.primitive.name, var.aval.shape) for var in eqn.outvars if hasattr(var.aval, "shape"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda node: hasattr(node, "eqns")):
            if hasattr(inner, "eqns"):
                yield from sizes(getattr(inner, "jaxpr", inner))


def test_no_array_is_as_large_as_the_dense_weight(monkeypatch):
    inner = optax.adamw(1e-2)
    # Counts that differ would be padded to the largest, and one group may keep everything.
    _, params, state = pruned(inner, VW(0.75, 16, balanced=True))
    dense = jax.make_jaxpr(jax.grad(dense_loss))(params)
    assert max(np.prod(shape) for _, shape in sizes(dense.jaxpr)) >= M * K
    sparse = shfl_jax.compress(params, pruning.masks(state))
    values_state = pruning.compressed_state(inner, state, sparse)
    monkeypatch.setattr(xla, "DENSE_BYTES", 1 << 12)
    step = jax.make_jaxpr(fine_tuning(inner, sparse["topology"]))(sparse["params"], values_state)
    found = list(sizes(step.jaxpr))
    assert {name for name, _ in found} >= {"dot_general", "cond"}  # it has looked inside
    assert max(np.prod(shape) for _, shape in found) < M * K
    held = sum(leaf.size for leaf in jax.tree.leaves((sparse["params"], values_state)))
    assert held < 0.3 * sum(leaf.size for leaf in jax.tree.leaves((params, inner.init(params))))


@pytest.mark.parametrize("layout", ["token_major", "feature_major"])
@pytest.mark.parametrize("m", [64, 50])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_derivative_by_parts_of_the_groups(monkeypatch, layout, m, prepared):
    rng = np.random.default_rng(0)
    weight, kept = rng.normal(size=(m, 24)).astype(np.float32), rng.uniform(size=(-(-m // 16), 24)) < 0.4
    rows = np.minimum(np.arange(len(kept) * 16), m).astype(np.int32)
    rows[:m] = rng.permutation(m)
    matrix = pallas_kernels.from_dense(weight, rows, kept)
    dense = np.asarray(pallas_kernels.to_dense(matrix))
    if prepared:
        matrix = pallas_kernels.prepare(matrix, "xla")
    monkeypatch.setattr(xla, "DENSE_BYTES", 3 * 24 * 16 * 4)  # three groups, and one or two more
    dy = rng.normal(size=(5, m)).astype(np.float32)
    token_major = layout == "token_major"
    dy_here = jnp.asarray(dy if token_major else dy.T)
    got = xla.grad_input(as_prepared(matrix), dy_here, None, token_major=token_major)
    np.testing.assert_allclose(got if layout == "token_major" else got.T, dy @ dense, rtol=1e-4, atol=1e-4)


def test_factored_moments_start_afresh_and_other_state_stays():
    inner = optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9)
    _, params, state = pruned(inner, VW(0.75, 16))
    sparse = shfl_jax.compress(params, pruning.masks(state))
    carried, fresh = pruning.compressed_state(inner, state, sparse), inner.init(sparse["params"])
    assert jax.tree.structure(carried) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, fresh)
    counts = [leaf for leaf in jax.tree.leaves(carried) if jnp.shape(leaf) == () and int(leaf)]
    assert counts
    assert all(int(count) == 2 for count in counts)


def test_errors():
    inner = optax.sgd(1e-2, momentum=0.9)
    _, params, state = pruned(inner, VW(0.75, 16))
    _, _, other = pruned(inner, VW(0.5, 16))
    sparse = shfl_jax.compress(params, pruning.masks(state))
    with pytest.raises(ValueError, match="of this very state"):
        pruning.compressed_state(inner, other, sparse)
    with pytest.raises(ValueError, match="2 pruning methods"):
        pruning.compressed_state(inner, (state, state), sparse)
