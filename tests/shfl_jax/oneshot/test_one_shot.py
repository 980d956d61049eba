"""One-shot pruning of whole models: what it returns, what it reports, what it refuses."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import shfl_jax
from shfl_jax.oneshot import prune_one_shot


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16, name="first")(x))  # one shape for all: one compilation of every pattern
        return nn.Dense(16, name="second")(nn.relu(nn.Dense(16, name="middle")(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture(scope="module")
def mlp():
    """A model, its parameters, and correlated calibration batches of 96 tokens in all."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(16, 16)) * np.exp(rng.normal(size=16))
    batches = [(rng.normal(size=(n, 8, 16)) @ mixing).astype(np.float32) for n in (4, 4, 4)]
    model = Mlp()
    return model, model.init(jax.random.key(0), batches[0])["params"], batches


def plan(pattern):
    return shfl_jax.Plan({".*/kernel": pattern})


def model_error(model, params, pruned, batches):
    outputs = [[np.asarray(model.apply({"params": p}, x), np.float64) for x in batches] for p in (params, pruned)]
    return np.square(np.subtract(*map(np.concatenate, outputs))).sum() / np.square(np.concatenate(outputs[0])).sum()


PATTERNS = [
    shfl_jax.Unstructured(0.5),
    shfl_jax.NM(),
    shfl_jax.VW(0.5, group_size=4),
    shfl_jax.ShflBW(0.5, group_size=4),
    shfl_jax.BW(0.5, block_size=4),
    shfl_jax.TW(0.5, tile_size=8),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_repair_lowers_the_error_of_every_pattern(mlp, pattern):
    model, params, batches = mlp
    masked = prune_one_shot(model, params, plan(pattern), batches, score="magnitude", repair=False)
    repaired = prune_one_shot(model, params, plan(pattern), batches, score="magnitude")
    assert [layer.path for layer in repaired.layers] == [f"{name}/kernel" for name in ("first", "middle", "second")]
    for before, after in zip(masked.layers, repaired.layers, strict=True):
        assert before.error == before.masked_error
        assert after.error < after.masked_error
        assert 0 < after.retained <= 1
        assert after.tokens == 96
        assert after.sparsity == pytest.approx(0.5, abs=0.13)  # TW's floors on a layer this small
    errors = [model_error(model, params, result.params, batches) for result in (masked, repaired)]
    assert errors[1] < errors[0]
    for path, mask in repaired.masks.items():
        kernel = np.asarray(shfl_jax.path_leaves(repaired.params)[path])
        assert not kernel.T[~np.asarray(mask.elements())].any()
    # The masks without repair are the magnitudes' own, and the kept weights are the old ones.
    for spec in masked.masks.specs:
        weight = spec.to_matrix(shfl_jax.path_leaves(params)[spec.path])
        expected = jax.jit(shfl_jax.mask, static_argnums=1)(jnp.abs(weight), pattern)
        np.testing.assert_array_equal(masked.masks[spec.path].elements(), expected.elements())
    jax.tree.map(np.testing.assert_array_equal, masked.params, masked.masks.apply(params))


def test_reported_errors_are_those_of_the_layers_on_pruned_inputs(mlp):
    model, params, batches = mlp
    result = prune_one_shot(model, params, plan(shfl_jax.VW(0.5, group_size=4)), batches)
    x = np.concatenate(batches).reshape(-1, 16).astype(np.float64)
    for layer, name in zip(result.layers, ("first", "middle", "second"), strict=True):
        dense, pruned = (np.asarray(tree[name]["kernel"], np.float64) for tree in (params, result.params))
        expected = np.square(x @ (dense - pruned)).sum() / np.square(x @ dense).sum()
        assert layer.error == pytest.approx(expected, rel=1e-3)
        x = np.maximum(x @ pruned + np.asarray(params[name]["bias"]), 0)


def test_compressed_model_runs_like_the_repaired_one(mlp):
    model, params, batches = mlp
    result = prune_one_shot(model, params, plan(shfl_jax.ShflBW(0.5, group_size=4)), batches)
    sparse = shfl_jax.compress(result.params, result.masks)
    np.testing.assert_allclose(
        shfl_jax.linen.apply(model, sparse, batches[0]), model.apply({"params": result.params}, batches[0]), atol=1e-5
    )


def test_a_global_allocation_ranks_the_scores_of_the_dense_model(mlp):
    model, params, batches = mlp
    pattern = shfl_jax.VW(0.5, group_size=4)
    result = prune_one_shot(model, params, plan(pattern), batches, repair=False, allocation="global")
    scores, x = {}, np.concatenate(batches).reshape(-1, 16)
    for name in ("first", "middle", "second"):
        kernel, bias = (np.asarray(params[name][part]) for part in ("kernel", "bias"))
        scores[f"{name}/kernel"] = jnp.asarray(np.abs(kernel.T) * np.linalg.norm(x, axis=0))
        x = np.maximum(x @ kernel + bias, 0)
    specs = {spec.path: spec for spec in result.masks.specs}
    counts = shfl_jax.allocate(scores, specs, method="global")
    assert {path: int(mask.kept.sum()) for path, mask in result.masks.items()} == {p: int(n) for p, n in counts.items()}
    assert sum(map(int, counts.values())) == 3 * 32
    assert len(set(map(int, counts.values()))) > 1
    given = prune_one_shot(
        model, params, plan(pattern), batches, repair=False, allocation={path: 0.25 for path in specs}
    )
    assert {layer.sparsity for layer in given.layers} == {0.25}


@pytest.mark.parametrize("score", ["wanda", "obs", "taylor"])
def test_scores_choose_the_weights(mlp, score):
    model, params, batches = mlp
    pattern = shfl_jax.Unstructured(0.5)

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    result = prune_one_shot(model, params, plan(pattern), batches, score=score, repair=False, loss=loss)
    weight = np.asarray(params["first"]["kernel"], np.float64).T
    x = np.concatenate(batches).reshape(-1, 16).astype(np.float64)
    gram = x.T @ x
    if score == "wanda":
        expected = np.abs(weight) * np.linalg.norm(x, axis=0)
    elif score == "obs":
        damped = gram + 0.01 * gram.diagonal().mean() * np.eye(16)
        expected = np.abs(weight) / np.sqrt(np.linalg.inv(damped).diagonal())
    else:
        gradients = [np.asarray(jax.grad(loss)(params, batch)["first"]["kernel"]).T for batch in batches]
        expected = sum((gradient * weight) ** 2 for gradient in gradients)
    kept = np.asarray(result.masks["first/kernel"].elements())
    assert kept.sum() == weight.size / 2
    assert expected[kept].min() > expected[~kept].max() * (1 - 1e-3)
    assert result.layers[0].retained == pytest.approx(expected[kept].sum() / expected.sum(), rel=1e-3)


def test_nnx_models(mlp):
    _, _, batches = mlp
    model = NnxMlp(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    result = prune_one_shot(model, None, plan(shfl_jax.VW(0.5, group_size=4)), batches)
    assert [layer.path for layer in result.layers] == ["first/kernel", "second/kernel"]
    assert all(layer.error < layer.masked_error for layer in result.layers)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))
    nnx.update(model, result.params)
    sparse = shfl_jax.nnx.sparsify(model, result.masks)
    np.testing.assert_allclose(sparse(batches[0]), model(batches[0]), atol=1e-5)


def test_counts_override_the_patterns(mlp):
    model, params, batches = mlp
    counts = {"middle/kernel": 100}
    result = prune_one_shot(model, params, plan(shfl_jax.Unstructured(0.5)), batches, counts=counts)
    assert int(result.masks["middle/kernel"].elements().sum()) == 100
    assert int(result.masks["first/kernel"].elements().sum()) == 128


def test_the_table_names_every_layer(mlp):
    model, params, batches = mlp
    result = prune_one_shot(model, params, plan(shfl_jax.Unstructured(0.5)), batches)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(result)
    text = console.export_text()
    for layer in result.layers:
        assert layer.path in text
        assert f"{layer.masked_error:.1%}" in text
        assert f"{layer.error:.1%}" in text


def test_errors_name_the_layer_and_the_fix(mlp):
    model, params, batches = mlp
    good = plan(shfl_jax.VW(0.5, group_size=4))
    few = [batches[0][:1, :4]]
    with pytest.raises(ValueError, match=r"first/kernel \(16, 16\): 4 calibration tokens .*16 inputs.*repair=False"):
        prune_one_shot(model, params, good, few)
    prune_one_shot(model, params, good, few, repair=False)  # the fix works
    for kwargs, text in (
        ({"score": "random"}, "unknown score 'random'"),
        ({"score": "taylor"}, "needs a loss"),
        ({"damping": 0.0}, "damping must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            prune_one_shot(model, params, good, batches, **kwargs)
    with pytest.raises(ValueError, match="at least one calibration batch"):
        prune_one_shot(model, params, good, iter([]))
    nan = [batches[0], batches[1] * np.nan]
    with pytest.raises(ValueError, match=r"first/kernel: the inputs hold NaN or inf in calibration batch 1"):
        prune_one_shot(model, params, good, nan)
    broken = shfl_jax.update_paths(params, {"middle/kernel": params["middle"]["kernel"].at[0, 0].set(jnp.inf)})
    with pytest.raises(ValueError, match=r"middle/kernel \(16, 16\): the kernel holds NaN or inf"):
        prune_one_shot(model, broken, good, batches)
    other = shfl_jax.update_paths(params, {"middle/kernel": jnp.ones((16, 17))})
    with pytest.raises(ValueError, match=r"middle/kernel: .*\(16, 16\).*\(16, 17\)"):
        prune_one_shot(model, other, good, batches)


def test_stacked_layers_are_refused_by_name():
    stacked = nn.scan(lambda module, x, _: (module(x), None), variable_axes={"params": 0}, split_rngs={"params": True})

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return stacked(nn.Dense(8, name="layers"), x, jnp.arange(3))[0]

    x = jnp.ones((4, 8))
    params = Stack().init(jax.random.key(0), x)["params"]
    with pytest.raises(NotImplementedError, match=r"layers/kernel \(3, 8, 8\).*unroll"):
        prune_one_shot(Stack(), params, plan(shfl_jax.Unstructured(0.5)), [x])
