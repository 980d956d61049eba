"""One-shot pruning: a trained model and a few calibration batches in, masks and repaired weights out.

Layers are pruned in the order in which the model runs them, and every layer is calibrated on the outputs of the layers
already pruned, so that a repair sees the inputs the layer will get. The target is what its dense weights make of them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shfl_jax import models
from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.models import Plan
from shfl_jax.oneshot._calibration import Inputs, calibrate
from shfl_jax.oneshot._repair import inverse_diagonal, output_error
from shfl_jax.oneshot._repair import repair as repaired
from shfl_jax.patterns import Mask, allocate, magnitude, obs, taylor, wanda
from shfl_jax.patterns import mask as choose
from shfl_jax.sparse import Masks

SCORES = ("magnitude", "wanda", "obs", "taylor")
"""What `prune_one_shot` may rank weights by: the functions of these names in `shfl_jax.patterns`."""


@dataclasses.dataclass(frozen=True)
class PrunedLayer:
    """What one-shot pruning did to one layer.

    Attributes:
        path: the kernel's path.
        pattern: the pattern's name.
        shape: (M, K).
        sparsity: fraction of pruned weights.
        retained: kept saliency over total saliency.
        masked_error: relative squared error of the layer's outputs with the mask alone, ||(W - W') X||^2 / ||W X||^2.
        error: the same after repair; equal without one.
        tokens: tokens it was calibrated on.
    """

    path: str
    pattern: str
    shape: tuple[int, int]
    sparsity: float
    retained: float
    masked_error: float
    error: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class OneShot:
    """A pruned model.

    Attributes:
        params: the parameter tree with pruned and repaired kernels, all other leaves the same objects.
        masks: what is kept; `shfl_jax.compress(params, masks)` compresses.
        layers: one entry for every pruned layer, in the order of execution. Printing the object shows them as a table.
    """

    params: Any
    masks: Masks
    layers: tuple[PrunedLayer, ...]

    def __rich__(self) -> Table:
        """The table of all layers: retained saliency, and the output error with the mask alone and after repair."""
        table = Table(title="One-shot pruning", box=SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        table.add_column("pattern", no_wrap=True)
        for name in ("sparsity", "retained", "error", "repaired"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            numbers = (layer.sparsity, layer.retained, layer.masked_error, layer.error)
            table.add_row(layer.path, layer.pattern, *(f"{number:.1%}" for number in numbers))
        return table


def prune_one_shot(
    model: nn.Module | nnx.Module,
    params: Any,
    plan: Plan,
    batches: Iterable[Any],
    *,
    score: str = "wanda",
    repair: bool = True,
    damping: float = 0.01,
    loss: Callable[..., jax.Array] | None = None,
    allocation: str | Mapping[str, float] = "uniform",
    counts: Mapping[str, Any] | None = None,
    collections: Mapping[str, Any] | None = None,
    progress: bool = False,
    **apply_kwargs: Any,
) -> OneShot:
    """Prunes a trained model without training it again.

    Args:
        model: a Linen or NNX module. It is left as it is.
        params: its parameter tree (Linen: the content of 'params'); None for an NNX model's own.
        plan: what is pruned to which pattern.
        batches: calibration batches, each a tuple of the model's positional arguments or one array. Every token counts
            alike, so leave padding out. A repair needs at least K tokens for a layer with K inputs, and is better with
            several times as many.
        score: what weights are ranked by: "magnitude"; "wanda", magnitude times the input's norm; "obs", the error that
            is left after a repair; "taylor", (gradient times weight)^2.
        repair: whether kept weights are recomputed so that the layer's outputs on the calibration inputs change least.
        damping: of the repair and of "obs", as a fraction of the mean of the Gram matrix's diagonal. Positive.
        loss: for "taylor": `loss(params, *batch)`, a scalar.
        allocation: how sparsity is spread over layers, a `method` of `shfl_jax.allocate`. "global" compares scores that
            are taken on the dense model, and runs the calibration batches once more for them.
        counts: path -> kept units; the allocation decides for a layer not named.
        collections: a Linen model's other collections, such as 'batch_stats'.
        progress: whether to show a progress bar.
        **apply_kwargs: further arguments of `model.apply` (Linen) or of the call (NNX); hashable ones.

    Returns:
        The pruned model. Nothing passed in is changed.

    Raises:
        ValueError: no batch, an unknown score, "taylor" without a loss, a layer that never ran, weights or inputs with
            NaN or inf, or too few tokens for a repair; the text names the layer and the fix.
        NotImplementedError: a layer inside a loop (`nn.scan`, `nn.vmap`) or one that runs several times; it is named.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}; use one of {', '.join(map(repr, SCORES))}")
    if score == "taylor" and loss is None:
        raise ValueError("score='taylor' needs a loss: pass loss=lambda params, *batch: ...")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}: the inputs of a layer may depend on each other")
    given = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not given:
        raise ValueError("one-shot pruning needs at least one calibration batch; `batches` yielded none")
    if isinstance(model, nnx.Module):
        specs = models.nnx.resolve(plan, model, *given[0], **apply_kwargs)
        graph, own, constants = nnx.split(model, nnx.Param, ...)
        params = own if params is None else params
        forward: Any = _Nnx(graph, jax.tree.structure(params), tuple(sorted(apply_kwargs.items())))
    else:
        specs = models.linen.resolve(plan, model, *given[0], **apply_kwargs)
        constants = dict(collections or {})
        forward = _Linen(model, jax.tree.structure(params), tuple(sorted(apply_kwargs.items())))
    kernels = path_leaves(params)
    _check_finite(kernels, specs)
    gradient_scores = taylor(loss, params, specs, given) if score == "taylor" and loss is not None else {}

    def score_of(path: str, inputs: Inputs) -> jax.Array:
        _check_tokens(specs[path], inputs, repair or score == "obs")
        weight = specs[path].to_matrix(jnp.asarray(kernels[path]))
        return gradient_scores[path] if score == "taylor" else _saliency(score, weight, inputs, damping)

    compared: dict[str, Any] = {
        path: jax.ShapeDtypeStruct((*spec.batch_shape, *spec.matrix_shape), jnp.float32) for path, spec in specs.items()
    }
    if allocation == "global":

        def compare(inputs: Inputs) -> dict[str, jax.Array]:
            compared.update({path: score_of(path, inputs) for path in inputs.paths})
            return {}

        calibrate(forward, kernels, given, specs, compare, constants)
    counts = allocate(compared, specs, method=allocation) | dict(counts or {})
    masks: dict[str, Mask] = {}
    layers: list[PrunedLayer] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar:
        task = bar.add_task("pruning", total=len(specs))

        def visit(inputs: Inputs) -> dict[str, jax.Array]:
            new = {}
            for path in inputs.paths:
                bar.update(task, description=path)
                spec = specs[path]
                weight = spec.to_matrix(jnp.asarray(kernels[path]))
                saliency = score_of(path, inputs)
                masks[path] = choose(saliency, spec.pattern, counts[path])
                masked = jnp.where(masks[path].elements(), weight, 0)
                final = repaired(weight, masks[path], inputs.gram, damping=damping) if repair else masked
                layers.append(_describe(spec, masks[path], saliency, weight, masked, final, inputs))
                new[path] = spec.from_matrix(final)
                bar.advance(task)
            return new

        after = calibrate(forward, kernels, given, specs, visit, constants)
    found = Masks({path: masks[path] for path in specs}, tuple(specs.values()))
    return OneShot(update_paths(params, {path: after[path] for path in specs}), found, tuple(layers))


@dataclasses.dataclass(frozen=True)
class _Linen:
    """A Linen model as the pure function that `calibrate` runs; equal for equal models."""

    model: nn.Module
    structure: Any
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, params: dict[str, jax.Array], constants: Mapping[str, Any], *batch: Any) -> Any:
        tree = jax.tree.unflatten(self.structure, list(params.values()))
        return self.model.apply({**constants, "params": tree}, *batch, **dict(self.kwargs))


@dataclasses.dataclass(frozen=True)
class _Nnx:
    """An NNX model as the pure function that `calibrate` runs."""

    graph: Any
    structure: Any
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, params: dict[str, jax.Array], constants: Any, *batch: Any) -> Any:
        tree = jax.tree.unflatten(self.structure, list(params.values()))
        return nnx.merge(self.graph, tree, constants)(*batch, **dict(self.kwargs))


def _saliency(score: str, weight: jax.Array, inputs: Inputs, damping: float) -> jax.Array:
    if score == "wanda":
        return wanda(weight, inputs.norms)
    if score == "obs":
        return obs(weight, inverse_diagonal(inputs.gram, damping=damping))
    return magnitude(weight)


def _describe(
    spec: LayerSpec,
    mask: Mask,
    saliency: jax.Array,
    weight: jax.Array,
    masked: jax.Array,
    final: jax.Array,
    inputs: Inputs,
) -> PrunedLayer:
    total = float(saliency.sum())
    kept = float(jnp.where(mask.elements(), saliency, 0).sum())
    before = float(output_error(weight, masked, inputs.gram))
    after = before if final is masked else float(output_error(weight, final, inputs.gram))
    return PrunedLayer(
        path=spec.path,
        pattern=spec.pattern.name,
        shape=spec.matrix_shape,
        sparsity=1 - float(mask.density()),
        retained=kept / total if total else 1.0,
        masked_error=before,
        error=after,
        tokens=inputs.tokens,
    )


def _check_finite(kernels: Mapping[str, Any], specs: Mapping[str, LayerSpec]) -> None:
    for path, spec in specs.items():
        if path not in kernels:
            raise ValueError(f"the parameters have no {path!r}; pass the parameters of this model")
        if tuple(np.shape(kernels[path])) != spec.shape:
            raise ValueError(
                f"{path}: the model has a kernel of shape {spec.shape}, the parameters {np.shape(kernels[path])}"
            )
        if not bool(jnp.isfinite(kernels[path]).all()):
            raise ValueError(
                f"{path} {spec.shape}: the kernel holds NaN or inf; prune parameters from before training diverged"
            )


def _check_tokens(spec: LayerSpec, inputs: Inputs, needed: bool) -> None:
    k = spec.matrix_shape[1]
    if needed and inputs.tokens < k:
        raise ValueError(
            f"{spec.path} {spec.shape}: {inputs.tokens} calibration tokens cannot determine {k} inputs; pass at least "
            f"{k} tokens (several times as many are better), or prune without repair (repair=False, score='wanda')"
        )
