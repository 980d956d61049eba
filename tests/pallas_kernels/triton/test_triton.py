"""What only the Triton backend has: lowering for CUDA without a GPU, offsets beyond 32 bits, its arrangement, speed."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import triton as triton_lib
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxlib.mlir import ir

import pallas_kernels as pk
from pallas_kernels import tune
from pallas_kernels._backend import Call, Problem
from pallas_kernels._devices import GPU
from pallas_kernels._layout import as_prepared, to_dense
from pallas_kernels.gpu import _layout as layout
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton._backend import Triton
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._grad import slot_table

TRITON = Triton()
H200 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))

# Pallas announces the end of its Triton backend at every lowering: the one warning that may pass.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def forward(activation=None):
    call = Call(activation)
    return lambda matrix, x, bias: TRITON.forward(call, as_prepared(matrix), x, bias, None)


@pytest.fixture(autouse=True)
def ieee():
    """On a GPU float32 products are TF32 by default; here they are compared with float64."""
    with jax.default_matmul_precision("highest"):
        yield


def lower(function, *args):
    with use_abstract_mesh(H200):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


def kernels(lowered) -> list[str]:
    """The Triton IR of every kernel of a lowered function, as text."""
    found = []

    def visit(op):
        config = op.attributes.get("mhlo.backend_config", None)
        if config is not None and isinstance(config, ir.DictAttr) and "ir" in config:
            with ir.Context() as context:
                triton_lib.dialect.register_dialect(context)
                found.append(str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes, context)))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return found


def space():
    """Every (op, config) of the search space once, with a problem it belongs to."""
    seen = {}
    for op, v, n in [
        ("forward", 128, 512), ("forward", 64, 512), ("forward", 16, 512), ("forward", 128, 16), ("forward", 16, 16),
        ("grad_values", 128, 64), ("grad_values", 16, 64), ("grad_input", 128, 64), ("grad_input", 16, 8),
    ]:  # fmt: skip
        problem = Problem(op, 256, 128, n, 256 // v * 64, v, "bfloat16")
        for config in configs.search_space(problem):
            seen.setdefault((op, config), problem)
    return seen


@pytest.mark.parametrize("op", ["forward", "grad_values", "grad_input"])
def test_every_config_of_the_search_space_lowers_for_cuda(op, monkeypatch):
    # Nothing is run here: tracing every kernel for the interpreter too would double the time.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    count = 0
    by_problem = collections.defaultdict(list)
    for (problem_op, config), problem in space().items():
        if problem_op == op:
            by_problem[problem].append(config)
            count += 1
    for problem, found in by_problem.items():
        matrix = tune.random_matrix(problem.m, problem.k, 0.5, problem.group_size)
        x, dy = jnp.zeros((problem.k, problem.n), "bfloat16"), jnp.zeros((problem.m, problem.n), "bfloat16")
        for config in found:
            assert "xla.gpu.triton" in lower(tune.product(op, config), matrix, x, dy).as_text(), config
    assert count >= 16


@pytest.mark.parametrize("kind", ["Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 3090", "NVIDIA A100-SXM4-40GB"])
def test_a_gpu_that_pallas_does_not_know_takes_xla(kind):
    matrix, x = tune.random_matrix(256, 256, 0.5, 128), jnp.zeros((256, 512), jnp.bfloat16)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 80, "gpu"))):
        product = jax.jit(functools.partial(pk.matmul, layout="feature_major"))
        text = product.trace(matrix, x).lower(lowering_platforms=("cuda",)).as_text()
    assert ("xla.gpu.triton" in text) == GPU(kind).runs_triton
    assert GPU("NVIDIA A100-SXM4-40GB").runs_triton


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_ragged_counts_and_epilogues_lower_for_cuda(dtype):
    matrix = tune.random_matrix(100, 70, 0.5, 32, equal=False, dtype=dtype)
    x, bias = jnp.zeros((70, 33), dtype), jnp.zeros(100, dtype)
    for arranged in (matrix, pk.prepare(matrix, "triton")):
        for activation in ("gelu", "silu", "relu"):
            assert len(kernels(lower(forward(activation), arranged, x, bias))) == 1
    gradients = jax.grad(
        lambda m, x: pk.matmul(m, x.T, implementation="triton").astype(float).sum(), (0, 1), allow_int=True
    )
    assert len(kernels(lower(gradients, matrix, x))) >= 3


@pytest.mark.parametrize(("tokens", "bits"), [(1024, 32), (2**17, 64)])
def test_offsets_beyond_2_31_elements_take_64_bits(tokens, bits):
    matrix = tune.random_matrix(128, 2**15, 0.75, 128)
    x = jax.ShapeDtypeStruct((2**15, tokens), jnp.bfloat16)
    (text,) = kernels(lower(lambda m, x: forward()(m, x, None), matrix, x))
    # The gather of x is the load of a (slots, tokens) tile of bf16; its pointers are made by adding the offsets.
    config = configs.config(Problem("forward", 128, 2**15, tokens, 2**13, 128, "bfloat16"))
    tile = f"tensor<{config.block_k}x{config.block_tokens}x"
    assert f"{tile}!tt.ptr<bf16>>, {tile}i{bits}>" in text


def test_no_kernel_but_ours_runs_for_an_equal_product():
    matrix = tune.random_matrix(256, 256, 0.5, 128)
    x = jnp.zeros((256, 512), jnp.bfloat16)
    text = lower(forward("gelu"), matrix, x, jnp.zeros(256, jnp.bfloat16)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    assert "stablehlo.gather" not in text
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(("m", "v", "sparsity"), [(256, 64, 0.75), (100, 32, 0.6)])
def test_prepare_pads_and_sorts(equal, m, v, sparsity):
    matrix = tune.random_matrix(m, 160, sparsity, v, equal=equal, dtype="float32")
    prepared = pk.prepare(matrix, "triton")
    lengths = np.diff(np.asarray(prepared.integers.group_ptr))
    assert (lengths % layout.SEGMENT == 0).all()
    assert (np.diff(lengths) <= 0).all()
    np.testing.assert_array_equal(to_dense(prepared), to_dense(matrix))
    padding = np.ones(prepared.integers.num_slots, bool)
    counts = lengths if prepared.integers.counts is None else np.asarray(prepared.integers.counts)
    for begin, count in zip(prepared.integers.group_ptr[:-1], counts, strict=True):
        kept = np.asarray(prepared.integers.columns[begin : begin + count])
        padding[begin : begin + count] = False
        end = begin + -(-count // layout.SEGMENT) * layout.SEGMENT
        assert set(np.asarray(prepared.integers.columns[begin:end])) == set(kept)  # padding repeats what is read anyway
    assert not np.asarray(prepared.values)[padding].any()


def test_equal_counts_that_fit_stay_as_they_are():
    matrix = tune.random_matrix(128, 128, 0.5, 64)
    prepared = pk.prepare(matrix, "triton")
    assert prepared.values is matrix.values
    assert prepared.layout.order is None


def test_what_the_kernels_cannot_do_falls_through():
    odd = tune.random_matrix(30, 16, 0.5, 6, dtype="float32")
    with pytest.raises(NotImplementedError, match="groups have 16, 32, 64"):
        pk.matmul(odd, jnp.zeros((4, 16)), implementation="triton")
    text = lower(lambda m, x: pk.matmul(m, x), odd, jnp.zeros((4, 16))).as_text()
    assert "xla.gpu.triton" not in text
    (reason,) = TRITON.why_not(Problem("forward", 30, 16, 4, 16, 16, "float8_e4m3fn"))
    assert "it computes in" in reason


def test_the_default_on_cuda_is_triton_and_elsewhere_xla():
    matrix, x = tune.random_matrix(64, 64, 0.5, 32, dtype="float32"), jnp.zeros((8, 64))
    assert "xla.gpu.triton" in lower(pk.matmul, matrix, x).as_text()
    assert "triton" not in jax.jit(pk.matmul).trace(matrix, x).lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("config", [
    Config(32, 16, 16, prefetch=True), Config(16, 32, 16, flip=True, tokens_first=True),
    Config(32, 16, 16, split=2, prefetch=True), Config(64, 16, 32, early_rows=True),
])  # fmt: skip
@pytest.mark.parametrize("equal", [True, False])
def test_every_knob_computes_the_same(config, equal):
    matrix = pk.prepare(tune.random_matrix(60, 96, 0.6, 32, equal=equal, dtype="float32"), "triton")
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((size, 24)), jnp.float32) for size in (96, 60))
    want = np.asarray(to_dense(matrix), np.float64)
    y = tune.product("forward", config)(matrix, x, dy)
    np.testing.assert_allclose(y, want @ np.asarray(x, np.float64), atol=1e-5, rtol=1e-5)
    dx = tune.product("grad_input", dataclasses.replace(config, flip=False))(matrix, x, dy)
    np.testing.assert_allclose(dx, want.T @ np.asarray(dy, np.float64), atol=1e-5, rtol=1e-5)
    got = tune.product("grad_values", dataclasses.replace(config, flip=False))(matrix, x, dy)
    full = dataclasses.replace(matrix, values=got)
    outer = np.asarray(dy, np.float64) @ np.asarray(x, np.float64).T
    np.testing.assert_allclose(to_dense(full), np.where(want != 0, outer, 0), atol=1e-4, rtol=1e-4)


def test_slot_table():
    matrix = tune.random_matrix(64, 40, 0.5, 16, equal=False, dtype="float32")
    for arranged in (matrix, pk.prepare(matrix, "triton")):
        topology = as_prepared(arranged).layout
        table = np.asarray(slot_table(topology))
        want = np.full(table.shape, topology.num_slots)
        counts = np.diff(topology.group_ptr) if topology.counts is None else topology.counts
        for group, (begin, count) in enumerate(zip(topology.group_ptr[:-1], counts, strict=True)):
            want[group, np.asarray(topology.columns)[begin : begin + count]] = np.arange(begin, begin + count)
        np.testing.assert_array_equal(table, want)


def test_many_tokens_decompress_and_few_do_not():
    matrix = tune.random_matrix(64, 96, 0.5, 32, dtype="float32")
    dense = np.asarray(to_dense(matrix), np.float64)
    for n, decompressed in ((8, False), (264, True)):
        dy = jnp.asarray(np.random.default_rng(0).standard_normal((n, 64)), jnp.float32)

        def grad(matrix, dy):
            return TRITON.grad_input(Call(layout="token_major"), as_prepared(matrix), dy)

        np.testing.assert_allclose(grad(matrix, dy), np.asarray(dy, np.float64) @ dense, atol=1e-5, rtol=1e-5)
        assert ("64x96xf32" in lower(grad, matrix, dy).as_text()) == decompressed


@pytest.fixture
def gpu():
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("needs a CUDA device")


def test_offsets_beyond_2_31_elements_are_right_on_a_gpu(gpu):
    matrix = tune.random_matrix(16, 2**13, 0.99, 16)
    tokens = 2**18 + 8
    x = jax.random.normal(jax.random.key(0), (2**13, tokens), jnp.bfloat16)
    y = pk.matmul(matrix, x, layout="feature_major", implementation="triton")
    dense = np.asarray(to_dense(matrix).astype(jnp.float32), np.float64)
    want = dense @ np.asarray(x[:, -8:].astype(jnp.float32), np.float64)
    np.testing.assert_allclose(np.asarray(y[:, -8:].astype(jnp.float32)), want, rtol=2e-2, atol=2e-2)
