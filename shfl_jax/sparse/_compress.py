"""From masks to compressed parameters and back."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import pallas_kernels
from pallas_kernels import Matrix, MatrixLayout, Prepared, RowGrouped, Topology
from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.patterns import Mask
from shfl_jax.sparse._masks import Masks

SLOWEST = 0.97  # relative to dense speed; a layer that would be slower stays dense


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["topology"], meta_fields=["spec", "dense_because", "tokens"]
)
@dataclasses.dataclass(frozen=True)
class CompressedLayer:
    """What compression knows of one layer; the leaf of the 'topology' tree at the path of its kernel.

    Attributes:
        topology: the integers of its row-grouped matrix, with leading axes for a stacked layer: a `Topology`, or once
            prepared the layout of a backend; None if left dense.
        spec: its `LayerSpec`.
        dense_because: why the layer was left dense (masked), or "" if it is compressed.
        tokens: the token counts that `compress` was told to expect.
    """

    topology: Topology | MatrixLayout | None
    spec: LayerSpec
    dense_because: str = ""
    tokens: tuple[int, ...] = ()


def compress(
    params: Any,
    masks: Masks,
    *,
    tokens: int | Sequence[int] | Mapping[str, int | Sequence[int]] = (),
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Stores every pruned kernel as a row-grouped matrix. On the host, because sizes depend on the masks.

    Some layers stay dense, with their pruned weights set to zero: those whose mask keeps everything or nothing,
    those of element-wise patterns (group_size 1), which have no kernel, and those that would run slower (see `tokens`).

    Args:
        params: the parameter tree: nested dicts of Linen or an `nnx.State`.
        masks: the masks to apply.
        tokens: the token counts N the model will run with. A layer predicted to run below `SLOWEST` of dense at one of
            them stays dense, where the default device has a table of measurements (`pallas_kernels.predict`). A mapping
            holds those of each layer by its path: a convolution has as many as all of its output images have pixels
            (`pallas_kernels.predict_convolution`, which knows convolutions with channels first).
        dtype: what the layers compute in, for that prediction; None: the dtype of their kernels. For a dtype that was
            never measured bfloat16's speed-up is assumed. Storage keeps its own dtype.

    Returns:
        {'params': the tree with values (*batch, P, V) in place of compressed kernels (*batch are the spec's batch axes;
        slices are padded to the longest; everything else is the same object), 'topology': nested dicts with a
        `CompressedLayer` at the path of every masked kernel}.

    Raises:
        ValueError: the tree lacks a layer; a kernel or mask has a wrong shape or dtype; a kernel holds NaN or inf; one
            array is stored at two paths (tied weights); `tokens` name a layer without a mask. The text names the layer
            and the fix. Nothing is changed.
    """
    unknown = sorted(set(tokens) - {spec.path for spec in masks.specs}) if isinstance(tokens, Mapping) else []
    if unknown:
        known = [spec.path for spec in masks.specs]
        raise ValueError(f"tokens name {unknown}, for which there are no masks; there are masks for {known}")
    counts = {spec.path: tokens.get(spec.path, ()) if isinstance(tokens, Mapping) else tokens for spec in masks.specs}
    counts = {path: tuple(int(n) for n in np.atleast_1d(np.asarray(of, int))) for path, of in counts.items()}
    if any(n < 1 for of in counts.values() for n in of):
        raise ValueError(f"tokens are counts of at least 1, got {tokens}")
    kernels = path_leaves(params)
    _check_untied(kernels, masks)
    values: dict[str, Any] = {}
    topology: dict[str, CompressedLayer] = {}
    for spec in masks.specs:
        expected = counts[spec.path]
        if spec.path not in kernels:
            raise ValueError(f"the parameters have no {spec.path!r}; pass the tree that the specs were resolved from")
        mask = masks[spec.path]
        weight = _checked_weight(kernels[spec.path], mask, spec)
        reason, matrix = _why_dense(mask, spec), None
        if not reason:
            matrix = compress_kernel(weight, mask)
            reason = _why_slower(matrix, spec, expected, jnp.dtype(dtype or matrix.dtype).name)
        if reason or matrix is None:
            values[spec.path] = spec.from_matrix(jnp.where(mask.elements(), weight, 0))
            topology[spec.path] = CompressedLayer(None, spec, reason, expected)
        else:
            values[spec.path] = matrix.values
            topology[spec.path] = CompressedLayer(matrix.topology, spec, "", expected)
    return {"params": update_paths(params, values), "topology": nest(topology)}


def _why_slower(matrix: RowGrouped, spec: LayerSpec, tokens: tuple[int, ...], dtype: str) -> str:
    """Why a layer is left dense for the declared token counts and the default device; "" to compress it."""
    topology = matrix.topology
    problem: dict[str, Any] = {
        "slots": topology.num_slots,
        "group_size": topology.group_size,
        "device": jax.devices()[0].device_kind,
    }
    if spec.convolution:
        taps = math.prod(spec.shape[axis] for axis in spec.in_axes[:-1])
        predict = functools.partial(pallas_kernels.predict_convolution, taps=taps, **problem)
    else:
        predict = functools.partial(pallas_kernels.predict, equal=topology.equal_counts, **problem)
    for n in tokens:
        prediction = predict(*matrix.shape, n, dtype=dtype)
        if prediction is None:  # bfloat16's ratio is a better guess than none
            prediction = predict(*matrix.shape, n, dtype="bfloat16")
        if prediction is not None and prediction.speedup < SLOWEST:
            return f"predicted at {prediction.speedup:.2f} of dense speed for {n} tokens"
    return ""


def decompress(sparse: Mapping[str, Any]) -> Any:
    """Undoes `compress`: the masked dense parameters, bit for bit.

    Args:
        sparse: what `compress` or `prepare` returned; other collections are ignored.

    Returns:
        The parameter tree, with exact zeros where weights were pruned.
    """
    dense = {}
    for path, matrix in matrices(sparse).items():
        spec = layers(sparse)[path].spec
        expand = pallas_kernels.to_dense
        for _ in spec.batch_axes:
            expand = jax.vmap(expand)
        dense[path] = spec.from_matrix(expand(matrix))
    return update_paths(sparse["params"], dense)


def prepare(sparse: Mapping[str, Any], implementation: str | None = None) -> dict[str, Any]:
    """Rearranges every layer the way a backend reads it fastest. On the host, once, outside jit.

    Args:
        sparse: what `compress` or `load` returned; other collections pass through.
        implementation: as in `pallas_kernels.matmul`.

    Returns:
        The same structure, mathematically the same matrices. It cannot be saved: checkpoints hold the canonical form.

    Raises:
        ValueError: this is no compressed model, or one that is prepared already.
        NotImplementedError: the implementation asked for by name has no kernels for a layer; the text names it.
    """
    prepared = {}
    for path, matrix in matrices(sparse).items():
        if isinstance(matrix, Prepared):
            raise ValueError(f"{path}: the model is prepared already; prepare what `compress` or `load` returned")
        try:
            prepared[path] = pallas_kernels.prepare(matrix, implementation)
        except NotImplementedError as error:
            raise NotImplementedError(f"{path}: {error}") from error
    found = layers(sparse) | {
        path: dataclasses.replace(layers(sparse)[path], topology=matrix.layout) for path, matrix in prepared.items()
    }
    values = {path: matrix.values for path, matrix in prepared.items()}
    return {**sparse, "params": update_paths(sparse["params"], values), "topology": nest(found)}


def layers(sparse: Mapping[str, Any]) -> dict[str, CompressedLayer]:
    """The masked layers of a compressed model: path -> `CompressedLayer`.

    Raises:
        ValueError: this is no compressed model.
    """
    if "params" not in sparse or "topology" not in sparse:
        raise ValueError(f"expected the {{'params', 'topology'}} of `compress` or `load`, got keys {sorted(sparse)}")
    return path_leaves(sparse["topology"], is_leaf=lambda node: isinstance(node, CompressedLayer))


def matrices(sparse: Mapping[str, Any]) -> dict[str, Matrix]:
    """The compressed kernels: path -> `RowGrouped`, or `Prepared`, with leading axes for stacked layers.

    Raises:
        ValueError: this is no compressed model, or its two halves do not belong together.
    """
    params: dict[str, Any] = path_leaves(sparse["params"]) if "params" in sparse else {}
    found: dict[str, Matrix] = {}
    for path, layer in layers(sparse).items():
        if path not in params:
            raise ValueError(f"'topology' has {path!r}, 'params' has not; pass both as `compress` returned them")
        if layer.topology is not None:
            found[path] = pallas_kernels.join(params[path], layer.topology)
    return found


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Builds nested dicts from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _check_untied(kernels: Mapping[str, Any], masks: Masks) -> None:
    owner: dict[int, str] = {}
    for path, leaf in kernels.items():
        first = owner.setdefault(id(leaf), path)
        if first != path and {first, path} & set(masks):
            raise ValueError(
                f"tied weights: {first!r} and {path!r} hold the same array of shape {np.shape(leaf)}; pruning one "
                "would change the other. Map both to None in the plan, or give each its own copy"
            )


def _checked_weight(kernel: Any, mask: Mask, spec: LayerSpec) -> Any:
    """The kernel as matrices (*batch, M, K), after checking it and its mask."""
    kernel = np.asarray(kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"{spec.path}: a kernel of shape {kernel.shape} must be floating, got {kernel.dtype}")
    weight = spec.to_matrix(kernel)
    if mask.shape != spec.matrix_shape or mask.kept.shape[:-2] != spec.batch_shape:
        raise ValueError(
            f"{spec.path}: expected a mask of (M, K) = {spec.matrix_shape} with leading axes {spec.batch_shape}, got "
            f"{mask.shape} with {mask.kept.shape[:-2]}; compute it from the scores in the spec's `to_matrix` form"
        )
    bad = int((~np.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"{spec.path}: {bad} of the kernel's {weight.size} weights (shape {kernel.shape}) are NaN or infinite; "
            "compress parameters from before the training diverged"
        )
    return weight


def compress_kernel(weight: Any, mask: Mask) -> RowGrouped:
    """The compressed form of a kernel; packed where the mask keeps two of every four."""
    if mask.order is None or mask.choice is None:
        return pallas_kernels.from_dense(weight, mask.rows, mask.kept)
    rows, order = np.asarray(mask.rows), np.asarray(mask.order)
    live = (rows < mask.m).reshape(*order.shape[:-1], mask.group_size).sum(-1)
    stored = (order < mask.shape[1]).reshape(*order.shape[:-1], -1, 4).sum(-1)
    if np.asarray(mask.choice).sum() > (live * np.minimum(stored, 2).sum(-1)).sum():  # partway through a schedule
        return pallas_kernels.from_dense(np.where(mask.choice, weight, 0), rows, mask.kept)
    return pallas_kernels.from_dense_two_four(weight, rows, order, mask.choice)


def _why_dense(mask: Mask, spec: LayerSpec) -> str:
    if mask.group_size == 1:
        return f"{spec.pattern.name} is element-wise: no kernel"
    if not np.asarray(mask.kept).any():
        return "everything is pruned"
    if mask.choice is not None:
        return "nothing is pruned" if np.asarray(mask.choice).all() else ""
    kept = np.asarray(mask.kept).all(-1) | (np.asarray(mask.rows) >= mask.m).reshape(*mask.kept.shape[:-1], -1).all(-1)
    return "nothing is pruned" if kept.all() else ""
