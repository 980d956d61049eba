"""What backends are asked, one from outside, reasons that are gathered, and life without Triton."""

import dataclasses
import subprocess
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as pk
from benchmarks.packed import random_matrix as random_packed
from pallas_kernels import tune
from pallas_kernels._backend import BACKENDS, Problem, choose
from pallas_kernels._devices import GPU

# Pallas announces the end of its Triton backend at every lowering: the one warning that may pass.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
OPS = ("forward", "grad_values", "grad_input")


@dataclasses.dataclass(frozen=True)
class Dense(pk.Backend):
    """Decompresses; it has a forward product only, of up to `most` tokens, and counts on others for the rest."""

    most: int = 8
    name: ClassVar[str] = "dense"
    platforms: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def why_not(self, problem):
        reasons = [] if problem.op == "forward" else [f"it has no {problem.op}"]
        reasons += [] if problem.window is None else ["it does no convolutions"]
        return reasons + ([f"it takes {self.most} tokens, got {problem.n}"] if problem.n > self.most else [])

    def forward(self, call, matrix, x, bias, addend, config=None):
        w = jax.named_call(pk.to_dense, name="by_our_backend")(matrix)
        y = x @ w.T if call.layout == "token_major" else w @ x
        y = y if bias is None else y + (bias if call.layout == "token_major" else bias[:, None])
        y = y if addend is None else y + addend
        return jax.nn.relu(y) if call.activation == "relu" else y


def test_a_backend_from_outside_is_taken_where_it_can(registry):
    matrix, x = tune.random_matrix(32, 48, 0.5, 16, dtype="float32"), jnp.ones((8, 48))
    alone = pk.matmul(matrix, x, activation="relu")
    pk.register(Dense())

    def text(n, **options):
        run = jax.jit(lambda matrix, x: pk.matmul(matrix, x, activation="relu", **options))
        return run.lower(matrix, jnp.ones((n, 48))).as_text(debug_info=True)

    assert "by_our_backend" in text(8)
    assert "by_our_backend" not in text(9)
    assert "by_our_backend" not in text(8, implementation="xla")
    np.testing.assert_allclose(pk.matmul(matrix, x, activation="relu"), alone, rtol=1e-6)
    np.testing.assert_allclose(
        pk.matmul(pk.prepare(matrix, "dense"), x, implementation="dense"), x @ pk.to_dense(matrix).T
    )

    def loss(values, x, implementation):
        return jnp.square(pk.matmul(pk.join(values, matrix.topology), x, implementation=implementation)).sum()

    for ours, theirs in zip(
        *(jax.grad(loss, (0, 1))(matrix.values, x, name) for name in ("dense", "xla")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"dense cannot .*it takes 8 tokens, got 9; .*xla can"):
        pk.matmul(matrix, jnp.ones((9, 48)), implementation="dense")


def test_what_is_compiled_already_does_not_miss_a_new_backend(registry):
    matrix, x = tune.random_matrix(32, 48, 0.5, 16, dtype="float32"), jnp.ones((3, 48))
    pk.matmul(matrix, x)

    @dataclasses.dataclass(frozen=True)
    class Zero(Dense):
        name: ClassVar[str] = "zero"

        def forward(self, call, matrix, x, bias, addend, config=None):
            return jnp.zeros((len(x), matrix.shape[0]), x.dtype)

    pk.register(Zero())
    assert not pk.matmul(matrix, x).any()


def test_names_are_taken_once(registry):
    pk.register(Dense())
    pk.register(Dense())
    with pytest.raises(ValueError, match="'dense' already"):
        pk.register(Dense(most=9))
    with pytest.raises(
        ValueError, match=r"implementation must be None or one of \('dense', 'mosaic_gpu', 'triton', 'xla'\)"
    ):
        pk.matmul(tune.random_matrix(16, 16, 0.5, 16), jnp.ones((2, 16)), implementation="cutlass")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["triton", "mosaic_gpu", "xla"])
def test_every_backend_answers_for_every_problem(name, op):
    """Reasons are sentences, and where there are none a config can be chosen."""
    backend, gpu = BACKENDS[name], GPU("NVIDIA H200")
    for v in (16, 64, 100, 256):
        for n in (0, 1, 8, 300, 4096):
            for packed in (False, True):
                problem = Problem(op, 512, 512, n, 512 * 512 // 4 // v, v, "bfloat16", packed=packed)
                reasons = backend.why_not(problem)
                assert all(isinstance(reason, str) and reason for reason in reasons)
                if not reasons and n:
                    backend.pays(problem, gpu)
                    config, space = backend.config(problem, gpu), backend.configs(problem, gpu)
                    assert (config is None) == (not space)


def test_every_reason_is_gathered():
    matrix = tune.random_matrix(30, 40, 0.5, 6, equal=False, dtype="float32")
    v100 = AbstractMesh((), (), abstract_device=AbstractDevice("Tesla V100-SXM2-16GB", 80, "gpu"))
    with use_abstract_mesh(v100), pytest.raises(NotImplementedError) as error:
        jax.eval_shape(lambda x: pk.matmul(matrix, x, implementation="mosaic_gpu"), jnp.ones((5, 40)))
    for reason in ("needs a Hopper GPU", "groups have 64, 128, 256 rows, got 6", "bfloat16 and float16, got float32",
                   "`prepare` the matrix", "more than 256 tokens", "M=30, K=40, N=5, V=6", "xla can"):  # fmt: skip
        assert reason in str(error.value)
    assert "triton" not in str(error.value)
    with pytest.raises(NotImplementedError, match=r"triton has no kernel for .*groups have 16, 32"):
        pk.prepare(matrix, "triton")


def test_the_choice_is_asked_of_any_gpu():
    problem = Problem("forward", 4096, 4096, 4096, 32768, 128, "bfloat16")
    order = [BACKENDS["mosaic_gpu"], BACKENDS["triton"]]
    for kind, name in (("NVIDIA H200", "mosaic_gpu"), ("NVIDIA A100-SXM4-40GB", "triton")):
        chosen = choose(problem, order, GPU(kind))
        assert chosen is not None
        assert chosen.name == name


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("make", [
    lambda: tune.random_matrix(64, 64, 0.0, 16),
    lambda: tune.random_matrix(60, 40, 0.5, 16, equal=False),
    lambda: jax.tree.map(lambda a: jnp.stack([a, a]), tune.random_matrix(32, 40, 0.5, 16)),
    lambda: random_packed("shfl_tvw", 64, 128, 0.5, 16),
    lambda: random_packed("tvw", 40, 64, 0.75, 16),
], ids=["equal", "ragged", "stacked", "equal 2:4", "ragged 2:4"])  # fmt: skip
def test_no_form_is_prepared_twice(make, implementation):
    prepared = pk.prepare(make(), implementation)
    assert isinstance(prepared, pk.Prepared)
    with pytest.raises(ValueError, match="prepared already"):
        pk.prepare(prepared, implementation)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_layout_says_which_group_is_which(implementation, packed):
    matrix = random_packed("tvw", 100, 64, 0.75, 16) if packed else tune.random_matrix(100, 64, 0.5, 16, equal=False)
    layout, topology = pk.prepare(matrix, implementation).layout, matrix.topology
    order = np.asarray(layout.order)
    np.testing.assert_array_equal(np.sort(order), np.arange(topology.num_groups))
    rows, counts = np.asarray(topology.rows).reshape(-1, 16), np.diff(topology.group_ptr)
    np.testing.assert_array_equal(np.asarray(layout.rows).reshape(-1, 16), rows[order])
    np.testing.assert_array_equal(layout.counts, counts[order])
    for new, old in enumerate(order):
        begin, first = int(layout.group_ptr[new]), int(topology.group_ptr[old])
        np.testing.assert_array_equal(
            layout.columns[begin : begin + counts[old]], topology.columns[first : first + counts[old]]
        )


WITHOUT_TRITON = """
import sys

sys.modules["jax.experimental.pallas.triton"] = None
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels as pk
import shfl_jax.cli
from pallas_kernels import tune

matrix, x = tune.random_matrix(4096, 64, 0.0, 128), jnp.ones((64, 4096), jnp.bfloat16)
assert pk.matmul(matrix, x[:, :8], layout="feature_major").shape == (4096, 8)
try:
    pk.matmul(matrix, x, layout="feature_major", implementation="triton")
except NotImplementedError as error:
    print(error)

def loss(values, x):
    return pk.matmul(pk.join(values, matrix.topology), x, layout="feature_major").astype(jnp.float32).sum()

with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))):
    for tokens in (4096, 16):
        forward, gradients = (
            jax.jit(run).trace(matrix.values, x[:, :tokens]).lower(lowering_platforms=("cuda",)).as_text()
            for run in (loss, jax.grad(loss, (0, 1)))
        )
        print(tokens, "row_grouped_matmul" in forward, "xla.gpu.triton" in forward + gradients)
"""


def test_without_triton_mosaic_and_xla_serve():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error, many, few = done.stdout.strip().splitlines()[-3:]
    assert "this version of JAX has no Pallas-Triton" in done.stdout
    assert "xla can" in error or "xla can" in done.stdout
    assert (many, few) == ("4096 True False", "16 False False")
