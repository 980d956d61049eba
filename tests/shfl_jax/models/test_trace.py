"""Both users of the walk see a kernel through whatever runs jaxprs of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shfl_jax import VW, LayerSpec
from shfl_jax.models import cut
from shfl_jax.models._axes import Axes, contraction_axes

X = np.random.default_rng(0).random((7, 6)).astype(np.float32)
W = np.random.default_rng(1).random((6, 6)).astype(np.float32)


def product(x, w):
    return jnp.tanh(x) @ w


@jax.custom_jvp
def with_jvp(x, w):
    return product(x, w)


@jax.custom_vjp
def with_vjp(x, w):
    return product(x, w)


with_jvp.defjvp(lambda primals, tangents: jax.jvp(product, primals, tangents))
with_vjp.defvjp(lambda x, w: jax.vjp(product, x, w), lambda pull, tangent: pull(tangent))

# Name of the primitive -> a model that runs the product inside of it.
CALLS = {
    "jit": jax.jit(product),
    "remat2": jax.checkpoint(product),
    "custom_jvp_call": with_jvp,
    "custom_vjp_call": with_vjp,
}
LOOPS = {
    "scan": lambda x, w: jax.lax.scan(lambda c, _: (product(c, w), None), x, length=2)[0],
    "while": lambda x, w: jax.lax.while_loop(lambda c: c.sum() > 1, lambda c: product(c, w), x),
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, product, lambda x, w: product(-x, w), x, w),
}


def axes_of(fun, w=W):
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)
    return contraction_axes(lambda params, x: fun(x, params["w"]), {"w": like}, ["w"], X)["w"]


def pieces_of(fun):
    spec = LayerSpec("w", (6, 6), (), (0,), (1,), VW(0.5))
    like = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    inputs, tree = (jax.ShapeDtypeStruct(X.shape, X.dtype),), jax.tree.structure((X,))
    return cut(
        lambda params, _, x: fun(x, params["w"]), (("w", like),), jax.tree.structure(()), (), tree, inputs, (spec,)
    )


@pytest.mark.parametrize("outside", [lambda fun: fun, jax.jit], ids=["alone", "in jit"])
@pytest.mark.parametrize("name", [*CALLS, *LOOPS])
def test_axes_are_found_through(name, outside):
    fun = (CALLS | LOOPS)[name]
    assert name in {eqn.primitive.name for eqn in jax.make_jaxpr(fun)(X, W).jaxpr.eqns}
    assert axes_of(outside(fun)) == Axes((), (0,), (1,))


@pytest.mark.parametrize("outside", [lambda fun: fun, jax.jit], ids=["alone", "in jit"])
@pytest.mark.parametrize("name", CALLS)
def test_pieces_are_cut_inside(name, outside):
    (piece,) = pieces_of(outside(CALLS[name]))
    assert (piece.paths, piece.dims, piece.k) == (("w",), (1,), 6)
    inputs, live = piece.run([W], [X])
    np.testing.assert_allclose(inputs, np.tanh(X), rtol=1e-6)
    assert live == []


@pytest.mark.parametrize("outside", [lambda fun: fun, jax.jit], ids=["alone", "in jit"])
@pytest.mark.parametrize("name", LOOPS)
def test_a_kernel_inside_a_loop_is_seen_and_refused(name, outside):
    with pytest.raises(NotImplementedError, match=r"w \(6, 6\): layers stacked or run inside a loop"):
        pieces_of(outside(LOOPS[name]))


def test_a_scan_over_kernels_numbers_them():
    def model(x, ws):
        return jax.lax.scan(lambda c, w: (product(c, w), None), x, ws)[0]

    assert axes_of(model, np.stack([W, W])) == Axes((0,), (1,), (2,))


def test_calls_without_a_kernel_stay_whole():
    def model(x, w):
        return product(jax.jit(jnp.sin)(x), w)

    (piece,) = pieces_of(model)
    np.testing.assert_allclose(piece.run([W], [X])[0], np.tanh(np.sin(X)), rtol=1e-5)
    ran = jax.make_jaxpr(piece.run)([W], [X]).jaxpr.eqns[0].params["jaxpr"]
    assert "jit" in {eqn.primitive.name for eqn in ran.eqns}
