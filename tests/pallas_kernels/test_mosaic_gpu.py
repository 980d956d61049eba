"""The Mosaic GPU backend: lowering for CUDA without a GPU, its instructions played in NumPy, and products on a GPU."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import fragmented_array as layouts
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as pk
from pallas_kernels import mosaic_gpu, tune
from pallas_kernels import mosaic_gpu_forward as kernel
from pallas_kernels import mosaic_gpu_ptx as ptx
from pallas_kernels.row_grouped import to_dense

Config = kernel.Config

# Preparing for this backend is preparing for Triton, whose end Pallas announces at every lowering.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

CONFIGS = {
    64: [Config(), Config(block_tokens=512, stages=3), Config(block_tokens=128, stages=8), Config(persistent=False)],
    128: [Config(split=split, persistent=p, band=b) for split in ("rows", "tokens") for p, b in ((True, 4), (False, 1))]
    + [Config(stages=3, split="rows"), Config(block_tokens=128, stages=6, split="rows"), Config(ahead=8)],
    256: [Config(block_tokens=128, split=split) for split in ("rows", "tokens")],
}
ALL = [(v, config) for v, configs in CONFIGS.items() for config in configs]


def gpu_mesh(kind="NVIDIA H200"):
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 132, "gpu")))


def lower(function, *args, kind="NVIDIA H200"):
    with gpu_mesh(kind):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def forward(config=None, activation=None, layout="feature_major"):
    return functools.partial(mosaic_gpu.forward, activation=activation, layout=layout, precision=None, config=config)


def operands(v, dtype="bfloat16", m=300, k=200, n=520, sparsity=0.5, equal=False):
    matrix = pk.prepare(tune.random_matrix(m, k, sparsity, v, equal=equal, dtype=dtype), "mosaic_gpu")
    keys = jax.random.split(jax.random.key(0))
    return matrix, jax.random.normal(keys[0], (k, n), dtype), jax.random.normal(keys[1], (m,), dtype)


@pytest.mark.parametrize(("v", "config"), ALL)
def test_every_config_lowers_for_cuda(v, config):
    assert "mosaic_gpu" in lower(forward(config, "gelu"), *operands(v))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_dtypes_and_epilogues_lower_for_cuda(dtype, activation):
    matrix, x, bias = operands(128, dtype)
    assert "mosaic_gpu" in lower(forward(None, activation), matrix, x, None)
    assert "mosaic_gpu" in lower(forward(None, activation, "token_major"), matrix, x.T, bias)


def test_by_name_gradients_and_vmap_lower_for_cuda():
    matrix, x, bias = operands(128)
    call = functools.partial(pk.matmul, layout="feature_major", implementation="mosaic_gpu")
    assert "mosaic_gpu" in lower(lambda m, x, b: call(m, x, bias=b, activation="gelu"), matrix, x, bias)
    text = lower(jax.grad(lambda x: call(matrix, x).astype(jnp.float32).sum()), x)
    assert "triton" in text
    assert "mosaic_gpu" in lower(jax.vmap(lambda x: call(matrix, x)), jnp.stack([x, x]))


@pytest.mark.parametrize(("m", "n", "taken"), [(2048, 4096, True), (2048, 512, False), (2048, 4100, False)])
def test_the_default_takes_it_where_every_multiprocessor_has_a_tile(m, n, taken):
    matrix = pk.prepare(tune.random_matrix(m, 64, 0.0, 128, equal=True, dtype="bfloat16"), "mosaic_gpu")
    text = lower(functools.partial(pk.matmul, layout="feature_major"), matrix, jnp.zeros((64, n), jnp.bfloat16))
    assert ("mosaic_gpu" in text) == taken
    assert ("xla.gpu.triton" in text) != taken


@pytest.mark.parametrize(("change", "n", "kind", "match"), [
    ({"group_size": 32}, 520, "NVIDIA H200", "groups of"),
    ({}, 523, "NVIDIA H200", "multiples of 8"),
    ({}, 64, "NVIDIA H200", "more than 256"),
    ({}, 520, "NVIDIA A100-SXM4-40GB", "Hopper"),
    ({"dtype": "float32"}, 520, "NVIDIA H200", "bfloat16 and float16"),
])  # fmt: skip
def test_what_the_kernel_cannot_do_falls_through(change, n, kind, match):
    matrix = tune.random_matrix(256, 256, 0.5, **({"group_size": 128} | change))
    x = jnp.zeros((256, n), matrix.dtype)
    call = functools.partial(pk.matmul, layout="feature_major", implementation="mosaic_gpu")
    with gpu_mesh(kind), pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(call, matrix, x)


def test_what_is_not_arranged_for_it_falls_through():
    with gpu_mesh(), pytest.raises(NotImplementedError, match="prepare"):
        forward()(tune.random_matrix(256, 200, 0.5, 128, equal=False), jnp.zeros((200, 520), jnp.bfloat16), None)
    with gpu_mesh(), pytest.raises(NotImplementedError, match="shared memory"):
        forward(Config(stages=8))(*operands(128))


@pytest.mark.parametrize("band", [1, 3, 16])
@pytest.mark.parametrize("programs", [1, 7, 40])
@pytest.mark.parametrize("segments", [((8, 256),), ((1, 640), (3, 256), (2, 64), (2, 0))])
def test_a_schedule_deals_every_tile_once(segments, programs, band):
    steps = np.repeat([slots // 64 for _, slots in segments], [groups for groups, _ in segments])
    table = kernel.schedule(segments, 5, programs, band)
    seen = []
    for rows in table:
        count = rows[0, 0]
        assert not rows[1 + count :].any()
        assert count + 1 < len(rows)
        seen += [tuple(row) for row in rows[1 : 1 + count]]
        empty = (rows[1 : 1 + count, 1] == 0).tolist()
        assert empty == sorted(empty)
    want = [(steps[:g].sum(), steps[g], g, n) for g in range(8) for n in range(5)]
    assert sorted(seen) == sorted(want)
    load = table[:, 1:, 1].sum(1)
    assert load.max() <= load.sum() / programs + steps.max()


# The instructions of a warpgroup, played in NumPy: a value is an array with one number per thread.


class Machine:
    """Stands in for the modules that emit instructions, and runs them at once."""

    def __init__(self, monkeypatch, threads, memory):
        self.threads, self.memory, self.written, self.copied = threads, memory, {}, []
        at = {int(thread): i for i, thread in enumerate(threads)}
        arith = types.SimpleNamespace(
            addi=np.add, subi=np.subtract, muli=np.multiply, remui=np.remainder, divui=np.floor_divide,
            andi=np.bitwise_and, xori=np.bitwise_xor, minui=np.minimum, select=np.where,
            extui=lambda kind, value: np.asarray(value).astype(np.int64),
            cmpi=lambda how, a, b: how(a, b),
            CmpIPredicate=types.SimpleNamespace(eq=np.equal, ne=np.not_equal, ult=np.less),
        )  # fmt: skip
        utils = types.SimpleNamespace(
            thread_idx=lambda: threads,
            bitcast=lambda value, kind: value,
            shfl_bfly=lambda value, distance: value[[at[int(thread) ^ distance] for thread in threads]],
        )
        for name, value in {
            "arith": arith, "utils": utils, "ir": types.SimpleNamespace(IntegerType=types.SimpleNamespace(
                get_signless=lambda bits: bits)),
            "_i32": int, "_i64": int, "_wide": lambda value: value, "_scalar": lambda value: value,
            "_shared": lambda ref: ref, "_global": lambda ref: ref, "_emit": self.emit,
            "_row_array": lambda values, *_, **__: array(*values),
        }.items():  # fmt: skip
            monkeypatch.setattr(ptx, name, value)

    def emit(self, text, operands, result=None):
        if "ld." in text:
            return np.vectorize(self.memory.__getitem__)(operands[0])
        if "cp.async.cg" in text:
            target, source, size = np.broadcast_arrays(*operands, *[16] * (3 - len(operands)))
            self.copied += list(zip(target.tolist(), zip(source.tolist(), size.tolist(), strict=True), strict=True))
        elif "st.global.v4" in text:
            address, *words, live = operands
            for i in np.flatnonzero(live):
                for j, word in enumerate(words):
                    assert self.written.setdefault(int(address[i]) + 4 * j, word[i]) == word[i]
        elif "st.global" in text:
            address, word, live = operands
            for i in np.flatnonzero(live):
                what = int(word[i]) + ("], high;" in text)  # a pair stands for its first token
                assert self.written.setdefault(int(address[i]), what) == what
        else:
            assert "arrive" in text
        return None


def array(*registers):
    found = np.empty(len(registers), dtype=object)
    found[:] = registers
    return types.SimpleNamespace(registers=found)


@pytest.mark.parametrize("sentinel", [None, 90])
@pytest.mark.parametrize(
    ("block_tokens", "token_tile"), [(256, 0), (256, 2), (128, 1), (512, 1), (64, 8), (32, 3), (16, 32)]
)
def test_gather_fills_the_swizzled_tile(monkeypatch, block_tokens, token_tile, sentinel):
    tokens, x, ids, tile = 520, 10**6, 1000, 4096
    columns = np.random.default_rng(0).permutation(100)[:64]
    machine = Machine(monkeypatch, np.arange(256, 384), {ids + 4 * i: c for i, c in enumerate(columns)})
    ptx.gather(x, ids, tile, 0, array(token_tile), array(0), tokens=tokens, block_k=64, block_tokens=block_tokens,
               first=256, sentinel=sentinel)  # fmt: skip
    copied = dict(machine.copied)
    assert len(copied) == len(machine.copied) == 64 * block_tokens // 8
    for row in range(64):
        for chunk in range(block_tokens // 8):
            width = min(2 * block_tokens, 128)
            index = (row // 8) * (2 * block_tokens // width) + 16 * chunk // width
            offset = (8 * index + row % 8) * width + 16 * chunk % width
            # The hardware's swizzle: address bits 4 to 6, as many as the width has chunks, turned by the bits 7 to 9.
            got, size = copied[tile + (offset ^ (offset >> 3 & width - 16))]
            token = token_tile * block_tokens + 8 * chunk
            assert (got - x) % (tokens * 2) <= tokens * 2 - 16  # never behind a row's end
            real = sentinel is None or columns[row] < sentinel
            assert size == (16 if real else 0)
            if token < tokens and real:
                assert got == x + 2 * (columns[row] * tokens + token)


def test_eight_tokens_take_one_copy_a_row(monkeypatch):
    columns = np.random.default_rng(0).permutation(300)[:256]
    machine = Machine(monkeypatch, np.arange(256, 384), {1000 + 4 * i: c for i, c in enumerate(columns)})
    ptx.gather(10**6, 1000, 4096, 0, array(0), array(0), tokens=8, block_k=256, block_tokens=16, first=256)
    # A tile is 8 rows of 32 bytes, and its second four have their chunks swapped.
    want = {4096 + 32 * r + 16 * (r % 8 // 4): (10**6 + 16 * column, 16) for r, column in enumerate(columns)}
    assert dict(machine.copied) == want
    assert len(machine.copied) == 256


@pytest.mark.parametrize(("height", "width", "tokens"), [
    (64, 256, 520), (128, 128, 520), (64, 64, 520), (64, 16, 456), (64, 8, 450), (128, 32, 455), (64, 16, 1),
])  # fmt: skip
@pytest.mark.parametrize("first_token", [0, 448])
def test_store_puts_every_pair_where_its_row_says(monkeypatch, height, width, tokens, first_token):
    m, y = 90, 10**6
    stored = np.random.default_rng(0).permutation(np.r_[np.arange(m), np.full(256 - m, m)])[:height]
    threads = np.arange(128, 256)
    machine = Machine(monkeypatch, threads, {4 * i: row for i, row in enumerate(stored)})
    rows = ptx.stored_rows(0, array(0), count=height, layout=None)
    # The layout of a wgmma accumulator, as PTX documents it.
    warp, lane = (threads % 128) // 32, threads % 32
    registers = [
        1000 * (64 * block + 16 * warp + 8 * half + lane // 4) + 8 * eight + 2 * (lane % 4)
        for block in range(height // 64)
        for eight in range(width // 8)
        for half in range(2)
    ]
    tile = array(*registers)
    tile.shape = (height, width)
    ptx.store_rows(y, tile, rows, array(first_token), m=m, tokens=tokens)
    want = {
        y + 2 * (stored[i] * tokens + first_token + j): 1000 * i + j
        for i in range(height)
        for j in range(0, width, 1 if tokens % 2 else 2)
        if stored[i] < m and first_token + j < tokens
    }
    assert machine.written == want


def test_registers_come_in_the_order_the_store_expects():
    assert layouts.WGMMA_LAYOUT.registers_shape((128, 64)) == (2, 8, 1, 1, 2, 1, 1, 1, 1)
    assert layouts.WGMMA_ROW_LAYOUT.registers_shape((128,)) == (2, 1, 2, 1, 1)


@pytest.fixture
def hopper():
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("needs a CUDA device")
    if not any(name in device.device_kind for name in mosaic_gpu.HOPPER):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("v", "config"), ALL)
def test_products_on_a_gpu(hopper, v, config, dtype):
    for activation, equal, n in ((None, False, 520), ("gelu", True, 264), ("silu", False, 1048), ("relu", False, 264)):
        matrix, x, bias = operands(v, dtype, m=700, k=333, n=n, equal=equal)
        got = np.asarray(forward(config, activation)(matrix, x, bias).astype(jnp.float32), np.float64)
        w, x, bias = (np.asarray(a.astype(jnp.float32), np.float64) for a in (to_dense(matrix), x, bias))
        y = jnp.asarray(w @ x + bias[:, None])
        want = np.asarray({None: y, "gelu": jax.nn.gelu(y), "silu": jax.nn.silu(y), "relu": jax.nn.relu(y)}[activation])
        assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


def test_what_is_not_finite_and_unused_never_leaks_on_a_gpu(hopper):
    matrix, x, _ = operands(128, m=256, k=200, n=520)
    used = np.unique(np.asarray(matrix.topology.columns))
    bad = np.array(x.astype(jnp.float32))
    bad[np.setdiff1d(np.arange(200), used[:150])] = np.nan
    columns = used[np.asarray(matrix.topology.columns) % 150]
    topology = dataclasses.replace(matrix.topology, columns=jnp.asarray(columns.astype(np.int32)))
    y = forward()(dataclasses.replace(matrix, topology=topology), jnp.asarray(bad, jnp.bfloat16), None)
    assert bool(jnp.isfinite(y).all())
