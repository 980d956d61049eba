import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import shfl_jax
from shfl_jax import BW, NM, TW, VW, LayerSpec, ShflBW, Unstructured, pruning

K, M, LAYERS = 12, 16, 2
SHAPES = {
    "a": {"kernel": (K, M), "bias": (M,)},
    "stack": {"kernel": (LAYERS, M, K)},
    "free": {"kernel": (M, K)},
}
SCHEDULE = pruning.cubic(1, 8, 3)  # 3 does not divide the span
STEPS = 11


def make_specs(pattern):
    return {
        "a/kernel": LayerSpec("a/kernel", (K, M), (), (0,), (1,), pattern),
        "stack/kernel": LayerSpec("stack/kernel", (LAYERS, M, K), (0,), (2,), (1,), pattern),
    }


def make_params(dtype=jnp.float32, seed=0):
    leaves, tree = jax.tree.flatten(SHAPES, is_leaf=lambda n: isinstance(n, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)])


def loss(params, key):
    """Every gradient is dense and changes from step to step."""
    target = make_params()
    noise = jax.tree.map(lambda t: jax.random.normal(key, t.shape), target)
    parts = jax.tree.map(lambda p, t, n: jnp.sum((p.astype(jnp.float32) - t - n) ** 2), params, target, noise)
    return sum(jax.tree.leaves(parts))


def make_step(tx, compiled=None):
    def step(params, state, i):
        if compiled is not None:
            compiled.append(i)
        grads = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(7), i))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def elements(masks):
    return {spec.path: np.asarray(spec.from_matrix(masks[spec.path].elements())) for spec in masks.specs}


def assert_exact_zeros(params, masks):
    leaves = shfl_jax.path_leaves(params)
    for path, keep in elements(masks).items():
        assert not np.asarray(leaves[path])[~keep].any(), path


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


PATTERNS = [
    Unstructured(0.75),
    NM(2, 4),
    BW(0.5, block_size=4),
    VW(0.75, group_size=4),
    VW(0.75, group_size=4, balanced=True),
    ShflBW(0.75, group_size=4, min_share=0.5),
    TW(0.5, tile_size=8),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_pattern_zeros_each_step_reaches_its_target_and_compiles_once(pattern):
    specs, params, compiled = make_specs(pattern), make_params(), []
    tx = pruning.prune(optax.adamw(0.05, weight_decay=0.1), specs, SCHEDULE)
    step, state = make_step(tx, compiled), tx.init(params)
    assert all(keep.all() for keep in elements(pruning.masks(state)).values())
    for i in range(STEPS):
        before = params
        params, state = step(params, state, i)
        masks = pruning.masks(state)
        assert_exact_zeros(params, masks)
        for moments in (state.inner_state[0].mu, state.inner_state[0].nu):
            assert_exact_zeros(moments, masks)
        if i == SCHEDULE.begin:
            assert all(keep.all() for keep in elements(masks).values()) or isinstance(pattern, NM)
    assert len(compiled) == 1
    for path, spec in specs.items():
        scores = jnp.abs(spec.to_matrix(shfl_jax.path_leaves(params)[path]))
        target = shfl_jax.mask(scores, pattern, pattern.count(spec.matrix_shape))
        assert masks[path].rows.shape == target.rows.shape
        assert masks[path].kept.shape == target.kept.shape
        # TW counts weights in units of different sizes, so other scores give other totals.
        unit = masks[path].group_size / M if isinstance(pattern, TW) else 1e-6
        np.testing.assert_allclose(masks[path].density(), target.density(), atol=unit)
    assert np.any(params["free"]["kernel"] != before["free"]["kernel"])
    assert np.all(params["free"]["kernel"] != 0)


def test_masks_are_those_of_the_parameters_at_the_update():
    pattern = VW(0.75, group_size=4)
    specs, params = make_specs(pattern), make_params()
    tx = pruning.prune(optax.sgd(0.1), specs, pruning.one_shot(0))
    _, state = tx.update(params, tx.init(params), params)
    for path, spec in specs.items():
        weight = np.asarray(spec.to_matrix(shfl_jax.path_leaves(params)[path]), np.float64).reshape(-1, M, K)
        keep = np.asarray(pruning.masks(state)[path].elements()).reshape(-1, M, K)
        for w, got in zip(weight, keep, strict=True):
            sums = np.abs(w).reshape(M // 4, 4, K).sum(1)
            wanted = sums >= np.sort(sums.ravel())[-(M // 4) * K // 4]
            np.testing.assert_array_equal(got, np.repeat(wanted, 4, axis=0))


def test_an_allocation_spreads_sparsity_over_layers_and_slices():
    specs, params = make_specs(TW(0.5, tile_size=4)), make_params()
    params["a"]["kernel"] *= 1.5
    sizes = {path: int(np.prod(spec.shape)) for path, spec in specs.items()}
    kept = {}
    for allocation in ("global", {"a/kernel": 0.25, "stack/kernel": 0.75}):
        tx = pruning.prune(optax.sgd(0.1), specs, pruning.one_shot(0), allocation)
        _, state = jax.jit(tx.update)(params, tx.init(params), params)
        kept[str(allocation)] = {path: int(keep.sum()) for path, keep in elements(pruning.masks(state)).items()}
    ranked, given = kept.values()
    assert sum(ranked.values()) == pytest.approx(sum(sizes.values()) / 2, abs=K)
    assert ranked["a/kernel"] > 1.2 * sizes["a/kernel"] / 2
    assert given == pytest.approx({"a/kernel": 0.75 * sizes["a/kernel"], "stack/kernel": 96}, abs=4)


def test_a_regrown_weight_starts_with_zero_moments():
    # Two vectors compete; an update from outside turns the ranking over between two mask updates.
    spec = LayerSpec("w", (2, 4), (), (0,), (1,), VW(0.5, group_size=4))
    tx = pruning.prune(optax.adam(0.1), [spec], pruning.cubic(0, 2, 1))
    strong, weak = {"w": jnp.array([[3.0] * 4, [1.0] * 4])}, {"w": jnp.array([[1.0] * 4, [3.0] * 4])}
    grads, state, shown = {"w": jnp.ones((2, 4))}, tx.init(strong), []
    for params in (strong, strong, weak):
        _, state = tx.update(grads, state, params)
        shown.append((np.asarray(pruning.masks(state)["w"].kept[0]), state.inner_state[0]))
    assert [list(kept) for kept, _ in shown] == [[True, True], [True, False], [False, True]]
    before, after = shown[1][1], shown[2][1]
    assert (before.mu["w"][0] != 0).all()
    assert not before.mu["w"][1].any()
    assert not after.mu["w"][0].any()
    assert not after.nu["w"][0].any()
    # Exactly one gradient has come in since it grew back.
    np.testing.assert_allclose(after.mu["w"][1], 0.1, rtol=1e-6)
    np.testing.assert_allclose(after.nu["w"][1], 0.001, rtol=1e-5)


def test_stale_moments_of_a_regrown_weight_are_zeroed():
    # Noise after the mask leaks into momentum; neither pruning nor regrowth may inherit it.
    spec = LayerSpec("w", (2, 4), (), (0,), (1,), VW(0.5, group_size=4))
    noisy = optax.chain(optax.add_noise(1.0, 0.0, 0), optax.trace(0.9))
    quiet = optax.chain(optax.add_noise(0.0, 0.0, 0), optax.trace(0.9))
    noisy, quiet = (pruning.prune(t, [spec], pruning.cubic(0, 2, 1)) for t in (noisy, quiet))
    strong, weak = {"w": jnp.array([[3.0] * 4, [1.0] * 4])}, {"w": jnp.array([[1.0] * 4, [3.0] * 4])}
    grads, state = {"w": jnp.ones((2, 4))}, noisy.init(strong)
    for params in (strong, strong):
        _, state = noisy.update(grads, state, params)
    assert (state.inner_state[1].trace["w"][1] != 0).any()
    _, state = quiet.update(grads, state, weak)
    np.testing.assert_array_equal(state.inner_state[1].trace["w"][1], 1)
    np.testing.assert_array_equal(state.inner_state[1].trace["w"][0], 0)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.05),
    "sgd": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=8, momentum=0.9),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.05),
    "masked inside": lambda: optax.masked(optax.adam(0.05), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "partition inside": lambda: optax.partition(
        {"fast": optax.adam(0.1), "slow": optax.sgd(0.01, momentum=0.9)},
        lambda p: jax.tree.map(lambda x: "fast" if x.ndim > 2 else "slow", p),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_inner_optimizer_keeps_exact_zeros(name):
    params = make_params()
    tx = pruning.prune(OPTIMIZERS[name](), make_specs(VW(0.75, group_size=4)), SCHEDULE)
    step, state = make_step(tx), tx.init(params)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for i in range(STEPS):
        params, state = step(params, state, i)
        masks = pruning.masks(state)
        assert_exact_zeros(params, masks)
        for inner in jax.tree.leaves(state.inner_state, is_leaf=lambda n: isinstance(n, dict)):
            if isinstance(inner, dict) and "a" in inner:  # a copy of the parameter tree
                for path, keep in elements(masks).items():
                    moment = shfl_jax.path_leaves(inner).get(path)
                    if moment is not None and moment.shape == keep.shape:
                        assert not np.asarray(moment)[~keep].any(), path
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    np.testing.assert_allclose(masks["a/kernel"].density(), 0.25)


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx))(rate=0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"a": True, "stack": True, "free": False}),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_finds_its_masks_and_keeps_exact_zeros(name):
    params = make_params(jnp.bfloat16)
    tx = WRAPPERS[name](pruning.prune(optax.adamw(0.05), make_specs(VW(0.75, group_size=4)), SCHEDULE))
    step, state = make_step(tx), tx.init(params)
    for i in range(2 * STEPS):
        params, state = step(params, state, i)
        assert_exact_zeros(params, pruning.masks(state))
        assert params["a"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(pruning.masks(state)["stack/kernel"].density(), [0.25, 0.25])
    assert optax.tree_utils.tree_map_params(tx, lambda x: x, state) is not None


def test_bfloat16_gradients_of_float32_parameters_still_give_exact_zeros():
    params = make_params()
    tx = pruning.prune(optax.sgd(0.1), make_specs(VW(0.75, group_size=4)), pruning.one_shot(0))
    grads = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    updates, state = tx.update(grads, tx.init(params), params)
    assert_exact_zeros(optax.apply_updates(params, updates), pruning.masks(state))


def test_apply_if_finite_rejects_a_step_with_its_masks():
    params = make_params()
    tx = optax.apply_if_finite(pruning.prune(optax.sgd(0.1), make_specs(VW(0.5, group_size=4)), pruning.one_shot(0)), 5)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    updates, state = jax.jit(tx.update)(bad, tx.init(params), params)
    assert_trees_equal(optax.apply_updates(params, updates), params)
    assert pruning.masks(state)["a/kernel"].density() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparsity_zero_equals_the_plain_optimizer(name):
    inner, params = OPTIMIZERS[name](), make_params()
    tx = pruning.prune(inner, make_specs(VW(0.0, group_size=4)), pruning.cubic(0, 4, 2))
    state, plain = tx.init(params), inner.init(params)
    update, plain_update = jax.jit(tx.update), jax.jit(inner.update)
    for i in range(6):
        grads = jax.grad(loss)(params, jax.random.key(i))
        updates, state = update(grads, state, params)
        wanted, plain = plain_update(grads, plain, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), updates, wanted)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.inner_state, plain)
        params = optax.apply_updates(params, updates)
    assert pruning.masks(state)["a/kernel"].density() == 1


def test_a_run_resumed_by_orbax_equals_one_that_never_stopped(tmp_path):
    stop = SCHEDULE.begin + SCHEDULE.every + 1  # the next update starts from the masks that were saved
    params = make_params(jnp.bfloat16)
    tx = pruning.prune(optax.adamw(0.05), make_specs(ShflBW(0.75, group_size=4)), SCHEDULE)
    step, state = make_step(tx), tx.init(params)
    for i in range(stop):
        params, state = step(params, state, i)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, state))
        checkpointer.wait_until_finished()
        fresh = make_params(jnp.bfloat16, seed=1)
        abstract = jax.eval_shape(lambda: (fresh, tx.init(fresh)))
        resumed_params, resumed = checkpointer.restore(tmp_path / "run", abstract)
    assert_trees_equal((resumed_params, resumed), (params, state))
    for i in range(stop, STEPS):
        params, state = step(params, state, i)
        resumed_params, resumed = step(resumed_params, resumed, i)
    assert_trees_equal((resumed_params, resumed), (params, state))
    assert pruning.masks(state)["a/kernel"].density() == 0.25


def test_a_scan_over_steps_equals_the_steps():
    params = make_params()
    tx = pruning.prune(optax.adamw(0.05), make_specs(VW(0.75, group_size=4)), SCHEDULE)
    step = make_step(tx)
    scanned, _ = jax.jit(
        lambda carry: jax.lax.scan(lambda c, i: (step(*c, i), None), carry, jnp.arange(STEPS, dtype=jnp.int32))
    )((params, tx.init(params)))
    state = tx.init(params)
    for i in range(STEPS):
        params, state = step(params, state, i)
    # The same program within a loop may round otherwise; what is kept must not differ.
    assert_trees_equal(pruning.masks(scanned[1]), pruning.masks(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), scanned[0], params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_with_nonfinite_weights_keeps_its_mask_and_counts_it(bad):
    pattern, params = VW(0.75, group_size=4), make_params()
    tx = pruning.prune(optax.sgd(0.0), make_specs(pattern), pruning.cubic(0, 2, 1))
    update, grads = jax.jit(tx.update), jax.tree.map(jnp.zeros_like, params)
    _, state = update(grads, tx.init(params), params)
    _, state = update(grads, state, params)
    before = pruning.masks(state)
    broken = {**params, "stack": {"kernel": params["stack"]["kernel"].at[1, 2, 3].set(bad)}}
    _, state = update(grads, state, broken)
    after = pruning.masks(state)
    assert_trees_equal(after["stack/kernel"], before["stack/kernel"])
    assert after["a/kernel"].density() == 0.25 < before["a/kernel"].density()
    assert {path: int(n) for path, n in state.skipped.items()} == {"a/kernel": 0, "stack/kernel": 1}


def test_row_groups_are_searched_for_the_target_from_the_first_update():
    # Rows 0..7 use the first half of the columns or the second, in turn: only shuffled groups of four fit.
    rows = np.arange(8)[:, None] % 2 == (np.arange(8) // 4)[None]
    weight = np.where(rows, 1.0, 0.01) * np.random.default_rng(0).uniform(1, 1.2, (8, 8))
    spec = LayerSpec("w", (8, 8), (), (1,), (0,), ShflBW(0.5 + 1 / 8, group_size=4))
    params = {"w": jnp.asarray(weight, jnp.float32)}
    tx = pruning.prune(optax.sgd(0.0), [spec], pruning.cubic(0, 4, 1))
    _, state = tx.update(params, tx.init(params), params)
    mask = pruning.masks(state)["w"]
    assert mask.density() == 1
    assert {frozenset(group) for group in np.asarray(mask.rows).reshape(2, 4).tolist()} == {
        frozenset(range(0, 8, 2)),
        frozenset(range(1, 8, 2)),
    }
    # Other weights later: other columns, but the rows stay together.
    other = {"w": jnp.asarray(weight[[0, 1, 3, 2, 4, 5, 7, 6], ::-1].copy(), jnp.float32)}
    for later in (params, other):
        _, state = tx.update(later, state, later)
        shown = pruning.masks(state)["w"]
        np.testing.assert_array_equal(shown.rows, mask.rows)
        assert shown.density() < 1


@pytest.mark.parametrize("freeze", [dict, flax.core.FrozenDict], ids=["dict", "FrozenDict"])
def test_sparse_params_masks_an_average(freeze):
    params = freeze(make_params())
    tx = optax.chain(optax.clip(1.0), pruning.prune(optax.sgd(0.1), make_specs(VW(0.5, 4)), pruning.one_shot(0)))
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    trained = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, b: (a + b) / 2, params, trained)
    sparse = jax.jit(pruning.sparse_params)(average, state)
    assert_exact_zeros(sparse, pruning.masks(state))
    for path, keep in elements(pruning.masks(state)).items():
        got, wanted = shfl_jax.path_leaves(sparse)[path], shfl_jax.path_leaves(average)[path]
        np.testing.assert_array_equal(np.asarray(got)[keep], np.asarray(wanted)[keep])
    np.testing.assert_array_equal(sparse["free"]["kernel"], average["free"]["kernel"])


def test_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(K, M, rngs=rngs)
            self.down = nnx.Linear(M, K, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    model, x = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (8, K))
    specs = shfl_jax.nnx.resolve(shfl_jax.Plan({"up/.*": ShflBW(0.75, group_size=4)}), model, x)
    optimizer = nnx.Optimizer(model, pruning.prune(optax.adamw(0.01), specs, SCHEDULE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(x) - x) ** 2))(model))

    for _ in range(STEPS):
        step(model, optimizer)
        masks = pruning.masks(optimizer.opt_state)
        assert_exact_zeros(nnx.state(model, nnx.Param), masks)
    assert list(masks) == ["up/kernel"]
    assert masks["up/kernel"].density() == 0.25
    sparse = pruning.sparse_params(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert_exact_zeros(sparse, masks)


def test_two_prunes_of_different_layers_give_all_masks():
    first, second = ([spec] for spec in make_specs(VW(0.5, group_size=4)).values())
    params = make_params()
    tx = optax.chain(*(pruning.prune(optax.identity(), s, pruning.one_shot(0)) for s in (first, second)))
    assert set(pruning.masks(tx.init(params))) == {"a/kernel", "stack/kernel"}
    twice = optax.chain(*(pruning.prune(optax.identity(), first, pruning.one_shot(0)) for _ in range(2)))
    with pytest.raises(ValueError, match="same layer"):
        pruning.masks(twice.init(params))


def test_errors_name_the_layer_and_change_nothing():
    params, specs = make_params(), make_specs(VW(0.5, group_size=4))
    tx = pruning.prune(optax.adam(0.1), specs, pruning.one_shot(0))
    state = tx.init(params)
    with pytest.raises(ValueError, match="prune needs the parameters"):
        tx.update(params, state)
    hidden = optax.masked(tx, {"a": True, "stack": False, "free": True})
    with pytest.raises(ValueError, match="no 'stack/kernel' among the parameters"):
        hidden.init(params)
    wrong = {**params, "a": {"kernel": jnp.ones((K, M + 1)), "bias": jnp.ones(M)}}
    with pytest.raises(ValueError, match=r"'a/kernel' has shape \(12, 17\) but its spec says \(12, 16\)"):
        tx.init(wrong)
    with pytest.raises(ValueError, match="no 'a/kernel' among the parameters"):
        tx.update({"stack": params["stack"]}, state, params)
    with pytest.raises(ValueError, match="no PruneState"):
        pruning.masks(optax.adam(0.1).init(params))


def test_extra_arguments_reach_the_inner_optimizer():
    params = make_params()
    inner = optax.GradientTransformationExtraArgs(
        optax.init_empty_state, lambda u, s, p=None, *, factor, **_: (jax.tree.map(lambda x: factor * x, u), s)
    )
    tx = pruning.prune(inner, make_specs(VW(0.5, group_size=4)), pruning.one_shot(5))
    updates, _ = functools.partial(tx.update, factor=3.0)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["free"]["kernel"], 3 * params["free"]["kernel"])


def test_taylor_scores_are_averaged_in_the_state_and_choose_the_masks():
    rng = np.random.default_rng(0)
    spec = LayerSpec("w", (M, K), (), (1,), (0,), VW(0.5, group_size=4))
    tx = pruning.prune(optax.sgd(0.0), [spec], pruning.one_shot(3), score="taylor", score_decay=0.5)
    weight = rng.normal(size=(M, K)).astype(np.float32)
    params, update, average = {"w": jnp.asarray(weight)}, jax.jit(tx.update), np.zeros((M, K))
    state = tx.init(params)
    for i in range(4):
        grads = rng.normal(size=(M, K)).astype(np.float32)
        if i == 1:  # such a step adds nothing
            grads[0, 0] = np.nan
        else:
            average = 0.5 * average + 0.5 * (grads * weight) ** 2
        _, state = update({"w": jnp.asarray(grads)}, state, params)
        np.testing.assert_allclose(state.memory["w"], average, rtol=1e-5)
    sums = average.reshape(M // 4, 4, K).sum(1)
    np.testing.assert_array_equal(pruning.masks(state)["w"].kept, sums >= np.sort(sums.ravel())[-sums.size // 2])
    with pytest.raises(ValueError, match="score must be one of 'magnitude', 'taylor', got 'wanda'"):
        pruning.prune(optax.sgd(0.0), [spec], pruning.one_shot(0), score="wanda")
    with pytest.raises(ValueError, match="score_decay"):
        pruning.prune(optax.sgd(0.0), [spec], pruning.one_shot(0), score="taylor", score_decay=1.0)


def test_partitions_that_take_turns_leave_the_others_alone():
    params, schedule = make_params(), pruning.grow_and_prune(["a/.*", "stack/.*"], begin=1, turn=2)
    tx = pruning.prune(optax.sgd(0.01), make_specs(VW(0.75, group_size=4)), schedule)
    step, state, shown, grown = make_step(tx), tx.init(params), [], None
    for i in range(7):
        params, state = step(params, state, i)
        shown.append(elements(pruning.masks(state)))
        if i == 3:
            grown = np.asarray(params["stack"]["kernel"])
        assert_exact_zeros(params, pruning.masks(state))
    densities = [(float(s["a/kernel"].mean()), float(s["stack/kernel"].mean())) for s in shown]
    assert densities == [(1, 1), (1, 0.25), (1, 0.25), (0.25, 1), (0.25, 1), (0.25, 0.25), (0.25, 0.25)]
    np.testing.assert_array_equal(shown[3]["a/kernel"], shown[6]["a/kernel"])
    # Weights that come back start from zero and learn from that very step on.
    back = ~shown[2]["stack/kernel"]
    assert np.abs(grown[back]).max() <= 0.01 * 2 * 20
    assert grown[back].any()
    tx = pruning.prune(optax.sgd(0.01), make_specs(VW(0.75, 4)), schedule, "global")
    with pytest.raises(ValueError, match="allocation='global' ranks layers against one another, but GrowAndPrune"):
        tx.update(params, tx.init(params), params)


def test_rows_are_searched_again_only_when_the_schedule_says():
    # Rows that want each other's company change from step to step.
    pattern = ShflBW(0.5 + 1 / 8, group_size=4, search="kmeans")
    spec = LayerSpec("w", (8, 8), (), (1,), (0,), pattern)
    schedule = pruning.linear(0, 4, 1, search_every=2)
    tx = pruning.prune(optax.sgd(0.0), [spec], schedule)
    update, state, rows = jax.jit(tx.update), None, []
    noise = np.random.default_rng(0).uniform(1, 1.2, (8, 8))
    for i in range(5):
        first = np.array([[0, 1, 2, 3], [0, 2, 4, 6], [0, 1, 4, 5], [0, 3, 5, 6], [0, 1, 6, 7]][i])
        friends = np.isin(np.arange(8), first)
        weight = np.where(friends[:, None] == (np.arange(8) < 4)[None], 1.0, 0.01) * noise
        params = {"w": jnp.asarray(weight, jnp.float32)}
        state = tx.init(params) if state is None else state
        _, state = update(params, state, params)
        mask = pruning.masks(state)["w"]
        groups = {frozenset(group) for group in np.asarray(mask.rows).reshape(2, 4).tolist()}
        rows.append(groups)
        # Step 1 follows a mask that keeps everything, so that its rows are free too.
        if i < 2 or schedule.is_search(i):
            assert frozenset(first.tolist()) in groups
        else:
            assert groups == rows[i - 1]
    assert len({frozenset(groups) for groups in rows}) > 2
