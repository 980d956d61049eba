"""The packed Triton kernels: small products interpreted on the CPU, and every config lowered for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from benchmarks.packed import random_matrix
from pallas_kernels._backend import Call, Problem
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton._backend import Triton

H200 = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu"))
# Pallas announces the end of its Triton backend at every lowering: the one warning that may pass.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
CONFIGS = [None, configs.Config(16, 16, 64, split=2), configs.Config(16, 16, 32, prefetch=True, flip=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=["heuristic", "split", "flip"])
@pytest.mark.parametrize(
    ("pattern", "m", "n", "dtype"),
    [("shfl_tvw", 32, 5, "float32"), ("tvw", 40, 1, "float32"), ("tvw", 40, 8, "bfloat16")],
)
def test_the_packed_kernel(pattern, m, n, dtype, config):
    if config is not None and dtype == "bfloat16":
        config = dataclasses.replace(config, block_k=256)
    matrix = pk.prepare(random_matrix(pattern, m, 64, 0.75, 16, dtype), "triton")
    x, bias = jax.random.normal(jax.random.key(1), (64, n), dtype), jnp.linspace(-1, 1, m, dtype=dtype)
    y = Triton().forward(Call("relu", precision="highest"), matrix, x, bias, None, config)
    want = (
        np.asarray(pk.to_dense(matrix), np.float64) @ np.asarray(x, np.float64) + np.asarray(bias, np.float64)[:, None]
    )
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), np.maximum(want, 0), rtol=tolerance, atol=tolerance)


def test_steps_too_short_for_the_matrix_unit_are_refused():
    matrix = pk.prepare(random_matrix("tvw", 40, 64, 0.75, 16, "bfloat16"), "triton")
    x = jnp.ones((64, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="steps of 256 slots or more"):
        Triton().forward(Call(), matrix, x, None, None, CONFIGS[1])


def test_the_expanded_matrix_and_gradients():
    """Beyond `MOST_PACKED_TOKENS`, a K that is no multiple of four, and the derivative by the values."""
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(15).astype(np.int32), [15]])[None].astype(np.int32)
    choice = np.zeros((16, 16), bool)
    for four in np.sort(order.reshape(-1, 4)):
        choice[:, four[:2]] = True
    weight = rng.standard_normal((16, 15)).astype(np.float32)
    matrix = pk.from_dense_two_four(weight, np.arange(16, dtype=np.int32), order, choice[:, :15])
    x = jax.random.normal(jax.random.key(0), (15, 144))
    dense = np.where(choice[:, :15], weight, 0)

    def run(values, x):
        packed = pk.join(values, matrix.integers)
        return pk.matmul(packed, x, layout="feature_major", implementation="triton", precision="highest")

    for tokens in (8, 144):
        y, pull = jax.vjp(run, matrix.values, x[:, :tokens])
        np.testing.assert_allclose(y, dense @ np.asarray(x[:, :tokens]), rtol=1e-4, atol=1e-4)
        dvalues, dx = pull(jnp.ones_like(y))
        np.testing.assert_allclose(dx, np.repeat(dense.sum(0)[:, None], tokens, 1), rtol=1e-4, atol=1e-4)
        spread = pk.to_dense(pk.join(dvalues, matrix.integers))
        expected = np.where(choice[:, :15], np.asarray(x[:, :tokens]).sum(1), 0)
        np.testing.assert_allclose(spread, expected, rtol=1e-3, atol=1e-3)


def test_prepared_words_stand_for_the_same_weights():
    canonical = random_matrix("tvw", 100, 36, 0.75, 16, "float32", seed=3)
    prepared = pk.prepare(canonical, "triton")
    assert prepared.integers.pairs.dtype == np.uint16
    np.testing.assert_array_equal(pk.to_dense(prepared), pk.to_dense(canonical))


def forward(matrix, x, config):
    return Triton().forward(Call(), matrix, x, None, None, config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("pattern", "n"), [("shfl_tvw", 16), ("tvw", 64), ("shfl_tvw", 512)])
def test_every_config_lowers_for_cuda(pattern, n, dtype, monkeypatch):
    # Nothing is run here: tracing every kernel for the interpreter too would double the time.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    matrix = pk.prepare(random_matrix(pattern, 256, 512, 0.75, 128, dtype), "triton")
    x = jax.ShapeDtypeStruct((512, n), dtype)
    problem = Problem.of_layout("forward", matrix.layout, n, dtype)
    space = Triton().configs(problem, None) if n == 16 else (None,)
    with jax.sharding.use_abstract_mesh(H200):
        for config in space:
            run = functools.partial(forward, config=config)
            lowered = jax.jit(run).trace(matrix, x).lower(lowering_platforms=("cuda",)).as_text()
            assert "two_four" in lowered
