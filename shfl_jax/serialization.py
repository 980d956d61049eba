"""JSON forms of patterns and specs, for checkpoint headers and for `jax.export`."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from jax import export

from pallas_kernels import RowGrouped, Topology
from shfl_jax.compress import LayerTopology
from shfl_jax.layers import LayerSpec
from shfl_jax.patterns import Pattern


def encode_spec(spec: LayerSpec) -> dict[str, Any]:
    """The JSON form of a spec."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name != "pattern"}
    options = {
        field.name: getattr(spec.pattern, field.name) for field in dataclasses.fields(spec.pattern) if field.init
    }
    return {**fields, "pattern": {"name": spec.pattern.name, **options}}


def decode_spec(encoded: dict[str, Any]) -> LayerSpec:
    """Undoes `encode_spec`.

    Raises:
        ValueError: the pattern is unknown, or a field is missing or wrong.
    """
    try:
        options = dict(encoded["pattern"])
        kinds = {kind.name: kind for kind in _subclasses(Pattern) if hasattr(kind, "name")}
        name = options.pop("name")
        if name not in kinds:
            raise ValueError(
                f"unknown pattern {name!r}; known are {sorted(kinds)}: update the library, or import yours first"
            )
        return LayerSpec(**{**encoded, "pattern": kinds[name](**options)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"a layer's spec lacks a field or has a wrong one: {error}") from error


def _subclasses(kind: type) -> Iterator[Any]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _encode_topology(aux: tuple[Any, ...]) -> bytes:
    return json.dumps(aux).encode()


def _decode_topology(data: bytes) -> tuple[Any, ...]:
    *sizes, buckets = json.loads(data)
    return (*sizes, None if buckets is None else tuple(tuple(bucket) for bucket in buckets))


def _encode_layer(aux: tuple[Any, ...]) -> bytes:
    spec, *rest = aux
    return json.dumps([encode_spec(spec), *rest]).encode()


def _decode_layer(data: bytes) -> tuple[Any, ...]:
    spec, dense_because, tokens = json.loads(data)
    return decode_spec(spec), dense_because, tuple(tokens)


def _register(kind: type, encode: Any, decode: Any, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> None:
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"shfl_jax.{kind.__name__}",
        serialize_auxdata=encode,
        deserialize_auxdata=decode,
        from_children=lambda aux_data, children: kind(
            **dict(zip(data_fields, children, strict=True)), **dict(zip(meta_fields, aux_data, strict=True))
        ),
    )


# The order of the fields is that of their registration as pytrees.
_register(
    Topology,
    _encode_topology,
    _decode_topology,
    ("columns", "group_ptr", "rows", "counts"),
    ("m", "k", "group_size", "max_count", "buckets"),
)
_register(RowGrouped, lambda aux: b"", lambda data: (), ("values", "topology"), ())
_register(LayerTopology, _encode_layer, _decode_layer, ("topology",), ("spec", "dense_because", "tokens"))
