"""The Mosaic GPU backend: lowering for CUDA without a GPU, its instructions played in NumPy, and products on a GPU."""

import contextlib
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
from pallas_kernels import _window as windows
from pallas_kernels import tune
from pallas_kernels._backend import Call, Problem, choose
from pallas_kernels._devices import GPU
from pallas_kernels._layout import as_prepared, to_dense
from pallas_kernels.gpu import _layout as layout
from pallas_kernels.mosaic import _configs as configs
from pallas_kernels.mosaic import _forward as kernel
from pallas_kernels.mosaic import _ptx as ptx
from pallas_kernels.mosaic._backend import Mosaic
from pallas_kernels.mosaic._configs import GROUP_SIZES, Config

MOSAIC = Mosaic()
H200 = GPU("NVIDIA H200")

# Preparing for this backend is preparing for Triton, whose end Pallas announces at every lowering.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# One of a kind, for products on a GPU.
CONFIGS = {
    64: [Config(), Config(block_tokens=512, stages=3), Config(block_tokens=128, stages=8), Config(band=4)],
    128: [Config(split=split, band=b) for split in ("rows", "tokens") for b in (4, 1)]
    + [Config(stages=3, split="rows"), Config(block_tokens=128, stages=6, split="rows"), Config(ahead=8)],
    256: [Config(block_tokens=128, split=split) for split in ("rows", "tokens")],
}
ALL = [(v, config) for v, configs in CONFIGS.items() for config in configs]


def gpu_mesh(kind="NVIDIA H200"):
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 132, "gpu")))


def lower(function, *args, kind="NVIDIA H200"):
    with gpu_mesh(kind):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def forward(config=None, activation=None, layout="feature_major", window=None):
    call = Call(activation, layout, window=window)

    def run(matrix, x, bias=None, addend=None):
        return MOSAIC.forward(call, as_prepared(matrix), x, bias, addend, config)

    return run


def grad_values(config=None, layout="feature_major"):
    return lambda matrix, x, dy: MOSAIC.grad_values(Call(layout=layout), as_prepared(matrix).layout, x, dy, config)


def test_kernels_have_names_in_profiles():
    matrix, x, _ = operands(64, equal=True)
    assert "row_grouped_matmul" in lower(forward(), matrix, x, None)
    window = windows.window((4, 4), 8, (3, 3), 1, "SAME", 1)
    filters, images = tune.random_matrix(64, 72, 0.5, 64), jnp.zeros((8, 4, 4, 32), jnp.bfloat16)
    filters = pk.prepare(filters, "mosaic_gpu", window)
    assert "row_grouped_conv" in lower(forward(window=window), filters, images)
    matrix, dy = tune.random_matrix(256, 512, 0.75, 128), jnp.zeros((256, 512), jnp.bfloat16)
    assert "row_grouped_grad_values" in lower(grad_values(), matrix, jnp.zeros((512, 512), jnp.bfloat16), dy)


def operands(v, dtype="bfloat16", m=300, k=200, n=520, sparsity=0.5, equal=False):
    matrix = pk.prepare(tune.random_matrix(m, k, sparsity, v, equal=equal, dtype=dtype), "mosaic_gpu")
    keys = jax.random.split(jax.random.key(0))
    return matrix, jax.random.normal(keys[0], (k, n), dtype), jax.random.normal(keys[1], (m,), dtype)


@pytest.mark.parametrize("v", GROUP_SIZES)
@pytest.mark.parametrize("op", ["forward", "grad_values"])
def test_every_config_of_the_search_space_lowers_for_cuda(op, v):
    matrix = tune.random_matrix(2 * v, 200, 0.36, v)  # 128 slots a group
    x, dy = jnp.zeros((200, 512), jnp.bfloat16), jnp.zeros((2 * v, 512), jnp.bfloat16)
    space = MOSAIC.configs(Problem.of_layout(op, as_prepared(matrix).layout, 512, x.dtype), H200)
    assert space
    for config in dict.fromkeys([*space, *(CONFIGS[v] if op == "forward" else [])]):
        assert "mosaic_gpu" in lower(tune.product(op, config, "mosaic_gpu"), matrix, x, dy), config


@pytest.mark.parametrize("v", GROUP_SIZES)
def test_every_config_for_convolutions_lowers_for_cuda(v):
    window = windows.window((9, 7), 16, (3, 3), 1, "SAME", 1)
    filters = pk.prepare(tune.random_matrix(2 * v, window.features, 0.5, v, dtype="bfloat16"), "mosaic_gpu", window)
    shapes = {64: [(128, 8), (256, 5), (512, 3)], 128: [(128, 6), (256, 4)], 256: [(128, 4)]}[v]
    split = "tokens" if v == 64 else "rows"
    n = 24 * window.output_pixels
    heuristic = MOSAIC.config(Problem.of_layout("forward", filters.layout, n, "bfloat16", window), H200)
    space = [
        Config(block_tokens=tokens, stages=stages, ahead=2, split=split, band=b)
        for tokens, stages in shapes
        for b in (1, 4)
    ]
    for config in dict.fromkeys([heuristic, *space]):
        images = jnp.zeros((16, 9, 7, 24), jnp.bfloat16)
        assert "mosaic_gpu" in lower(forward(config, window=window), filters, images), config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_dtypes_and_epilogues_lower_for_cuda(dtype, activation):
    matrix, x, bias = operands(128, dtype)
    assert "mosaic_gpu" in lower(forward(None, activation), matrix, x, None)
    assert "mosaic_gpu" in lower(forward(None, activation, "token_major"), matrix, x.T, bias)
    added = functools.partial(pk.matmul, layout="feature_major", implementation="mosaic_gpu", activation=activation)
    text = lower(lambda matrix, x, addend: added(matrix, x, addend=addend), matrix, x, jnp.zeros((300, 520), dtype))
    assert "mosaic_gpu" in text
    assert "stablehlo.add" not in text


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_lower_for_cuda(size):
    window = windows.window((9, 7), 8, (size, size), 2, "SAME", 1)
    matrix, _, bias = operands(64, k=window.features)
    call = forward(activation="relu", window=window)
    x = jnp.zeros((8, 9, 7, 16), jnp.bfloat16)
    text = lower(call, matrix, x, bias)
    assert "mosaic_gpu" in text
    assert "stablehlo.divide" in text or "remainder" in text  # where the slots point, from the columns
    filters = tune.random_matrix(300, window.features, 0.5, 64, equal=False, dtype="bfloat16")
    for prepared in (pk.prepare(filters, "mosaic_gpu", window), pk.prepare(filters, "triton", window)):
        text = lower(call, prepared, x, bias)
        assert "mosaic_gpu" in text
        assert "remainder" not in text
    with pytest.raises(ValueError, match="are no filters for Window"):
        pk.prepare(filters, "mosaic_gpu", dataclasses.replace(window, channels=9))
    with pytest.raises(ValueError, match="prepared already"):
        pk.prepare(matrix, "mosaic_gpu", window)
    by_name = functools.partial(pk.conv2d, kernel_size=(size, size), strides=2, implementation="mosaic_gpu")
    with gpu_mesh(), pytest.raises(NotImplementedError, match="multiples of 8, got 12"):
        jax.eval_shape(by_name, matrix, jnp.zeros((8, 9, 7, 12), jnp.bfloat16))


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


@pytest.mark.parametrize(("count", "n", "m", "taken"), [
    (1024, 512, 4096, True), (64, 512, 4096, False), (1024, 520, 4096, False), (1024, 512, 4000, False),
])  # fmt: skip
def test_dvalues_take_it_where_every_multiprocessor_has_a_tile(count, n, m, taken):
    x, dy = jnp.zeros((1024, n), jnp.bfloat16), jnp.zeros((m, n), jnp.bfloat16)

    def pull(major, matrix, x, dy):
        return jax.vjp(lambda v: pk.matmul(pk.join(v, matrix.integers), x, layout=major), matrix.values)[1](dy)

    matrix = tune.random_matrix(m, 1024, 1 - count / 1024, 128)
    for major in ("feature_major", "token_major"):
        args = (x, dy) if major == "feature_major" else (x.T, dy.T)
        text = lower(functools.partial(pull, major), matrix, *args)
        assert (
            "row_grouped_grad_values" in text and "mosaic_gpu" in kernel_of(text, "row_grouped_grad_values")
        ) == taken
    ragged = tune.random_matrix(m, 1024, 0.5, 128, equal=False)
    assert "mosaic_gpu" not in kernel_of(lower(functools.partial(pull, "feature_major"), ragged, x, dy), "grad_values")
    problem = Problem.of_layout("grad_values", as_prepared(ragged).layout, 512, x.dtype)
    assert any("equal counts" in reason for reason in MOSAIC.why_not(problem))


def kernel_of(text, name):
    """The lines of a lowered program that call the kernel of a name."""
    return "\n".join(line for line in text.splitlines() if name in line)


def test_dvalues_of_other_dtypes_are_not_its_own():
    for dtype, taken in (("bfloat16", True), ("float64", False), ("float8_e4m3fn", False)):
        problem = Problem("grad_values", 4096, 1024, 512, 32 * 1024, 128, dtype)
        assert (choose(problem, [MOSAIC], H200) is not None) == taken


@pytest.mark.parametrize(("change", "n", "kind", "match"), [
    ({"group_size": 32}, 520, "NVIDIA H200", "groups have 64, 128, 256 rows"),
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
        forward(Config())(
            tune.random_matrix(256, 200, 0.5, 128, equal=False), jnp.zeros((200, 520), jnp.bfloat16), None
        )
    with gpu_mesh(), pytest.raises(NotImplementedError, match="shared memory"):
        forward(Config(stages=8))(*operands(128))


@pytest.mark.parametrize("band", [1, 3, 16])
@pytest.mark.parametrize("programs", [1, 7, 40])
@pytest.mark.parametrize("segments", [((7, 256), (1, 192)), ((1, 640), (3, 256), (2, 64), (2, 0))])
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


@pytest.mark.parametrize("band", [1, 2, 5, 7])
@pytest.mark.parametrize("programs", [1, 7, 40])
@pytest.mark.parametrize("steps", [0, 3])
def test_equal_groups_are_dealt_in_bands_without_a_table(programs, band, steps):
    deal = functools.partial(kernel.dealt, groups=8, steps=steps, token_tiles=5, programs=programs, band=band)
    counts = [-(-(40 - program) // programs) for program in range(programs)]
    rows = [[tuple(map(int, deal(jnp.int32(p), jnp.int32(i)))) for i in range(n + 1)] for p, n in enumerate(counts)]
    assert all(of_program.pop() == (0, 0, 0, 0) for of_program in rows)
    in_turn = [rows[i % programs][i // programs] for i in range(40)]
    bands = [range(start, min(start + band, 5)) for start in range(0, 5, band)]
    assert in_turn == [(steps * g, steps, g, n) for tiles in bands for g in range(8) for n in tiles]


# The instructions of a warpgroup, played in NumPy: a value is an array with one number per thread.


ZEROS = -1  # where a copy that reads nothing comes from


class Machine:
    """Stands in for the modules that emit instructions, and runs them at once."""

    def __init__(self, monkeypatch, threads, memory):
        self.threads, self.memory, self.written, self.copied, self.active = threads, memory, {}, [], True
        at = {int(thread): i for i, thread in enumerate(threads)}
        arith = types.SimpleNamespace(
            addi=np.add, subi=np.subtract, muli=np.multiply, remui=np.remainder, divui=np.floor_divide,
            andi=np.bitwise_and, ori=np.bitwise_or, xori=np.bitwise_xor, shrui=np.right_shift,
            minui=np.minimum, select=np.where,
            extui=lambda kind, value: np.asarray(value).astype(np.int64),
            extsi=lambda kind, value: np.asarray(value).astype(np.int64),
            trunci=lambda kind, value: np.asarray(value) & (2**kind - 1),
            cmpi=lambda how, a, b: how(a, b),
            CmpIPredicate=types.SimpleNamespace(
                eq=np.equal, ne=np.not_equal, ult=lambda a, b: np.asarray(a).astype(np.uint32) < b
            ),
        )  # fmt: skip
        utils = types.SimpleNamespace(
            thread_idx=lambda: threads,
            bitcast=lambda value, kind: value,
            shfl_bfly=lambda value, distance: value[[at[int(thread) ^ distance] for thread in threads]],
            when=self.when,
        )
        for name, value in {
            "arith": arith, "utils": utils, "ir": types.SimpleNamespace(IntegerType=types.SimpleNamespace(
                get_signless=lambda bits: bits)),
            "_i32": int, "_i64": int, "_wide": lambda value: value, "_scalar": lambda value: value,
            "_shared": lambda ref: ref, "_global": lambda ref: ref, "_emit": self.emit,
            "_load_words": self.load_words, "_row_array": lambda values, *_, **__: array(*values),
        }.items():  # fmt: skip
            monkeypatch.setattr(ptx, name, value)

    @contextlib.contextmanager
    def when(self, condition):
        self.active = condition
        yield
        self.active = True

    def load_words(self, address, live):
        at = [np.where(live, address + 4 * j, ZEROS) for j in range(4)]
        return [np.vectorize(self.memory.__getitem__)(a) for a in at]

    def emit(self, text, operands, result=None):
        if "ld." in text:
            return np.vectorize(self.memory.__getitem__)(operands[0])
        if "cp.async.cg" in text:
            size = operands[2] if len(operands) == 3 else ptx.CHUNK
            target, source, size, active = np.broadcast_arrays(*operands[:2], size, self.active)
            assert set(size.tolist()) <= {0, ptx.CHUNK}
            sources = np.where(size, source, ZEROS)
            self.copied += list(zip(target[active].tolist(), sources[active].tolist(), strict=True))
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
    real = min(block_tokens, tokens - token_tile * block_tokens)
    assert len(copied) == len(machine.copied) == 64 * real // 8
    for row in range(64):
        for chunk in range(block_tokens // 8):
            width = min(2 * block_tokens, 128)
            index = (row // 8) * (2 * block_tokens // width) + 16 * chunk // width
            offset = (8 * index + row % 8) * width + 16 * chunk % width
            # The hardware's swizzle: address bits 4 to 6, as many as the width has chunks, turned by the bits 7 to 9.
            got = copied.pop(tile + (offset ^ (offset >> 3 & width - 16)), None)
            token = token_tile * block_tokens + 8 * chunk
            if token >= tokens:
                assert got is None
                continue
            if sentinel is not None and columns[row] >= sentinel:
                assert got == ZEROS
                continue
            assert got == x + 2 * (columns[row] * tokens + token)
    assert not copied


@pytest.mark.parametrize("count", [64, 256])
def test_copied_rows_fill_the_swizzled_tile(monkeypatch, count):
    tokens, x, ids, tile, first, most, step = 512, 10**7, 1000, 4096, 7, 150, 3
    columns = np.random.default_rng(0).permutation(200)
    machine = Machine(monkeypatch, np.arange(256, 384), {ids + 4 * i: c for i, c in enumerate(columns)})
    rows = ptx.copied_rows(ids, array(first), count=count, most=most, layout=None)
    ptx.copy_rows(x, rows, tile, array(step), tokens=tokens)
    copied = dict(machine.copied)
    assert len(copied) == len(machine.copied) == count * 8
    for row in range(count):
        for chunk in range(8):
            offset = row // 8 * 1024 + row % 8 * 128 + (chunk ^ row % 8) * 16
            column = columns[min(first + row, most)]
            assert copied[tile + offset] == x + 2 * (column * tokens + step * 64) + chunk * 16


@pytest.mark.parametrize(
    ("size", "strides", "padding", "dilation"),
    [((3, 3), 1, "SAME", 1), ((3, 2), 2, "SAME", (2, 1)), ((2, 5), (1, 3), "VALID", 1), ((1, 1), 2, "SAME", 1)],
)
@pytest.mark.parametrize("token_tile", [0, 1])
@pytest.mark.parametrize("real", [64, 40])
def test_gather_of_a_convolution_meets_the_right_pixels(
    monkeypatch, size, strides, padding, dilation, token_tile, real
):
    batch, channels, x, ids, tile = 24, 5, 10**6, 1000, 4096
    window = windows.window((9, 7), channels, size, strides, padding, dilation)
    tokens, rng = window.output_pixels * batch, np.random.default_rng(0)
    columns = rng.integers(0, window.features, 64)
    matrix = tune.random_matrix(64, 64, 0.0, 64)
    filters = dataclasses.replace(
        as_prepared(matrix).layout, columns=jnp.asarray(columns, jnp.int32), k=window.features,
        counts=None if real == 64 else jnp.array([real]),
    )  # fmt: skip
    words = np.asarray(layout.slot_places(filters, window), np.int64)
    if masked := words.ndim == 2:
        words = words[:, 0] | words[:, 1] << 32
    assert masked == (window.is_padded or real < 64)
    machine = Machine(
        monkeypatch, np.arange(256, 384), {ids + (8 if masked else 4) * i: word for i, word in enumerate(words)}
    )
    ptx.gather(x, ids, tile, 0, array(token_tile), array(0), tokens=tokens, block_k=64, block_tokens=256, first=256,
               window=window, masked=masked)  # fmt: skip
    copied = dict(machine.copied)
    places = np.arange(channels * 63 * batch).reshape(channels, 9, 7, batch)
    border = [(0, 0), *window.padding, (0, 0)]
    padded = np.pad(places, border, constant_values=ZEROS)
    for row, column in enumerate(columns):
        tap, channel = divmod(column, channels)
        i, j = (at * d for at, d in zip(divmod(tap, size[1]), window.dilation, strict=True))
        met = padded[channel, i :: window.strides[0], j :: window.strides[1]]
        met = met[: window.outputs[0], : window.outputs[1]].reshape(-1)
        for chunk in range(256 // 8):
            token = token_tile * 256 + 8 * chunk
            if token < tokens:
                offset = ((row // 8) * 4 + chunk // 8) * 1024 + row % 8 * 128 + ((chunk % 8) ^ row % 8) * 16
                read = row < real and met[token] != ZEROS
                assert copied[tile + offset] == (x + 2 * met[token] if read else ZEROS)


def test_eight_tokens_take_one_copy_a_row(monkeypatch):
    columns = np.random.default_rng(0).permutation(300)[:256]
    machine = Machine(monkeypatch, np.arange(256, 384), {1000 + 4 * i: c for i, c in enumerate(columns)})
    ptx.gather(10**6, 1000, 4096, 0, array(0), array(0), tokens=8, block_k=256, block_tokens=16, first=256)
    # A tile is 8 rows of 32 bytes, and its second four have their chunks swapped.
    want = {4096 + 32 * r + 16 * (r % 8 // 4): 10**6 + 16 * column for r, column in enumerate(columns)}
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
    if width % 32 or tokens % 8:
        return
    # What is stored is what comes back, zeros where nothing was stored.
    space = types.SimpleNamespace
    monkeypatch.setattr(ptx, "fa", space(
        WGMMA_LAYOUT=layouts.WGMMA_LAYOUT,
        FragmentedArray=lambda _registers, **_: space(registers=_registers, shape=(height, width), mlir_dtype=None),
    ))  # fmt: skip
    kinds = {"MemRefType": lambda kind: space(element_type=None), "VectorType": space(get=lambda *_: None)}
    monkeypatch.setattr(ptx, "ir", space(IntegerType=ptx.ir.IntegerType, **kinds))
    monkeypatch.setattr(ptx, "_global", lambda ref: y)
    machine.memory |= {ZEROS: 0} | want
    loaded = ptx.load_rows(space(type=None), rows, array(first_token), height=height, width=width, m=m,
                           tokens=tokens)  # fmt: skip
    address = [y + 2 * (stored[r // 1000] * tokens + first_token + r % 1000) for r in registers]
    for found, at in zip(ptx.exchange_rows(loaded).registers.reshape(-1), address, strict=True):
        np.testing.assert_array_equal(found, [want.get(a, 0) for a in at])


def test_registers_come_in_the_order_the_store_expects():
    assert layouts.WGMMA_LAYOUT.registers_shape((128, 64)) == (2, 8, 1, 1, 2, 1, 1, 1, 1)
    assert layouts.WGMMA_ROW_LAYOUT.registers_shape((128,)) == (2, 1, 2, 1, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("v", "config"), ALL)
def test_products_on_a_gpu(on_hopper, v, config, dtype):
    for activation, equal, n in ((None, False, 520), ("gelu", True, 264), ("silu", False, 1048), ("relu", False, 264)):
        matrix, x, bias = operands(v, dtype, m=700, k=333, n=n, equal=equal)
        addend = jax.random.normal(jax.random.key(3), (700, n), dtype)
        got = np.asarray(forward(config, activation)(matrix, x, bias, addend=addend).astype(jnp.float32), np.float64)
        w, x, bias, addend = (
            np.asarray(a.astype(jnp.float32), np.float64) for a in (to_dense(matrix), x, bias, addend)
        )
        y = jnp.asarray(w @ x + bias[:, None] + addend)
        want = np.asarray({None: y, "gelu": jax.nn.gelu(y), "silu": jax.nn.silu(y), "relu": jax.nn.relu(y)}[activation])
        assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("v", GROUP_SIZES)
def test_dvalues_on_a_gpu(on_hopper, v, dtype):
    for count, n in ((128, 384), (200, 1024)):  # a whole number of tiles, and not
        matrix = tune.random_matrix(2 * v, 333, 1 - count / 333, v, dtype=dtype)
        keys = jax.random.split(jax.random.key(2))
        x, dy = jax.random.normal(keys[0], (333, n), dtype), jax.random.normal(keys[1], (2 * v, n), dtype)
        x64, dy64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, dy))
        columns, rows = (np.asarray(a).reshape(2, -1) for a in (matrix.integers.columns, matrix.integers.rows))
        want = np.concatenate([x64[columns[g]] @ dy64[rows[g]].T for g in range(2)])
        problem = Problem.of_layout("grad_values", as_prepared(matrix).layout, n, dtype)
        for config in configs.search_space(problem, 132):
            got = np.asarray(grad_values(config)(matrix, x, dy).astype(jnp.float32), np.float64)
            assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)
            np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


def test_what_is_not_finite_and_unused_never_leaks_on_a_gpu(on_hopper):
    matrix, x, _ = operands(128, m=256, k=200, n=520)
    used = np.unique(np.asarray(matrix.integers.columns))
    bad = np.array(x.astype(jnp.float32))
    bad[np.setdiff1d(np.arange(200), used[:150])] = np.nan
    columns = used[np.asarray(matrix.integers.columns) % 150]
    changed = dataclasses.replace(matrix.layout, columns=jnp.asarray(columns.astype(np.int32)))
    y = forward()(dataclasses.replace(matrix, layout=changed), jnp.asarray(bad, jnp.bfloat16), None)
    assert bool(jnp.isfinite(y).all())
