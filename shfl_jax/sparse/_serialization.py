"""JSON forms of patterns and specs, for checkpoint headers and for `jax.export`."""

import dataclasses
import json
from typing import Any

import jax
from jax import export

from pallas_kernels import ConvLayout, CPULayout, MatrixLayout, Prepared, RowGrouped, Topology, Window
from shfl_jax._layers import LayerSpec
from shfl_jax.patterns import registered, registered_name
from shfl_jax.sparse._compress import CompressedLayer


def encode_spec(spec: LayerSpec) -> dict[str, Any]:
    """The JSON form of a spec.

    Raises:
        ValueError: the class of its pattern is not registered.
    """
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name != "pattern"}
    options = {
        field.name: getattr(spec.pattern, field.name) for field in dataclasses.fields(spec.pattern) if field.init
    }
    return {**fields, "pattern": {"name": registered_name(spec.pattern), **options}}


def decode_spec(encoded: dict[str, Any]) -> LayerSpec:
    """Undoes `encode_spec`.

    Raises:
        ValueError: the pattern is unknown, or a field is missing or wrong.
    """
    try:
        options = dict(encoded["pattern"])
        kinds, name = registered(), options.pop("name")
        if name not in kinds:
            raise ValueError(
                f"unknown pattern {name!r}; known are {sorted(kinds)}: update the library, or import the "
                "module that registers yours (`shfl_jax.patterns.register`)"
            )
        return LayerSpec(**{**encoded, "pattern": kinds[name](**options)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"a layer's spec lacks a field or has a wrong one: {error}") from error


def _register(kind: type, name: str) -> None:
    """Lets `jax.export` store a dataclass that is a pytree: its static fields become JSON.

    Args:
        kind: the dataclass.
        name: what exported programs call it. It is part of the files, so it outlives the class's own name.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    data = jax.tree.leaves(kind(**{field: field for field in names}))  # the fields that the pytree holds as children
    meta = [field for field in names if field not in data]

    def encode(aux_data: tuple[Any, ...]) -> bytes:
        return json.dumps([_encoded(v) for v in aux_data]).encode()

    def decode(data: bytes) -> tuple[Any, ...]:
        return tuple(_decoded(v) for v in json.loads(data))

    def from_children(aux_data: Any, children: Any) -> Any:
        return kind(**dict(zip(data, children, strict=True)), **dict(zip(meta, aux_data, strict=True)))

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"shfl_jax.{name}",
        serialize_auxdata=encode,
        deserialize_auxdata=decode,
        from_children=from_children,
    )


def _encoded(value: Any) -> Any:
    """The JSON form of a static field."""
    if isinstance(value, LayerSpec):
        return encode_spec(value)
    return {"window": dataclasses.asdict(value)} if isinstance(value, Window) else value


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return _tuples(value)
    if "window" in value:
        return Window(**{name: _tuples(sizes) for name, sizes in value["window"].items()})
    return decode_spec(value)


def _tuples(value: Any) -> Any:
    """JSON knows lists only; static fields are tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


for _kind in (Topology, RowGrouped, MatrixLayout, CPULayout, ConvLayout, Prepared):
    _register(_kind, _kind.__name__)
_register(CompressedLayer, "LayerTopology")  # its name when programs were first exported
