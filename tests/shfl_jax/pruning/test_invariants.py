"""What every pruning method must hold with every optimizer and every way to wrap it.

The table runs its steps eagerly, with conditions that Python decides: hundreds of cases without a compilation each.
That nothing is compiled twice is shown by states that never change their types, and under jit for every method.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shfl_jax
from shfl_jax import BW, NM, VW, LayerSpec, ShflBW, pruning

K, M = 16, 24
PATHS = ("a/kernel", "b/kernel")
STEPS = 5
CYCLE = pruning.grow_and_prune(("a/.*", "b/.*"), 0, 2)


def make_specs(pattern):
    return [LayerSpec(path, (K, M), (), (0,), (1,), pattern) for path in PATHS]


# name -> the method, whether it is hard, its pattern, and one of sparsity 0 where there is any
METHODS = {
    "magnitude": (lambda tx, s: pruning.prune(tx, s, pruning.cubic(0, 4, 2)), True, BW(0.5, 8), BW(0.0, 8)),
    "taylor": (
        lambda tx, s: pruning.prune(tx, s, pruning.linear(0, 4, 2), score="taylor"),
        True,
        VW(0.75, 8),
        VW(0.0, 8),
    ),
    "grow-and-prune": (lambda tx, s: pruning.prune(tx, s, CYCLE), True, VW(0.75, 8), VW(0.0, 8)),
    "regrow": (lambda tx, s: pruning.regrow(tx, s, pruning.linear(0, 5)), True, VW(0.75, 8), VW(0.0, 8)),
    "straight-through": (
        lambda tx, s: pruning.straight_through(tx, s, pruning.constant(0, 100), 0.01),
        False,
        NM(2, 4),
        NM(4, 4),
    ),
    "admm": (
        lambda tx, s: pruning.admm(tx, s, pruning.stages([1, 3], [0.5, 0.75]), 0.1),
        False,
        VW(0.75, 8),
        VW(0.0, 8),
    ),
}
JITTED = {
    **METHODS,
    "regrow Shfl-BW": (METHODS["regrow"][0], True, ShflBW(0.75, 8, balanced=True, search="kmeans"), None),
}

OPTIMIZERS = {
    "adamw": lambda rate=0.05: optax.adamw(rate),
    "sgd": lambda rate=0.01: optax.sgd(rate, momentum=0.9),
    "lion": lambda rate=0.01: optax.lion(rate),
    "adafactor": lambda rate=0.05: optax.adafactor(rate, min_dim_size_to_factor=8, momentum=0.9),
}

# name -> (method, optimizer) -> the whole transformation
VARIANTS = {
    "plain": lambda method, optimizer: method(optimizer()),
    "MultiSteps": lambda method, optimizer: optax.MultiSteps(method(optimizer()), 2).gradient_transformation(),
    "inject_hyperparams": lambda method, optimizer: optax.inject_hyperparams(
        lambda rate: optax.with_extra_args_support(method(optimizer(rate)))
    )(rate=0.02),
    "masked": lambda method, optimizer: optax.masked(method(optimizer()), {"a": True, "b": True, "free": False}),
    "apply_if_finite": lambda method, optimizer: optax.apply_if_finite(method(optimizer()), 2),
    "bf16": lambda method, optimizer: method(optimizer()),
    "sharded": lambda method, optimizer: method(optimizer()),
}


@functools.cache
def start(variant="plain"):
    shapes = {"a": (K, M), "b": (K, M), "free": (M, K)}
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(i), shape)} for i, (name, shape) in enumerate(shapes.items())
    }
    if variant == "bf16":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    if variant == "sharded":
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    return params


@functools.cache
def noise(i, variant):
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(100 + i), p.shape, p.dtype), start(variant))


def step(tx, params, state, i, variant="plain"):
    """One step of some training; every gradient is dense and changes from step to step."""
    grads = jax.tree.map(lambda p, n: p + n, params, noise(i, variant))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture
def eager(monkeypatch):
    """`jax.lax.cond` as an `if` where the predicate is known."""
    cond = jax.lax.cond

    def decide(predicate, true, false, *operands, **kwargs):
        if isinstance(predicate, jax.core.Tracer):
            return cond(predicate, true, false, *operands, **kwargs)
        return (true if predicate else false)(*operands, *kwargs.values())

    monkeypatch.setattr(jax.lax, "cond", decide)


def types(tree):
    return jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a), jax.typeof(a).weak_type), tree)


def kept(masks):
    return {path: np.asarray(masks.spec(path).from_matrix(mask.elements())) for path, mask in masks.items()}


def assert_zeros(tree, keeps):
    leaves = shfl_jax.path_leaves(tree)
    for path, keep in keeps.items():
        assert not np.asarray(leaves[path])[~keep].any(), path


def assert_target(keeps, pattern):
    """To the unit: the targets here are whole numbers of them."""
    for path, keep in keeps.items():
        assert keep.sum() == (1 - pattern.sparsity) * K * M, path


def assert_moments(state, keeps):
    """Everything in the optimizer's state that is shaped like a pruned kernel is zero where that is pruned."""
    found = 0
    for node in jax.tree.leaves(state.inner_state, is_leaf=lambda node: isinstance(node, dict)):
        leaves = shfl_jax.path_leaves(node) if isinstance(node, dict) else {}
        for path, keep in keeps.items():
            if path in leaves and jnp.shape(leaves[path]) == keep.shape:
                found += 1
                assert not np.asarray(leaves[path])[~keep].any(), path
    assert found


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def prune_state(state):
    (found,) = (n for n in jax.tree.leaves(state, is_leaf=is_prune_state) if is_prune_state(n))
    return found


def is_prune_state(node):
    return isinstance(node, pruning.PruneState)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_an_optimizer_in_a_wrapper(method, optimizer, variant):
    make, is_hard, pattern, _ = METHODS[method]
    tx = VARIANTS[variant](lambda inner: make(inner, make_specs(pattern)), OPTIMIZERS[optimizer])
    params = start(variant)
    state = tx.init(params)
    wanted = types((params, state))
    steps = 2 * STEPS if variant == "MultiSteps" else STEPS
    for i in range(steps):
        params, state = step(tx, params, state, i, variant)
        keeps = kept(pruning.masks(state))
        assert types((params, state)) == wanted
        assert_zeros(params if is_hard else pruning.sparse_params(params, state), keeps)
        if is_hard:
            assert_moments(prune_state(state), keeps)
        if i == steps // 2:
            saved = jax.tree.map(np.asarray, (params, state))
    assert_target(keeps, pattern)
    assert not any(int(n) for n in prune_state(state).skipped.values())
    # Stopped and resumed: what is saved is all there is.
    resumed, resumed_state = jax.tree.map(jnp.asarray, saved)
    for i in range(steps // 2 + 1, steps):
        resumed, resumed_state = step(tx, resumed, resumed_state, i, variant)
    assert_equal((resumed, resumed_state), (params, state))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_is_the_plain_optimizer(method, optimizer, variant):
    make, *_, whole = METHODS[method]
    tx = VARIANTS[variant](lambda inner: make(inner, make_specs(whole)), OPTIMIZERS[optimizer])
    plain = VARIANTS[variant](lambda inner: inner, OPTIMIZERS[optimizer])
    params = start(variant)
    state, plain_state = tx.init(params), plain.init(params)
    for i in range(3):
        got, state = step(tx, params, state, i, variant)
        params, plain_state = step(plain, params, plain_state, i, variant)
        assert_equal(got, params)
    assert all(mask.density() == 1 for mask in pruning.masks(state).values())


@pytest.mark.parametrize("method", JITTED)
def test_a_jitted_step_is_compiled_once(method):
    make, is_hard, pattern, _ = JITTED[method]
    tx = make(optax.adamw(0.05), make_specs(pattern))
    traces = []

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def jitted(params, state, i):
        traces.append(i)
        return step(tx, params, state, 0)

    params = start()
    state = tx.init(params)
    for i in range(STEPS):
        params, state = jitted(params, state, i)
        keeps = kept(pruning.masks(state))
        assert_zeros(params if is_hard else pruning.sparse_params(params, state), keeps)
    assert len(traces) == 1
    assert_target(keeps, pattern)
