"""Products in plain XLA that JAX differentiates forward and backward, any number of times.

The product of values and activations and its two derivatives are each linear in two arguments, and the derivatives of
any of the three are the other two:

    product   (values, x) -> y         by values: dvalues(x, ct)     by x: dx(values, ct)
    dvalues   (x, dy) -> values        by x: dx(ct, dy)              by dy: product(ct, x)
    dx        (values, dy) -> x        by values: dvalues(ct, dy)    by dy: product(values, ct)

So one primitive does for all, and gradients run the forms of `_backend` instead of what JAX would make of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels._activations import activate
from pallas_kernels._backend import Call
from pallas_kernels._layout import MatrixLayout, Prepared
from pallas_kernels._promotion import standard_promotion
from pallas_kernels.xla._backend import XLA

Kind = Literal["product", "dvalues", "dx"]
TRANSPOSED: dict[Kind, tuple[tuple[Kind, bool], tuple[Kind, bool]]] = {
    "product": (("dvalues", True), ("dx", True)),
    "dvalues": (("dx", False), ("product", False)),
    "dx": (("dvalues", False), ("product", True)),
}
"""By which argument -> (what the other argument and the cotangent go to, whether the other one comes first)."""


def forward(call: Call, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None) -> jax.Array:
    """As `Backend.forward`."""
    y = _bind("product", call, matrix.layout, matrix.values, x)
    if bias is not None:
        y = y + (bias if call.layout == "token_major" else bias[:, None])
    return activate(call.activation, y if addend is None else y + addend)


def _bind(kind: Kind, call: Call, layout: MatrixLayout, a: jax.Array, b: jax.Array) -> jax.Array:
    leaves, tree = jax.tree.flatten(layout)
    plain = dataclasses.replace(call, activation=None)
    return bilinear_p.bind(a, b, *leaves, kind=kind, call=plain, tree=tree, batches=())


@standard_promotion()
def _compute(
    a: jax.Array, b: jax.Array, *leaves: jax.Array, kind: Kind, call: Call, tree: Any, batches: tuple[Any, ...]
) -> jax.Array:
    def one(a: jax.Array, b: jax.Array, *leaves: jax.Array) -> jax.Array:
        layout = jax.tree.unflatten(tree, leaves)
        if kind == "product":
            return XLA().forward(call, Prepared(a, layout), b, None, None)
        if kind == "dvalues":
            return XLA().grad_values(call, layout, a, b)
        return XLA().grad_input(call, Prepared(a, layout), b)

    for dims in batches:
        one = jax.vmap(one, in_axes=dims)
    return one(a, b, *leaves)


def _abstract(*args: Any, **params: Any) -> Any:
    shapes = [jax.ShapeDtypeStruct(arg.shape, arg.dtype) for arg in args]
    out = jax.eval_shape(functools.partial(_compute, **params), *shapes)
    return jax.core.ShapedArray(out.shape, out.dtype)


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    a, b, *leaves = primals
    y = bilinear_p.bind(*primals, **params)
    parts = []
    if not isinstance(tangents[0], ad.Zero):
        parts.append(bilinear_p.bind(tangents[0], b, *leaves, **params))
    if not isinstance(tangents[1], ad.Zero):
        parts.append(bilinear_p.bind(a, tangents[1], *leaves, **params))
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


def _transpose(
    ct: Any, a: Any, b: Any, *leaves: Any, kind: Kind, call: Call, tree: Any, batches: tuple[Any, ...]
) -> list[Any]:
    if isinstance(ct, ad.Zero):
        return [None] * (2 + len(leaves))
    by = 0 if ad.is_undefined_primal(a) else 1
    (to, other_first), other = TRANSPOSED[kind][by], b if by == 0 else a

    def run(ct: jax.Array, other: jax.Array, *leaves: jax.Array) -> jax.Array:
        pair = (other, ct) if other_first else (ct, other)
        return _bind(to, call, jax.tree.unflatten(tree, leaves), *pair)

    for dims in batches:
        run = _batched(run, dims[by], (0, dims[1 - by], *dims[2:]))
    found = run(ct, other, *leaves)
    return [found if by == 0 else None, found if by == 1 else None, *[None] * len(leaves)]


def _batched(run: Callable[..., jax.Array], out: int | None, dims: tuple[Any, ...]) -> Callable[..., jax.Array]:
    """The transpose under vmap: summed where what it is the cotangent of was not mapped."""
    mapped = jax.vmap(run, in_axes=dims, out_axes=0 if out is None else out)

    def summed(*args: jax.Array) -> jax.Array:
        return mapped(*args).sum(0)

    return summed if out is None else mapped


def _batch(args: Any, dims: Any, *, batches: tuple[Any, ...], **params: Any) -> tuple[Any, int]:
    return bilinear_p.bind(*args, batches=(*batches, tuple(dims)), **params), 0


bilinear_p = Primitive("row_grouped_bilinear")
bilinear_p.def_impl(jax.jit(_compute, static_argnames=("kind", "call", "tree", "batches")))
bilinear_p.def_abstract_eval(_abstract)
ad.primitive_jvps[bilinear_p] = _jvp
ad.primitive_transposes[bilinear_p] = _transpose
batching.primitive_batchers[bilinear_p] = _batch
mlir.register_lowering(bilinear_p, mlir.lower_fun(_compute, multiple_results=False))
