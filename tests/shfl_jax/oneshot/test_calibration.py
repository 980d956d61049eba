"""Inputs gathered layer by layer are the ones the model really sees, and later layers see earlier changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax.oneshot._calibration import Inputs, calibrate


class Net(nn.Module):
    """Attention and an MLP with a jitted and a rematerialised part, which `plain` does without."""

    plain: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        up, down = (nn.Dense, nn.Dense) if self.plain else (nn.remat(nn.Dense), nn.jit(nn.Dense))
        return down(8, name="down")(jax.nn.gelu(up(24, name="up")(x)))


PLAN = shfl_jax.Plan({".*": shfl_jax.VW(0.5, group_size=4)})


@pytest.fixture(scope="module")
def net():
    model = Net()
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(3, 5, 8)).astype(np.float32),), (rng.normal(size=(2, 5, 8)).astype(np.float32),)]
    params = model.init(jax.random.key(0), *batches[0])["params"]
    return model, params, batches, shfl_jax.linen.resolve(PLAN, model, *batches[0])


def forward(model, params):
    return lambda leaves, constants, *batch: model.apply({"params": shfl_jax.update_paths(params, leaves)}, *batch)


def captured(params, batches):
    """The inputs of every layer as float64 matrices (tokens, K), by running the model and looking."""
    found = {}

    def look(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dense | nn.DenseGeneral) and context.method_name == "__call__":
            axes = module.axis if isinstance(module, nn.DenseGeneral) else -1
            axes = (axes,) if isinstance(axes, int) else tuple(axes)
            x = np.moveaxis(np.asarray(args[0], np.float64), axes, range(-len(axes), 0))
            found.setdefault("/".join((*module.path, "kernel")), []).append(
                x.reshape(-1, np.prod(x.shape[-len(axes) :]))
            )
        return call(*args, **kwargs)

    for batch in batches:
        with nn.intercept_methods(look):
            Net(plain=True).apply({"params": params}, *batch)
    return {path: np.concatenate(parts) for path, parts in found.items()}


def test_gram_matrices_equal_a_float64_reference(net):
    model, params, batches, specs = net
    seen: dict[str, Inputs] = {}
    order = []

    def visit(inputs):
        order.append(set(inputs.paths))
        seen.update(dict.fromkeys(inputs.paths, inputs))
        return {}

    leaves = shfl_jax.path_leaves(params)
    after = calibrate(forward(model, params), leaves, batches, specs, visit)
    assert all(after[path] is leaves[path] for path in leaves)
    attention = {f"attention/{name}/kernel" for name in ("query", "key", "value")}
    assert order == [attention, {"attention/out/kernel"}, {"up/kernel"}, {"down/kernel"}]
    for path, x in captured(params, batches).items():
        assert seen[path].tokens == 25
        np.testing.assert_allclose(seen[path].gram, x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen[path].norms, np.linalg.norm(x, axis=0), rtol=1e-4)


def test_later_layers_see_new_kernels(net):
    model, params, batches, specs = net
    seen = {}

    def visit(inputs):
        seen.update(dict.fromkeys(inputs.paths, inputs))
        return {path: 0.5 * shfl_jax.path_leaves(params)[path] for path in inputs.paths}

    after = calibrate(forward(model, params), shfl_jax.path_leaves(params), batches, specs, visit)
    changed = shfl_jax.update_paths(params, {path: after[path] for path in specs})
    for path, x in captured(changed, batches).items():
        np.testing.assert_allclose(seen[path].gram, x.T @ x, rtol=1e-4, atol=1e-4)


def test_low_precision_kernels_are_replaced_too(net):
    _, _, batches, _ = net
    model = nn.Sequential([nn.Dense(8, dtype=jnp.bfloat16), nn.relu, nn.Dense(8, dtype=jnp.bfloat16)])
    params = model.init(jax.random.key(1), *batches[0])["params"]
    specs = shfl_jax.linen.resolve(PLAN, model, *batches[0])
    second = {}

    def visit(inputs):
        if inputs.paths == ("layers_2/kernel",):
            second["gram"] = np.asarray(inputs.gram)
        return {path: jnp.zeros(specs[path].shape) for path in inputs.paths}

    calibrate(forward(model, params), shfl_jax.path_leaves(params), batches, specs, visit)
    assert not second["gram"].any()  # relu(0 x): the cast of the first kernel was not kept from before


def test_errors_name_the_layer(net):
    model, params, batches, specs = net
    leaves = shfl_jax.path_leaves(params)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(forward(model, params), leaves, [], specs, lambda inputs: {})
    poisoned = [batches[0], (np.full_like(batches[1][0], np.nan),)]
    with pytest.raises(ValueError, match=r"attention/query/kernel.*NaN or inf in calibration batch 1"):
        calibrate(forward(model, params), leaves, poisoned, specs, lambda inputs: {})
    with pytest.raises(ValueError, match=r"down/kernel \(24, 8\): the layer never ran"):
        calibrate(lambda p, c, x: x @ p["up/kernel"], leaves, batches, {"up/kernel": specs["up/kernel"],
                  "down/kernel": specs["down/kernel"]}, lambda inputs: {})  # fmt: skip

    def twice(leaves, constants, x):
        return (x @ leaves["up/kernel"]).sum() + (2 * x @ leaves["up/kernel"]).sum()

    with pytest.raises(NotImplementedError, match=r"up/kernel \(8, 24\): the layer runs 2 times"):
        calibrate(twice, leaves, batches, {"up/kernel": specs["up/kernel"]}, lambda inputs: {})

    def looped(leaves, constants, x):
        return jax.lax.fori_loop(0, 2, lambda i, y: y + (x @ leaves["up/kernel"]).sum(), 0.0)

    with pytest.raises(NotImplementedError, match=r"up/kernel .* inside a loop"):
        calibrate(looped, leaves, batches, {"up/kernel": specs["up/kernel"]}, lambda inputs: {})
