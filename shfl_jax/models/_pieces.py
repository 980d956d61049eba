"""Cutting a traced model before its layers, so that it can be run piece by piece."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from shfl_jax._layers import LayerSpec
from shfl_jax.models import _trace as trace

_MARK = "shfl_jax_cut:"
_FIX = "Map it to None in the plan to keep it dense"


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of the model that ends where some layers read their inputs.

    Attributes:
        paths: these layers.
        dims: the axes of the inputs that contract, in the order of the kernel's input axes.
        k: their product, K.
        run: (params and constants, live activations) -> (the layers' inputs, live activations after it).
    """

    paths: tuple[str, ...]
    dims: tuple[int, ...]
    k: int
    run: Callable[..., tuple[jax.Array, list[jax.Array]]]


@functools.lru_cache(maxsize=16)
def cut(
    fun: Callable[..., Any],
    params: tuple[tuple[str, Any], ...],
    constants_tree: Any,
    constants: tuple[Any, ...],
    batch_tree: Any,
    batch: tuple[Any, ...],
    specs: tuple[LayerSpec, ...],
) -> tuple[Piece, ...]:
    """Traces a model and cuts it before every product with a kernel of interest.

    Args:
        fun: the model, `fun(params, constants, *batch)`, params as path -> array.
        params: (path, shape and dtype) of every parameter.
        constants_tree: the structure of the constants.
        constants: shapes and dtypes of their leaves.
        batch_tree: the structure of a batch, a tuple.
        batch: shapes and dtypes of its leaves.
        specs: the layers of interest.

    Returns:
        The pieces in execution order, up to the last layer of interest.

    Raises:
        ValueError: a layer that never runs, or contracts other axes than its spec says.
        NotImplementedError: a layer inside a loop, or one that runs several times.
    """
    names = [path for path, _ in params]
    cutter = _Cutter(specs)

    def flat(leaves: list[jax.Array]) -> Any:
        kernels, rest = leaves[: len(names)], leaves[len(names) :]
        held, given = rest[: len(constants)], rest[len(constants) :]
        named = dict(zip(names, kernels, strict=True))
        return fun(named, jax.tree.unflatten(constants_tree, held), *jax.tree.unflatten(batch_tree, given))

    shapes = [leaf for _, leaf in params] + [*constants, *batch]
    traced = jax.make_jaxpr(flat)(shapes)
    labels = [_Label(path, tuple(range(len(leaf.shape)))) if path in cutter.specs else None for path, leaf in params]
    labels += [None] * (len(shapes) - len(labels))

    def opened(*leaves: jax.Array) -> list[jax.Array]:
        return [out.value for out in trace.walk(cutter, traced, list(map(_Traced, leaves, labels)))]

    # Traced a second time with calls around kernels opened up and the cuts marked by named identities.
    marked = jax.make_jaxpr(opened)(*shapes)
    cutter.check()
    return _split(marked, cutter.cuts, len(names) + len(constants))


@dataclasses.dataclass(frozen=True)
class _Label:
    """A traced value that is a kernel: its path, and the kernel's axis that each dimension of the value is."""

    path: str
    axes: tuple[int, ...]


class _Traced(NamedTuple):
    value: Any
    label: _Label | None = None


@dataclasses.dataclass
class _Place:
    paths: list[str]
    dims: tuple[int, ...]
    k: int


class _Cutter:
    """Evaluates a jaxpr, marking the inputs of products with a kernel; a `_trace.Visitor`."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        self.specs = {spec.path: spec for spec in specs}
        self.cuts: list[_Place] = []
        self.marked: dict[tuple[int, tuple[int, ...]], tuple[int, jax.Array, jax.Array]] = {}

    def check(self) -> None:
        ran = [path for cut in self.cuts for path in cut.paths]
        for path, spec in self.specs.items():
            if path not in ran:
                raise ValueError(
                    f"{path} {spec.shape}: the layer never ran on the calibration batches; pass inputs that use it. "
                    f"{_FIX}"
                )
            if ran.count(path) > 1:
                raise NotImplementedError(
                    f"{path} {spec.shape}: the layer runs {ran.count(path)} times in one call of the model; join its "
                    f"inputs along the batch axis so that it runs once. {_FIX}"
                )

    def constant(self, value: Any) -> _Traced:
        """Constants are no kernels."""
        return _Traced(value)

    def step(self, eqn: Any, operands: list[_Traced]) -> list[_Traced] | None:
        """Evaluates an equation, with the inputs of a layer marked; None for a call that reads a kernel."""
        name, params = eqn.primitive.name, eqn.params
        values = [operand.value for operand in operands]
        label = next((operand.label for operand in operands if operand.label is not None), None)
        if label is None:
            return [_Traced(out) for out in _bind(eqn, values)]
        spec = self.specs[label.path]
        if name in trace.LOOPS or spec.batch_axes:
            raise NotImplementedError(
                f"{spec.path} {spec.shape}: layers stacked or run inside a loop cannot be calibrated one after the "
                f"other; unroll them (a Python loop in place of nn.scan or nn.vmap). {_FIX}"
            )
        if trace.called(eqn) is not None:
            return None
        if name == "conv_general_dilated":
            raise NotImplementedError(
                f"{spec.path} {spec.shape}: convolutions are not calibrated; prune them with `allocate` and `mask`, or "
                f"during training. {_FIX}"
            )
        if name == "dot_general":
            side = 1 if operands[1].label is not None else 0
            values[1 - side] = self.mark(label, values[1 - side], params["dimension_numbers"][0], side)
        labels: list[_Label | None] = [None] * len(eqn.outvars)
        if name in ("convert_element_type", "copy", "copy_p", "name", "optimization_barrier"):
            labels = [operand.label for operand in operands]
        elif name == "transpose":
            labels = [_Label(label.path, tuple(label.axes[i] for i in params["permutation"]))]
        return [_Traced(*out) for out in zip(_bind(eqn, values), labels, strict=True)]

    def mark(self, label: _Label, x: jax.Array, contracting: Any, side: int) -> jax.Array:
        """Marks x, the inputs of a layer; layers that read one value share a cut."""
        spec = self.specs[label.path]
        kernel_axes = [label.axes[dim] for dim in contracting[side]]
        by_axis = dict(zip(kernel_axes, contracting[1 - side], strict=True))
        if tuple(sorted(by_axis)) != spec.in_axes:
            raise ValueError(
                f"{spec.path} {spec.shape}: its spec contracts axes {spec.in_axes}, the model "
                f"{tuple(sorted(by_axis))}; resolve the plan again for this model"
            )
        dims = tuple(by_axis[axis] for axis in spec.in_axes)
        key = (id(x), dims)
        if key not in self.marked:
            k = int(np.prod([x.shape[dim] for dim in dims]))
            self.marked[key] = (len(self.cuts), checkpoint_name(x, f"{_MARK}{len(self.cuts)}"), x)  # x: keeps its id
            self.cuts.append(_Place([], dims, k))
        number, marked, _ = self.marked[key]
        self.cuts[number].paths.append(label.path)
        return marked


def _split(closed: Any, cuts: list[_Place], num_given: int) -> tuple[Piece, ...]:
    jaxpr = closed.jaxpr
    given, live = list(jaxpr.invars[:num_given]), list(jaxpr.invars[num_given:])
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    varying = set(live)
    fixed: list[Any] = []  # equations that depend on no batch are evaluated again where they are needed
    parts: list[list[Any]] = [[]]
    for eqn in jaxpr.eqns:
        if not any(isinstance(var, core.Var) and var in varying for var in eqn.invars):
            fixed.append(eqn)
            continue
        varying.update(eqn.outvars)
        parts[-1].append(eqn)
        if eqn.primitive.name == "name" and str(eqn.params["name"]).startswith(_MARK):
            parts.append([])
    pieces = []
    for i, cut in enumerate(cuts):
        later = {var for part in parts[i + 1 : len(cuts)] for eqn in part for var in _variables(eqn)}
        made = dict.fromkeys([*live, *(var for eqn in parts[i] for var in eqn.outvars)])
        after = [var for var in made if var in later]
        target = parts[i][-1].outvars[0]
        run = jax.jit(functools.partial(_run, consts, fixed + parts[i], given, live, target, after))
        pieces.append(Piece(tuple(cut.paths), cut.dims, cut.k, run))
        live = after
    return tuple(pieces)


def _run(
    consts: dict[Any, Any],
    eqns: list[Any],
    given: list[Any],
    live: list[Any],
    target: Any,
    after: list[Any],
    given_values: list[jax.Array],
    live_values: list[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    values = consts | dict(zip(given, given_values, strict=True)) | dict(zip(live, live_values, strict=True))
    for eqn in eqns:
        values |= zip(eqn.outvars, _bind(eqn, [_read(values, var) for var in eqn.invars]), strict=True)
    return values[target], [values[var] for var in after]


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if isinstance(var, core.Var)]


def _read(values: Mapping[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else values[var]


def _bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]
