"""Which axes of a kernel contract, found by following it through the traced model.

The shape does not tell: `query` (64, 4, 16) contracts its first axis, `out` (4, 16, 64) its first two, a scanned Dense
(3, 16, 16) its second. The trace can, for any module that ends in `dot_general` or in a convolution.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from shfl_jax.models import _trace as trace

# Elementwise, so axes keep their meaning (a pruned weight may be scaled, cast or masked before it is used).
_ELEMENTWISE = frozenset(
    """abs add and cbrt ceil clamp convert_element_type copy copy_p device_put div eq erf exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul name ne neg not or pow pvary reduce_precision rem round
    rsqrt select_n sharding_constraint sign sqrt square stop_gradient sub tan tanh""".split()  # noqa: SIM905
)
_TIE = "shfl_jax_tie_batch_axes"


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a kernel by their use, each tuple ascending, and whether that is a convolution."""

    batch: tuple[int, ...]
    contracting: tuple[int, ...]
    out: tuple[int, ...]
    convolution: bool = False


@dataclasses.dataclass(frozen=True)
class _Use:
    """One use of a kernel: its axes if it is a contraction, else None and the name of what was done."""

    axes: Axes | None
    what: str
    where: str

    def __str__(self) -> str:
        how = f"contraction of axes {self.axes.contracting}" if self.axes else self.what
        return f"{how} in {self.where}" if self.where else how


@dataclasses.dataclass(frozen=True)
class _Label:
    """What a traced value is: a kernel, possibly rearranged.

    Attributes:
        path: the kernel.
        dims: for every dimension of the value, the kernel axes it merges (none for a broadcast or unit dimension).
        peeled: kernel axes that loops or indexing have taken away, with the loop that did.
    """

    path: str
    dims: tuple[tuple[int, ...], ...]
    peeled: tuple[tuple[int, tuple[int, ...]], ...] = ()


def split_arrays(arguments: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Takes the arrays (abstract ones too) out of a pytree of arguments; the function returned puts others in."""
    leaves, treedef = jax.tree.flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def rebuild(arrays: list[Any]) -> Any:
        filled = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(treedef, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])

    return [leaves[i] for i in places], rebuild


def tie_batch_axes(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x, made to depend on a kernel while `contraction_axes` traces.

    Under `vmap` over kernels that read one shared input, the batch axis looks like one more output axis. Depending on
    the kernel gives the input that axis too, and the contraction shows it. The dependence itself is not a use.
    """
    with jax.named_scope(_TIE):
        nothing = jax.lax.convert_element_type(kernel.sum() * 0, x.dtype)
    return x + nothing


def contraction_axes(
    fun: Callable[..., Any], params: Mapping[str, jax.ShapeDtypeStruct], paths: Sequence[str], *args: Any
) -> dict[str, Axes]:
    """Derives the axes of kernels from a trace; nothing is computed or compiled.

    Args:
        fun: called as `fun({path: array}, *args)`.
        params: path -> shape and dtype of every parameter.
        paths: the kernels in question.
        *args: arrays or `jax.ShapeDtypeStruct`.

    Returns:
        path -> axes.

    Raises:
        ValueError: a kernel does not take part in contractions of one kind alone, or its axes cannot be told. The text
            names path, shape, what was found where, and the fix.
    """
    jaxpr = jax.make_jaxpr(fun)(dict(params), *args)
    tracer = _Tracer({path: params[path].shape for path in paths})
    order = sorted(params)  # the order of dict leaves
    labels = [
        _Label(path, tuple((axis,) for axis in range(len(params[path].shape)))) if path in paths else None
        for path in order
    ]
    labels += [None] * (len(jaxpr.jaxpr.invars) - len(order))
    for label in trace.walk(tracer, jaxpr, labels):
        if label is not None:
            tracer.uses[label.path].append(_Use(None, "returned by the model", ""))
    return {path: _decide(path, params[path].shape, tracer.uses[path]) for path in paths}


def _decide(path: str, shape: tuple[int, ...], uses: list[_Use]) -> Axes:
    fix = "Map it to None in the plan to keep it dense."
    found = {use.axes for use in uses if use.axes is not None}
    others = [use for use in uses if use.axes is None]
    if len(found) == 1 and not others:
        return found.pop()
    unknown = bool(uses) and all(use.what in trace.OPAQUE for use in uses)
    if unknown and len(shape) == 2:
        return Axes((), (0,), (1,))  # Flax's own convention for a matrix: (in, out)
    if not uses:
        raise ValueError(
            f"{path} {shape}: the traced call never uses this kernel, so the axes it contracts are unknown. Pass the "
            f"inputs (or `method=`) that use it. {fix}"
        )
    listed = "; ".join(dict.fromkeys(map(str, uses)))
    if unknown:
        raise ValueError(f"{path} {shape}: the axes that {listed} contracts are unknown. {fix}")
    if len(found) > 1 and not others:
        raise ValueError(f"{path} {shape}: tied weights: one kernel is contracted in different ways: {listed}. {fix}")
    raise ValueError(
        f"{path} {shape}: only kernels that are contracted and nothing else can be pruned: {listed}. {fix}"
    )


class _Tracer:
    """Carries labels from the kernels to the places that use them; a `_trace.Visitor`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.uses: dict[str, list[_Use]] = {path: [] for path in shapes}

    def constant(self, value: Any) -> None:
        """Constants are no kernels."""

    def step(self, eqn: Any, operands: list[_Label | None]) -> Sequence[_Label | None] | None:
        """Returns the labels of an equation's outputs, after recording its uses."""
        name = eqn.primitive.name
        if not any(operands) or _TIE in str(eqn.source_info.name_stack):
            return [None] * len(eqn.outvars)
        if name == "dot_general":
            return self.dot_general(eqn, operands)
        if name == "conv_general_dilated":
            return self.convolution(eqn, operands)
        if name in trace.LOOPS:
            peel, stack, agree = (functools.partial(of, eqn) for of in (self.peel, self.stack, self.agree))
            return trace.loop(self, eqn, operands, peel=peel, stack=stack, agree=agree)
        if trace.called(eqn) is not None:
            return None
        if name == "optimization_barrier":
            return operands
        if name in _ELEMENTWISE:
            return [self.agree(eqn, [label for label in operands if label is not None])]
        distinct = {label for label in operands if label is not None}
        moved = self.rearranged(eqn, operands[0]) if len(distinct) == 1 and operands[0] else None
        if moved is not None:
            return [moved]
        for label in distinct:
            self.record(eqn, label, None)
        return [None] * len(eqn.outvars)

    def rearranged(self, eqn: Any, label: _Label) -> _Label | None:
        """The label after an operation that only moves elements, or None if this is no such operation."""
        name, params, dims = eqn.primitive.name, eqn.params, label.dims
        shape = eqn.outvars[0].aval.shape
        if name == "transpose":
            return dataclasses.replace(label, dims=tuple(dims[i] for i in params["permutation"]))
        if name == "broadcast_in_dim":
            source = dict(
                zip(params["broadcast_dimensions"], zip(eqn.invars[0].aval.shape, dims, strict=True), strict=True)
            )
            sized = [source.get(at, (None, ())) for at in range(len(shape))]
            new = [dim if size == extent else () for (size, dim), extent in zip(sized, shape, strict=True)]
            return dataclasses.replace(label, dims=tuple(new))
        if name in ("reshape", "squeeze", "expand_dims"):
            if params.get("dimensions") and name == "reshape":  # a transposition before it
                label = dataclasses.replace(label, dims=tuple(dims[i] for i in params["dimensions"]))
            regrouped = self.regroup(label, shape)
            return None if regrouped is None else dataclasses.replace(label, dims=tuple(regrouped))
        if name in ("slice", "dynamic_slice"):  # w[i] of stacked weights: one matrix of a batch
            old = eqn.invars[0].aval.shape
            taken = [i for i in range(len(old)) if shape[i] != old[i]]
            if all(shape[i] == 1 for i in taken):
                peeled = tuple((-1, dims[i]) for i in taken)
                new = [() if i in taken else dim for i, dim in enumerate(dims)]
                return dataclasses.replace(label, dims=tuple(new), peeled=label.peeled + peeled)
        return None

    def regroup(self, label: _Label, shape: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """Distributes the kernel axes over a new shape; None if an axis would be cut."""
        size = self.shapes[label.path]
        axes = [axis for dim in label.dims for axis in dim]
        if math.prod(size[axis] for axis in axes) != math.prod(shape):
            return None  # a broadcast dimension takes part
        dims: list[tuple[int, ...]] = []
        for extent in shape:
            dim: list[int] = []
            while (
                axes
                and math.prod(size[a] for a in dim) * size[axes[0]] <= extent
                and (not dim or math.prod(size[a] for a in dim) < extent)
            ):
                dim.append(axes.pop(0))
            if math.prod(size[a] for a in dim) != extent:
                return None
            dims.append(tuple(dim))
        return dims if all(size[axis] == 1 for axis in axes) else None

    def dot_general(self, eqn: Any, operands: list[_Label | None]) -> Sequence[_Label | None]:
        contract, batch = eqn.params["dimension_numbers"]
        for label, contracted, batched in zip(operands, contract, batch, strict=True):
            if label is None:
                continue
            if all(operands):
                self.record(eqn, label, None, "multiplied with another kernel")
                continue
            inner = {axis for i in contracted for axis in label.dims[i]}
            outer = {axis for i in batched for axis in label.dims[i]}
            if inner:
                self.record(eqn, label, self.axes(label, inner, outer))
            else:
                self.record(eqn, label, None, "multiplied without contracting one of its axes")
        return [None] * len(eqn.outvars)

    def convolution(self, eqn: Any, operands: list[_Label | None]) -> Sequence[_Label | None]:
        """A kernel contracts its spatial axes and its input channels."""
        images, kernel = operands
        if images is not None:
            self.record(eqn, images, None, "convolved as if it were an image")
        if kernel is not None:
            out, *contracted = eqn.params["dimension_numbers"].rhs_spec
            features, groups = list(kernel.dims[out]), eqn.params["feature_group_count"]
            # vmap over kernels and images makes one group of each whole kernel: leading axes of the output channels.
            outer = set()
            while len(features) > 1 and groups % self.shapes[kernel.path][features[0]] == 0 and groups > 1:
                outer.add(features.pop(0))
                groups = eqn.params["feature_group_count"] // math.prod(self.shapes[kernel.path][a] for a in outer)
            inner = {axis for i in contracted for axis in kernel.dims[i]}
            if groups == 1 and eqn.params["batch_group_count"] == 1 and inner:
                self.record(eqn, kernel, dataclasses.replace(self.axes(kernel, inner, outer), convolution=True))
            else:
                self.record(eqn, kernel, None, "a convolution in groups of channels, which has no sparse kernel")
        return [None] * len(eqn.outvars)

    def axes(self, label: _Label, inner: set[int], outer: set[int]) -> Axes:
        """Sorts a kernel's axes, those that loops have taken away among the batch axes."""
        outer = outer | {axis for _, dim in label.peeled for axis in dim}
        rest = set(range(len(self.shapes[label.path]))) - inner - outer
        return Axes(tuple(sorted(outer)), tuple(sorted(inner)), tuple(sorted(rest)))

    def peel(self, eqn: Any, label: _Label | None) -> _Label | None:
        """The label inside of a loop that takes a kernel slice by slice."""
        return label and _Label(label.path, label.dims[1:], (*label.peeled, (id(eqn), label.dims[0])))

    def stack(self, eqn: Any, label: _Label | None) -> _Label | None:
        """The label of a kernel that a loop gives back slice by slice."""
        if label is None:
            return None
        if label.peeled and label.peeled[-1][0] == id(eqn):
            return _Label(label.path, (label.peeled[-1][1], *label.dims), label.peeled[:-1])
        return _Label(label.path, ((), *label.dims), label.peeled)

    def agree(self, eqn: Any, labels: list[_Label | None]) -> _Label | None:
        """The one label that several values share; mixing kernels is a use of each."""
        distinct = list(dict.fromkeys(labels))
        if len(distinct) == 1 and (distinct[0] is None or len(distinct[0].dims) == len(eqn.outvars[0].aval.shape)):
            return distinct[0]
        for label in distinct:
            if label is not None:
                self.record(eqn, label, None, f"mixed with another value by {eqn.primitive.name}")
        return None

    def record(self, eqn: Any, label: _Label, axes: Axes | None, what: str = "") -> None:
        where = str(eqn.source_info.name_stack)
        self.uses[label.path].append(_Use(axes, what or eqn.primitive.name, where))
