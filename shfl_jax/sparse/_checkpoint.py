"""Checkpoints of compressed models: an Orbax checkpoint of the arrays beside a JSON header that describes them.

    PATH/header.json       format version, pattern and sizes of every layer, shape and dtype of every array,
                           size and checksum of every file below
    PATH/arrays.<token>/   the Orbax checkpoint that the header names

A save writes new arrays first and then replaces the header in one step, so a save that stops leaves the old one valid.
"""

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from pallas_kernels import MatrixLayout, row_grouped
from shfl_jax._paths import path_leaves
from shfl_jax.sparse._compress import CompressedLayer, layers, matrices, nest
from shfl_jax.sparse._serialization import decode_spec, encode_spec

VERSIONS = (1, 2)  # with the second came `chosen`; what does without it is written as the first
_HEADER = "header.json"
_INTEGERS = ("columns", "group_ptr", "rows", "pairs", "chosen")  # the last two only under 2:4


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another version."""


def save(path: str | os.PathLike[str], sparse: Mapping[str, Any]) -> None:
    """Saves a compressed model. Replaces an earlier one at the same path; if it is stopped, the earlier one stays.

    Args:
        path: a directory, made if needed.
        sparse: what `compress` returned, other collections included. Boxes around arrays are not saved.

    Raises:
        ValueError: the model is no compressed one, or is a prepared one.
        CheckpointError: something that is no checkpoint is at the path.
    """
    path = Path(path).absolute()
    found = layers(sparse)
    for name, layer in found.items():
        if isinstance(layer.topology, MatrixLayout):
            raise ValueError(
                f"{name}: checkpoints hold the canonical form; save what `compress` returned, not `prepare`"
            )
    _check_place(path)
    collections = {name: path_leaves(tree) for name, tree in sparse.items() if name != "topology"}
    collections["topology"] = {
        f"{name}/{field}": getattr(matrix.integers, field)
        for name, matrix in matrices(sparse).items()
        for field in _INTEGERS
        if getattr(matrix.integers, field) is not None
    }
    arrays = {name: {key: np.asarray(leaf) for key, leaf in tree.items()} for name, tree in collections.items()}
    directory = f"arrays.{secrets.token_hex(8)}"
    header = {
        "format": "shfl_jax",
        "version": VERSIONS[any(key.endswith("/chosen") for key in collections["topology"])],
        "directory": directory,
        "layers": {name: _describe(layer) for name, layer in found.items()},
        "arrays": {
            name: {key: {"shape": array.shape, "dtype": array.dtype.name} for key, array in tree.items()}
            for name, tree in arrays.items()
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / directory, {name: nest(tree) for name, tree in arrays.items() if tree})
        header["files"] = {str(file.relative_to(path)): _stamp(file) for file in _files(path / directory)}
        written = path / f"{directory}.json"
        written.write_text(json.dumps({**header, "crc32": _crc_of_header(header)}, indent=1))
        os.replace(written, path / _HEADER)
    except BaseException:
        shutil.rmtree(path / directory, ignore_errors=True)
        raise
    for stale in path.glob("arrays.*"):
        if stale.name != directory:
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads a compressed model and checks it, without making the dense weights of compressed layers.

    Args:
        path: the directory that `save` wrote.

    Returns:
        What was saved, as nested dicts of arrays on the default device.

    Raises:
        CheckpointError: no checkpoint there, another version, or damage; the text names the file or layer and the fix.
    """
    path = Path(path).absolute()
    header = _read_header(path)
    _check_files(path, header["files"])
    stored = path / header["directory"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(entry: dict[str, Any]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]), sharding=device)

    targets = {name: {key: target(entry) for key, entry in tree.items()} for name, tree in header["arrays"].items()}
    abstract = {name: nest(tree) for name, tree in targets.items() if tree}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(stored, abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for files that do not fit the header
        raise CheckpointError(f"{stored} does not hold what the header says; save the model again ({error})") from error
    trees = {name: {} for name in header["arrays"]} | restored
    flat = {name: path_leaves(tree) for name, tree in trees.items()}
    topology = {}
    for name, entry in header["layers"].items():
        try:
            spec = decode_spec(entry["spec"])
            integers = None
            if not entry["dense_because"]:
                parts: list[Any] = [flat["topology"].get(f"{name}/{field}") for field in _INTEGERS]
                if any(part is None for part in parts[:3]):
                    raise ValueError("its topology lacks an array")
                m, k = spec.matrix_shape
                matrix = row_grouped(flat["params"][name], *parts, m=m, k=k)
                integers = matrix.topology
                if _describe(CompressedLayer(integers, spec))["V"] != entry["V"]:
                    raise ValueError(f"the header says V={entry['V']}, the values {matrix.values.shape} another")
            topology[name] = CompressedLayer(integers, spec, entry["dense_because"], tuple(entry["tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: layer {name!r} is damaged; save the model again ({error})") from error
    return {**trees, "topology": nest(topology)}


def _describe(layer: CompressedLayer) -> dict[str, Any]:
    m, k = layer.spec.matrix_shape
    return {
        "spec": encode_spec(layer.spec),
        "M": m,
        "K": k,
        "V": layer.topology.group_size if layer.topology is not None else None,
        "dense_because": layer.dense_because,
        "tokens": layer.tokens,
    }


def _read_header(path: Path) -> dict[str, Any]:
    file = path / _HEADER
    try:
        header = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; give the directory that `shfl_jax.save` wrote") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or cannot be read; save the model again ({error})") from error
    if not isinstance(header, dict) or header.get("format") != "shfl_jax":
        raise CheckpointError(
            f"{file} is no header of a compressed model; give the directory that `shfl_jax.save` wrote"
        )
    if header.get("version") not in VERSIONS:
        raise CheckpointError(
            f"{file} has format version {header.get('version')!r}, this library reads "
            f"{' and '.join(map(str, VERSIONS))}; save the model again, or use the version of the library that wrote it"
        )
    if header.pop("crc32", None) != _crc_of_header(header):
        raise CheckpointError(f"{file} has a wrong checksum; save the model again")
    return header


def _check_place(path: Path) -> None:
    ours = (path / _HEADER, *path.glob("arrays.*"))
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not any(entry.exists() for entry in ours))):
        raise CheckpointError(f"{path} holds something else than a checkpoint; choose another path")


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def _stamp(file: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**24):
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": file.stat().st_size, "crc32": checksum}


def _check_files(path: Path, files: dict[str, dict[str, int]]) -> None:
    """Checks all files before Orbax reads them: it does not notice every damage, nor name the file."""
    for name, stamp in files.items():
        try:
            found = _stamp(path / name)
        except OSError as error:
            raise CheckpointError(
                f"{path / name} is missing or cannot be read; save the model again ({error})"
            ) from error
        if found != stamp:
            raise CheckpointError(
                f"{path / name} is damaged: expected {stamp['bytes']} bytes with checksum {stamp['crc32']}, found "
                f"{found['bytes']} with {found['crc32']}; save the model again"
            )


def _crc_of_header(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in header.items() if k != "crc32"}, sort_keys=True).encode())
