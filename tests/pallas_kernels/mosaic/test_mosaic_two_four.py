"""Packed 2:4 on sparse tensor cores: lowering for CUDA without a GPU, layouts played in NumPy, products on a GPU."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as pk
from pallas_kernels import _pairs as pairs
from pallas_kernels._backend import Call
from pallas_kernels._layout import as_prepared, to_dense
from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic import _sparse as sparse
from pallas_kernels.mosaic._backend import Mosaic
from pallas_kernels.mosaic._configs import Config

# Preparing for this backend is preparing for Triton, whose end Pallas announces at every lowering.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# (group size, tokens, config)
CASES = [
    (64, 520, Config(stages=5)),
    (64, 520, Config(block_tokens=512, stages=3)),
    *((128, 520, Config(stages=5, split=split, band=2)) for split in ("rows", "tokens")),
    (128, 1043, Config(stages=4, split="rows", ahead=8)),
    *((256, 264, Config(block_tokens=128, split=split)) for split in ("rows", "tokens")),
    *((128, n, None) for n in (1, 2, 7, 8, 16, 17, 32, 64, 65, 200)),
    *((256, n, None) for n in (3, 16, 40)),
]


def forward(config=None, activation=None, layout="feature_major"):
    def run(matrix, x, bias):
        return Mosaic().forward(Call(activation, layout), as_prepared(matrix), x, bias, None, config)

    return run


def packed(v, m=300, k=200, dtype="bfloat16", seed=0, ragged=True):
    """A random packed matrix: counts that divide nothing, fours that are not full, sentinel rows anywhere."""
    rng = np.random.default_rng([seed, v])
    r = -(-m // v)
    rows = np.full(r * v, m, np.int32)
    rows[rng.permutation(r * v)[:m]] = rng.permutation(m)
    counts = rng.integers(k // 4, k + 1, r) if ragged else np.full(r, k // 256 * 256 or 64)
    counts[-1] *= not ragged
    order = np.full((r, 4 * -(-k // 4)), k, np.int32)
    choice = np.zeros((m, k + 1), bool)
    for group, count in enumerate(counts):
        order[group, :count] = rng.permutation(k)[:count]
        fours = order[group].reshape(-1, 4)
        keys = np.where(fours < k, rng.random((v, *fours.shape)), 2)
        two = np.take_along_axis(np.broadcast_to(fours, keys.shape), np.argsort(keys, -1)[..., :2], -1)
        for row, kept in zip(rows.reshape(r, v)[group], two.reshape(v, -1), strict=True):
            if row < m:
                choice[row, kept] = True
    weight = np.asarray(jnp.asarray(rng.standard_normal((m, k)), dtype))
    return pk.from_dense_two_four(weight, rows, order, choice[:, :k])


def operands(v, n, dtype="bfloat16", m=300, k=200, ragged=True):
    matrix = pk.prepare(packed(v, m, k, dtype, ragged=ragged), "mosaic_gpu")
    keys = jax.random.split(jax.random.key(0))
    return matrix, jax.random.normal(keys[0], (k, n), dtype), jax.random.normal(keys[1], (m,), dtype)


def gpu_mesh(kind="NVIDIA H200"):
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 132, "gpu")))


def lower(function, *args):
    with gpu_mesh():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("v", "n", "config"), CASES)
def test_every_config_lowers_for_cuda(v, n, config):
    assert "wgmma.mma_async.sp" in lower(forward(config, "gelu"), *operands(v, n))


@pytest.mark.parametrize(("v", "n", "taken"), [(128, 16, True), (128, 520, True), (64, 16, False), (64, 520, True)])
def test_the_default_takes_it_where_it_pays(v, n, taken):
    matrix, x, _ = operands(v, n)
    text = lower(functools.partial(pk.matmul, layout="feature_major", activation="relu"), matrix, x)
    assert ("wgmma.mma_async.sp" in text) == taken
    assert ("xla.gpu.triton" in text) != taken
    for layout, shape in (("CHWN", (200, 1, n // 8, 8)), ("NHWC", (8, n // 8, 1, 200))):
        one_by_one = functools.partial(pk.conv2d, kernel_size=(1, 1), layout=layout)
        assert ("wgmma.mma_async.sp" in lower(one_by_one, matrix, jnp.zeros(shape, x.dtype))) == taken


def test_steps_that_are_none_fall_through():
    # 48 slots a group, as they are compressed: no whole step of 64.
    matrix = pk.from_dense_two_four(
        np.ones((256, 96)),
        np.arange(256, dtype=np.int32),
        np.tile(np.arange(48, dtype=np.int32), (2, 1)),
        np.tile(np.arange(96) % 4 < 2, (256, 1)) & (np.arange(96) < 48),
    )
    matrix = pk.join(matrix.values.astype(jnp.bfloat16), matrix.integers)
    text = lower(functools.partial(pk.matmul, layout="feature_major"), matrix, jnp.zeros((96, 16), jnp.bfloat16))
    assert "xla.gpu.triton" in text


def test_by_name_gradients_and_vmap_lower_for_cuda():
    matrix, x, _ = operands(128, 40)
    call = functools.partial(pk.matmul, implementation="mosaic_gpu")

    def loss(values, x):
        return call(pk.join(values, matrix.integers), x).astype(jnp.float32).sum()

    text = lower(jax.value_and_grad(loss, (0, 1)), matrix.values, x.T)
    assert "wgmma.mma_async.sp" in text
    assert "xla.gpu.triton" in text
    assert "wgmma.mma_async.sp" in lower(jax.vmap(lambda x: call(matrix, x)), jnp.stack([x.T, x.T]))


@pytest.mark.parametrize(("matrix", "n", "match"), [
    (packed(32), 16, "groups have"),
    (packed(128, dtype="float32"), 16, "bfloat16 and float16"),
    (packed(128), 16, "steps of"),
    (pk.prepare(packed(128), "mosaic_gpu"), 0, "at least one token"),
])  # fmt: skip
def test_what_the_kernel_cannot_do_falls_through(matrix, n, match):
    x = jnp.zeros((200, n), matrix.dtype)
    call = functools.partial(pk.matmul, layout="feature_major", implementation="mosaic_gpu")
    with gpu_mesh(), pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(call, matrix, x)


@pytest.mark.parametrize(("k", "sentinels"), [(200, True), (256, False)])
def test_prepared_matrices_stand_for_the_same_weights(k, sentinels):
    canonical = packed(128, m=150, k=k, ragged=k == 200)
    prepared = pk.prepare(canonical, "mosaic_gpu")
    assert prepared.integers.sentinels == sentinels
    assert prepared.integers.pairs.dtype == np.uint16
    np.testing.assert_array_equal(to_dense(prepared), to_dense(canonical))
    x = jnp.ones((3, k), jnp.bfloat16)
    y = [pk.matmul(matrix, x, implementation="xla").astype(jnp.float32) for matrix in (prepared, canonical)]
    np.testing.assert_allclose(*y, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize(("rows", "first_row", "base"), [(64, 0, 512), (128, 0, 4096), (64, 64, 5120), (256, 0, 2048)])
def test_pairs_come_as_the_tensor_cores_want_them(monkeypatch, rows, first_row, base):
    """The words of a step, as TMA lays them in shared memory, against the layout of the instruction's metadata."""
    rng = np.random.default_rng(0)
    two = np.sort(np.argsort(rng.random((16, first_row + rows, 4)), -1)[..., :2], -1)  # (fours, rows, 2)
    positions = two.transpose(0, 2, 1).reshape(32, -1)
    words = pairs.wide_pairs(pairs.pack(positions))
    memory = {}
    for c, j in np.ndindex(*words.shape):
        address = base + (j // 64) * 512 + c * 128 + (j % 64) * 2
        memory[address ^ (address >> 3 & 0x70)] = int(words[c, j])
    arith = types.SimpleNamespace(addi=np.add, muli=np.multiply, remui=np.remainder, divui=np.floor_divide,
                                  andi=np.bitwise_and, xori=np.bitwise_xor)  # fmt: skip
    for module in (ptx, sparse):
        monkeypatch.setattr(module, "arith", arith)
        monkeypatch.setattr(module, "ir", types.SimpleNamespace(IntegerType=types.SimpleNamespace(get_signless=int)))
        monkeypatch.setattr(module, "utils", types.SimpleNamespace(thread_idx=lambda: np.arange(256, 384)))
    monkeypatch.setattr(ptx, "_i32", int)
    monkeypatch.setattr(sparse, "_strides", lambda ref: (4 * (first_row + rows), 256, 64, 1))
    monkeypatch.setattr(ptx, "_shared", lambda ref: ref)

    def load(text, at, kind):
        return [memory[int(low)] | memory[int(high)] << 16 for low, high in zip(*at, strict=True)]

    monkeypatch.setattr(ptx, "_emit", load)
    for block in range(rows // 64):
        registers = sparse._register(base + (first_row // 64) * 512, block, 0)
        for row in range(64):
            warp, half, q = row // 16, row // 8 % 2, row % 8
            for four in range(16):
                select, pair, i = four // 8, four // 4 % 2, four % 4
                nibble = registers[32 * warp + 4 * q + 2 * select + pair] >> 4 * (4 * half + i) & 15
                first, second = two[four, first_row + 64 * block + row]
                assert nibble == first | second << 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("v", "n", "config"), CASES)
def test_products_on_a_gpu(on_hopper, v, n, config, dtype):
    for activation, ragged in ((None, True), ("gelu", False)):
        matrix, x, bias = operands(v, n, dtype, m=700, k=333, ragged=ragged)
        got = np.asarray(forward(config, activation)(matrix, x, bias).astype(jnp.float32), np.float64)
        w, x, bias = (np.asarray(a.astype(jnp.float32), np.float64) for a in (to_dense(matrix), x, bias))
        y = jnp.asarray(w @ x + bias[:, None])
        want = np.asarray({None: y, "gelu": jax.nn.gelu(y)}[activation])
        assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


def test_what_is_not_finite_and_unused_never_leaks_on_a_gpu(on_hopper):
    for n in (16, 520):
        matrix, x, _ = operands(128, n, m=256, k=200)
        used = np.unique(np.asarray(matrix.integers.columns))
        bad = np.array(x.astype(jnp.float32))
        bad[np.setdiff1d(np.arange(200), used[:100])] = np.nan
        columns = np.asarray(matrix.integers.columns)
        columns = np.where(columns < 200, used[columns % 100], 200).astype(np.int32)
        changed = dataclasses.replace(matrix.layout, columns=jnp.asarray(columns))
        y = forward()(dataclasses.replace(matrix, layout=changed), jnp.asarray(bad, jnp.bfloat16), None)
        assert bool(jnp.isfinite(y).all())
