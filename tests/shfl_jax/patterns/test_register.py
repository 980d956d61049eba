"""A pattern and a backend from outside the library go through all of it with one registration each."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import pallas_kernels
import shfl_jax
from shfl_jax import pruning
from shfl_jax.patterns import group_scores, padded_rows, rank_keys, register, registered, top


@register
@dataclasses.dataclass(frozen=True)
class Bricks(shfl_jax.Pattern):
    """Keeps blocks of `height` outputs by `width` inputs."""

    height: int = 8
    width: int = 4
    name: ClassVar[str] = "bricks"

    @property
    def group_size(self):
        return self.height

    def units(self, shape):
        return -(-shape[0] // self.height) * -(-shape[1] // self.width)

    def unit_keys(self, scores):
        rows, columns = padded_rows(scores.shape[0], self.height), padded_rows(scores.shape[1], self.width)
        courses = group_scores(scores, rows, self.height)
        return rank_keys(group_scores(courses.T, columns, self.width).T).reshape(-1)

    def mask(self, scores, count, previous=None):
        m, k = scores.shape
        kept = top(self.unit_keys(scores), count).reshape(-(-m // self.height), -1)
        return shfl_jax.Mask(padded_rows(m, self.height), jnp.repeat(kept, self.width, axis=1)[:, :k], m)


@dataclasses.dataclass(frozen=True)
class Ours(pallas_kernels.Backend):
    """A backend whose product shows in a lowered program; derivatives are left to others."""

    name: ClassVar[str] = "ours"
    platforms: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def why_not(self, problem):
        return [] if problem.op == "forward" else ["it has no derivatives"]

    def forward(self, call, matrix, x, bias, addend, config=None):
        with jax.named_scope("by_our_backend"):
            y = x @ pallas_kernels.to_dense(matrix).T
        return y if bias is None else y + bias


@pytest.fixture
def backend(registry):
    pallas_kernels.register(Ours())
    return "ours"


@dataclasses.dataclass(frozen=True)
class Unknown(shfl_jax.VW):
    """Registered by nobody; it even has the name of its parent."""


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="out")(nn.relu(nn.Dense(32, name="hidden")(x)))


MODEL, PATTERN = MLP(), Bricks(0.75, width=2)
PLAN = shfl_jax.Plan({"hidden/kernel": PATTERN, "out/kernel": Bricks(0.5)})
X = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
PARAMS = MODEL.init(jax.random.key(0), X)["params"]


def train():
    specs = shfl_jax.linen.resolve(PLAN, MODEL, X)
    tx = pruning.prune(optax.sgd(0.1), specs, pruning.cubic(begin=1, end=3, every=1))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.square(MODEL.apply({"params": params}, X) - 1).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    return params, pruning.masks(state)


def one_shot():
    found = shfl_jax.prune_one_shot(MODEL, PARAMS, PLAN, [X], allocation="global")
    assert [layer.pattern for layer in found.layers] == ["bricks", "bricks"]
    return found.params, found.masks


@pytest.mark.parametrize("prune", [train, one_shot])
def test_a_users_pattern_and_backend_go_all_the_way(prune, tmp_path, backend):
    params, masks = prune()
    for path, sparsity in (("hidden/kernel", 0.75), ("out/kernel", 0.5)):
        mask = np.asarray(masks[path].elements())
        kernel = np.asarray(shfl_jax.path_leaves(params)[path]).T
        assert mask.mean() == 1 - sparsity
        assert not kernel[~mask].any()
        assert kernel[mask].all()
        np.testing.assert_array_equal(mask, np.repeat(mask[::8], 8, axis=0))

    sparse = shfl_jax.compress(params, masks)
    np.testing.assert_array_equal(shfl_jax.decompress(sparse)["hidden"]["kernel"], params["hidden"]["kernel"])
    expected = MODEL.apply({"params": params}, X)
    np.testing.assert_allclose(shfl_jax.linen.apply(MODEL, sparse, X), expected, rtol=1e-5, atol=1e-5)

    lowered = jax.jit(lambda sparse: shfl_jax.linen.apply(MODEL, sparse, X)).lower(sparse)
    assert "by_our_backend" in lowered.as_text(debug_info=True)
    matrix = shfl_jax.sparse.matrices(sparse)["hidden/kernel"]
    np.testing.assert_allclose(
        pallas_kernels.matmul(matrix, X, implementation=backend), X @ params["hidden"]["kernel"], rtol=1e-5, atol=1e-5
    )
    prepared = shfl_jax.prepare(sparse, backend)
    np.testing.assert_allclose(shfl_jax.linen.apply(MODEL, prepared, X), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda params: shfl_jax.linen.apply(MODEL, {**sparse, "params": params}, X).sum())
    assert jax.tree.map(jnp.shape, gradient(sparse["params"])) == jax.tree.map(jnp.shape, sparse["params"])
    assert all(timing.time_us > 0 for row in shfl_jax.report(sparse, tokens=4).layers for timing in row.timings)

    rows = {row.path: row for row in shfl_jax.report(sparse).layers}
    hidden = rows["hidden/kernel"]
    assert (hidden.pattern, hidden.group_size, hidden.route, hidden.sparsity) == ("bricks", 8, "row-grouped", 0.75)
    assert "bricks" in str(shfl_jax.report(sparse))

    shfl_jax.save(tmp_path / "model", sparse)
    loaded = shfl_jax.load(tmp_path / "model")
    assert loaded["topology"]["hidden"]["kernel"].spec == masks.spec("hidden/kernel")
    assert loaded["topology"]["hidden"]["kernel"].spec.pattern == PATTERN
    jax.tree.map(np.testing.assert_array_equal, loaded, sparse)


def test_saving_an_unregistered_pattern_says_how_to_register_it(tmp_path):
    spec = shfl_jax.LayerSpec("kernel", (16, 32), (), (0,), (1,), Unknown(0.5, 8))
    mask = shfl_jax.mask(jnp.abs(PARAMS["hidden"]["kernel"].T), spec.pattern)
    sparse = shfl_jax.compress({"kernel": PARAMS["hidden"]["kernel"]}, shfl_jax.Masks({"kernel": mask}, (spec,)))
    with pytest.raises(ValueError, match=r"Unknown\(.*decorate .*Unknown with `@shfl_jax.patterns.register`"):
        shfl_jax.save(tmp_path / "model", sparse)
    assert not (tmp_path / "model").exists()


def test_a_name_stands_for_one_class():
    with pytest.raises(ValueError, match=r"test_register.Unknown cannot be registered as 'vw', .*_vector.VW;"):
        register(Unknown)
    with pytest.raises(ValueError, match="has no name to register"):
        register(shfl_jax.Pattern)
    assert registered()["vw"] is shfl_jax.VW


def test_a_class_defined_anew_takes_its_own_place():
    again = dataclasses.dataclass(frozen=True)(type("Bricks", (Bricks,), {"__module__": Bricks.__module__}))
    try:
        assert register(again) is again
        assert registered()["bricks"] is again
    finally:
        register(Bricks)
    assert registered()["bricks"] is Bricks
