"""Walking a traced model, through the calls and loops inside it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from jax.extend import core

OPAQUE = frozenset(["pallas_call", "custom_call", "ffi_call", "ragged_dot_general"])
"""Primitives that are no calls of a part of the model, though some hold a jaxpr."""

LOOPS = frozenset(["scan", "while", "cond"])
"""Primitives that run jaxprs several times or not at all."""

V = TypeVar("V")


class Visitor(Protocol[V]):
    """What a walk carries from equation to equation."""

    def constant(self, value: Any) -> V:
        """What a constant of the trace is."""

    def step(self, eqn: Any, operands: list[V]) -> Sequence[V] | None:
        """What the outputs of an equation are; None to look inside a call."""


def walk(visitor: Visitor[V], jaxpr: Any, inputs: Sequence[V]) -> list[V]:
    """Carries values through a jaxpr, closed or not, and through every call that the visitor does not take itself.

    Returns:
        The values of the outputs.
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip(jaxpr.constvars, map(visitor.constant, consts), strict=True))
    env |= zip(jaxpr.invars, inputs, strict=True)

    def read(var: Any) -> V:
        return visitor.constant(var.val) if isinstance(var, core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        outs = visitor.step(eqn, operands)
        env |= zip(eqn.outvars, walk(visitor, called(eqn), operands) if outs is None else outs, strict=True)
    return [read(var) for var in jaxpr.outvars]


def called(eqn: Any) -> Any:
    """The jaxpr that an equation runs once on its operands (jit, remat, custom derivatives); None if it is no call."""
    if eqn.primitive.name in OPAQUE | LOOPS:
        return None
    found = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
    inner = getattr(found, "jaxpr", found)
    fits = inner is not None and (len(inner.invars), len(inner.outvars)) == (len(eqn.invars), len(eqn.outvars))
    return found if fits else None


def loop(
    visitor: Visitor[V],
    eqn: Any,
    operands: list[V],
    *,
    peel: Callable[[V], V],
    stack: Callable[[V], V],
    agree: Callable[[list[V]], V],
) -> list[V]:
    """Carries values once through the jaxprs of one of `LOOPS`.

    Args:
        visitor: the visitor.
        eqn: the loop.
        operands: of the equation.
        peel: what an operand is inside that a scan takes slice by slice.
        stack: what an output is outside that a scan makes slice by slice.
        agree: what an output of a `cond` is, from those of its branches.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
        c, b = params["cond_nconsts"], params["body_nconsts"]
        walk(visitor, params["cond_jaxpr"], operands[:c] + operands[c + b :])
        return walk(visitor, params["body_jaxpr"], operands[c:])
    if name == "cond":
        outs = [walk(visitor, branch, operands[1:]) for branch in params["branches"]]
        return [agree(list(values)) for values in zip(*outs, strict=True)]
    # What is scanned has one dimension more outside than inside; versions of JAX name their counts differently.
    body = params["jaxpr"].jaxpr
    inside = [peel(v) if more else v for v, more in zip(operands, _deeper(eqn.invars, body.invars), strict=True)]
    outs = walk(visitor, params["jaxpr"], inside)
    return [stack(v) if more else v for v, more in zip(outs, _deeper(eqn.outvars, body.outvars), strict=True)]


def _deeper(outside: Sequence[Any], inside: Sequence[Any]) -> list[bool]:
    """Whether each variable has more dimensions outside of a loop."""
    return [len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True)]
