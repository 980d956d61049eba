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


@pytest.fixture(scope="module")
def network():
    """A small network with random statistics, images, and its folded units."""
    model, x = resnet.ResNet(STAGES, WIDTH, 10), jax.random.normal(jax.random.key(0), (2, 21, 18, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [a + 0.3 * jax.random.uniform(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    variables = jax.tree.unflatten(structure, leaves)
    return jax.jit(model.apply)(variables, x), x, resnet.fold(variables)


@pytest.mark.parametrize("form", [resnet.dense, resnet.channels_first])
def test_folded_normalisation_changes_nothing(network, form):
    y, x, units = network
    found = jax.jit(form, static_argnums=(2, 3))(units, x, STAGES, WIDTH)
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_compressed_filters_run_channels_first(network):
    _, x, units = network
    rng, masked, compressed = np.random.default_rng(0), dict(units), dict(units)
    for name, unit in units.items():
        if name in ("head", "stem"):
            continue
        kernel = np.asarray(unit["kernel"])
        weight = kernel.reshape(-1, kernel.shape[-1]).T
        kept = rng.random((weight.shape[0] // 8, weight.shape[1])) < 0.5
        filters = pk.from_dense(weight, rng.permutation(weight.shape[0]).astype(np.int32), kept)
        compressed[name] = unit | {"kernel": filters}
        masked[name] = unit | {"kernel": jnp.asarray(pk.to_dense(filters)).T.reshape(kernel.shape)}
    run = jax.jit(resnet.channels_first, static_argnums=(2, 3))
    y = jax.jit(resnet.dense, static_argnums=(2, 3))(masked, x, STAGES, WIDTH)
    np.testing.assert_allclose(run(compressed, x, STAGES, WIDTH), y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


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
