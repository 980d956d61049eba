"""ResNet-50's inference forms against the network as it is trained."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from benchmarks import resnet
from benchmarks.conv import RESNET50, Layer

STAGES, WIDTH = (1, 2), 8


run_dense = jax.jit(resnet.dense, static_argnums=(2, 3))
run_channels_first = jax.jit(resnet.channels_first, static_argnums=(2, 3))


@pytest.fixture(scope="module")
def network():
    """A small network with random statistics, images, and its folded units."""
    model, rng = resnet.ResNet(STAGES, WIDTH, 10), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 22, 18, 3)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(1), x)

    def draw(path, a):
        scale = np.prod(a.shape[:-1]) ** -0.5 if len(a.shape) > 1 else 0.3
        return jnp.asarray(rng.normal(float(path[-1].key in ("var", "scale")), scale, a.shape), a.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return jax.jit(model.apply)(variables, x), x, resnet.fold(variables)


@pytest.mark.parametrize("run", [run_dense, run_channels_first])
def test_folded_normalisation_changes_nothing(network, run):
    y, x, units = network
    np.testing.assert_allclose(run(units, x, STAGES, WIDTH), y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_a_stem_by_space_to_depth_changes_nothing():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 22, 18, 3), (8, 7, 7, 3)))
    units = {"stem": {"kernel": kernel, "bias": jnp.ones(8)}, "head": {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}}
    y, same = (resnet.dense(form, x, (), 8) for form in (units, resnet.space_to_depth(units)))
    np.testing.assert_allclose(same, y, rtol=1e-4)


def test_compressed_filters_run_channels_first(network):
    _, x, units = network
    rng, masked, compressed = np.random.default_rng(0), dict(units), dict(units)
    for name, unit in units.items():
        if name in ("head", "stem"):
            continue
        kernel = np.asarray(unit["kernel"])
        weight = kernel.reshape(len(kernel), -1)
        kept = rng.random((weight.shape[0] // 8, weight.shape[1])) < 0.5
        filters = pk.from_dense(weight, rng.permutation(weight.shape[0]).astype(np.int32), kept)
        compressed[name] = unit | {"kernel": filters}
        masked[name] = unit | {"kernel": jnp.asarray(pk.to_dense(filters)).reshape(kernel.shape)}
    y = run_dense(masked, x, STAGES, WIDTH)
    found = run_channels_first(compressed, x, STAGES, WIDTH)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_the_layers_that_are_measured_are_those_of_the_network():
    model = resnet.ResNet()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    params = shapes["params"]
    found = collections.Counter()
    for conv, channels, image in resnet.convolutions():
        assert params[conv.name]["kernel"].shape == (conv.kernel, conv.kernel, channels, conv.features)
        found[Layer(channels, conv.features, conv.kernel, conv.stride, image)] += 1
    assert sum(found.values()) == sum("kernel" in unit for unit in params.values()) - 1
    assert found == {dataclasses.replace(layer, count=1): layer.count for layer in RESNET50}
