"""Plans, specs, and the axes that `resolve` derives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from shfl_jax import VW, LayerSpec, Plan, ShflBW
from shfl_jax.models import linen
from shfl_jax.models._axes import Axes, contraction_axes

PATHS = ["embed/embedding", "block/mlp/kernel", "block/mlp/bias", "block/attn/kernel", "head/kernel"]


def test_first_match_wins_on_whole_paths_and_only_kernels_count():
    a, b = VW(0.5), ShflBW(0.75)
    plan = Plan({r"head/.*": None, r"(.*/)?attn/.*": a, r".*": b})
    assert plan.assign(PATHS) == {"block/attn/kernel": a, "block/mlp/kernel": b}
    assert hash(plan) == hash(Plan({r"head/.*": None, r"(.*/)?attn/.*": a, r".*": b}))
    assert Plan({"head/kernel": a}).assign(PATHS) == {"head/kernel": a}


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"attn": VW(0.5)}, "rule 'attn' matches no kernel.*block/mlp/kernel"),
        ({".*bias": VW(0.5)}, "matches no kernel"),
        ({".*": VW(0.5), "head/.*": None}, r"rule 'head/.\*' decides nothing.*move it before"),
    ],
)
def test_a_rule_without_effect_is_an_error_that_names_it(rules, text):
    with pytest.raises(ValueError, match=text):
        Plan(rules).assign(PATHS)


@pytest.mark.parametrize(
    ("rules", "text"),
    [({}, "at least one rule"), ({"(": None}, "rule '\\('"), ({"a": 0.5}, "pattern or None, got 0.5")],
)
def test_bad_plans_are_errors(rules, text):
    with pytest.raises(ValueError, match=text):
        Plan(rules)


def test_specs_read_any_axes_as_a_matrix_and_back():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for order in itertools.permutations(range(4)):
        for i, j in ((0, 1), (1, 2), (1, 3), (2, 4), (0, 4)):
            batch, inputs, outputs = (tuple(sorted(part)) for part in (order[:i], order[i:j], order[j:]))
            spec = LayerSpec("k", kernel.shape, batch, inputs, outputs, VW(0.5))
            matrix = spec.to_matrix(kernel)
            names = "abcd"
            text = ["".join(names[a] for a in part) for part in (batch, outputs, inputs)]
            expected = np.einsum(f"{names}->{''.join(text)}", kernel).reshape(*spec.batch_shape, *spec.matrix_shape)
            np.testing.assert_array_equal(matrix, expected)
            np.testing.assert_array_equal(spec.from_matrix(matrix), kernel)


def test_wrong_specs_are_errors():
    with pytest.raises(ValueError, match=r"a/kernel: .*each axis of the shape \(2, 3\)"):
        LayerSpec("a/kernel", (2, 3), (), (0,), (0,), VW(0.5))
    with pytest.raises(ValueError, match="has no weights"):
        LayerSpec("a/kernel", (0, 3), (), (0,), (1,), VW(0.5))
    spec = LayerSpec("a/kernel", (2, 3), (), (0,), (1,), VW(0.5))
    with pytest.raises(ValueError, match=r"a/kernel: expected .*\(2, 3\), got \(3, 2\)"):
        spec.to_matrix(np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"\(3, 2\), got \(2, 3\)"):
        spec.from_matrix(np.ones((2, 3)))


def axes_of(fun, *shapes, inputs=(7, 6)):
    params = {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}
    return contraction_axes(fun, params, list(params), jax.ShapeDtypeStruct(inputs, jnp.float32))


def test_axes_follow_a_kernel_through_what_models_do_to_it():
    expected = {"w0": Axes((), (0,), (1,))}
    assert axes_of(lambda p, x: x @ p["w0"], (6, 5)) == expected
    assert axes_of(lambda p, x: x @ p["w0"].astype(jnp.bfloat16), (6, 5)) == expected
    assert axes_of(lambda p, x: jax.jit(jax.checkpoint(lambda w: x @ jnp.tanh(w)))(p["w0"]), (6, 5)) == expected
    assert axes_of(lambda p, x: x @ (p["w0"] * (jnp.arange(5) > 2)), (6, 5)) == expected
    assert axes_of(lambda p, x: p["w0"].T @ x.T, (6, 5)) == expected
    assert axes_of(lambda p, x: x @ p["w0"].reshape(6, 5), (2, 3, 5)) == {"w0": Axes((), (0, 1), (2,))}
    assert axes_of(lambda p, x: jnp.einsum("nd,hdk->nhk", x, p["w0"]), (4, 6, 5)) == {"w0": Axes((), (1,), (0, 2))}
    assert (
        axes_of(lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ -w, p["w0"]), (6, 5)) == expected
    )
    assert axes_of(lambda p, x: x[:, :1] @ p["w0"], (1, 5)) == expected


def test_loops_and_indexing_number_matrices():
    stacked = {"w0": Axes((0,), (1,), (2,))}
    step = lambda c, w: (c @ w, None)  # noqa: E731
    assert axes_of(lambda p, x: jax.lax.scan(step, x, p["w0"]), (3, 6, 6)) == stacked
    assert axes_of(lambda p, x: x @ p["w0"][0] @ p["w0"][1], (2, 6, 6)) == stacked
    assert axes_of(lambda p, x: jax.vmap(jnp.matmul)(jnp.stack([x, x]), p["w0"]), (2, 6, 5)) == stacked
    nested = lambda p, x: jax.lax.scan(lambda c, ws: (jax.lax.scan(step, c, ws)[0], None), x, p["w0"])  # noqa: E731
    assert axes_of(nested, (3, 2, 6, 6)) == {"w0": Axes((0, 1), (2,), (3,))}
    shared = lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: c @ p["w0"], x)  # noqa: E731
    assert axes_of(shared, (6, 6)) == {"w0": Axes((), (0,), (1,))}
    # A scan that also hands the weights back, as NNX's does.
    assert axes_of(lambda p, x: jax.lax.scan(lambda c, w: (c @ w, w), x, p["w0"])[0], (3, 6, 6)) == stacked


@pytest.mark.parametrize(
    ("fun", "shape", "text"),
    [
        (lambda p, x: x, (6, 5), r"w0 \(6, 5\): the traced call never uses .* None in the plan"),
        (lambda p, x: (x @ p["w0"]) @ p["w0"].T, (6, 6), r"w0 \(6, 6\): tied weights: .*axes \(0,\).*axes \(1,\)"),
        (lambda p, x: (x @ p["w0"]) + p["w0"][jnp.zeros(7, int)], (6, 6), "contracted and nothing else .*gather"),
        (lambda p, x: x @ (p["w0"] / p["w0"].sum(0)), (6, 5), "reduce_sum"),
        (lambda p, x: (x @ p["w0"], p["w0"]), (6, 5), "returned by the model"),
        (lambda p, x: x @ p["w0"][:, :2], (6, 5), "slice"),
        (lambda p, x: x @ p["w0"].reshape(6, 10), (2, 15, 2), "reshape"),
        (lambda p, x: jnp.einsum("nd,ef->ndef", x, p["w0"]), (3, 2), "without contracting|mul"),
    ],
)
def test_kernels_whose_axes_cannot_be_told_are_errors(fun, shape, text):
    with pytest.raises(ValueError, match=text):
        axes_of(fun, shape)


def test_two_kernels_that_meet_are_errors_of_both():
    with pytest.raises(ValueError, match=r"w0.*multiplied with another kernel"):
        axes_of(lambda p, x: x @ (p["w0"] @ p["w1"]), (6, 5), (5, 4))
    with pytest.raises(ValueError, match=r"w0.*mixed with another value by add"):
        axes_of(lambda p, x: x @ (p["w0"] + p["w1"]), (6, 5), (6, 5))


def test_a_convolution_in_groups_is_an_error_that_names_the_place():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3,), feature_group_count=2, name="stem")(x)

    with pytest.raises(ValueError, match=r"stem/kernel \(3, 1, 4\).*convolution in groups of channels.*Model.*stem"):
        linen.resolve(Plan({".*": VW(0.5)}), Model(), jnp.ones((1, 8, 2)))
