"""What the layers of a model read: their inputs' Gram matrices, gathered layer by layer in execution order.

The model is traced once and cut before every product with a kernel of interest. A pass takes all batches up to the next
cut, where the layers there are updated, and goes on from the stored activations with the new kernels: one forward pass
in total, whatever the depth, and every layer sees the outputs of the layers already pruned. The device holds one batch
and one Gram matrix; the host holds, for each batch, only the activations that are still to be read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shfl_jax._layers import LayerSpec
from shfl_jax.models import Piece, cut


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of layers that read the same activations X (K, tokens), such as an attention's query, key and value.

    Attributes:
        paths: the layers' kernels.
        gram: (K, K) float32, X X^T summed over all tokens of all batches.
        tokens: how many tokens that were.
    """

    paths: tuple[str, ...]
    gram: jax.Array
    tokens: int

    @property
    def norms(self) -> jax.Array:
        """The L2 norm of every input feature over all tokens: (K,) float32."""
        return jnp.sqrt(jnp.maximum(jnp.diagonal(self.gram), 0))


def calibrate(
    fun: Callable[..., Any],
    params: Mapping[str, jax.Array],
    batches: Iterable[Any],
    specs: Mapping[str, LayerSpec],
    visit: Callable[[Inputs], Mapping[str, jax.Array]],
    constants: Any = (),
) -> dict[str, jax.Array]:
    """Runs a model over calibration batches and hands every layer's inputs to a function that may change its kernel.

    Every token counts alike, padding included: pass batches without padding. The compiled parts of a hashable `fun` are
    kept for the next call.

    Args:
        fun: the model as a pure function `fun(params, constants, *batch)`, params as path -> array. Any model
            whose layers read their kernels by `dot_general`; it may be jitted inside, or use `jax.checkpoint`.
        params: path -> parameter.
        batches: calibration batches, each a tuple of positional arguments or one array. They are read once.
        specs: path -> spec of the layers of interest.
        visit: called once for every group of layers that read the same activations, in execution order; returns new
            kernels by path, which the layers after it see.
        constants: whatever else `fun` needs, such as batch statistics.

    Returns:
        path -> parameter, with the new kernels.

    Raises:
        ValueError: no batch; a layer that never ran; NaN or inf in a layer's inputs. The text names the layer and the
            fix.
        NotImplementedError: a layer inside a loop (`nn.scan`, `nn.vmap`), or one that runs several times.
    """
    states: list[_Batch] = []
    for batch in batches:
        leaves, treedef = jax.tree.flatten(batch if isinstance(batch, tuple) else (batch,))
        states.append(_Batch([np.asarray(leaf) for leaf in leaves], treedef))
    if not states:
        raise ValueError("calibration needs at least one batch; `batches` yielded none")
    missing = [path for path in specs if path not in params]
    if missing:
        raise ValueError(f"the parameters have no {missing}; pass the tree that the specs were resolved from")
    params = dict(params)
    held, held_tree = jax.tree.flatten(constants)
    shapes = tuple((path, _shape(leaf)) for path, leaf in params.items())
    layers = tuple(dataclasses.replace(spec, pattern=None) for spec in specs.values())  # patterns do not matter here
    cutter = cut if _is_hashable(fun) else cut.__wrapped__
    for state in states:
        live_shapes = tuple(map(_shape, state.live))
        held_shapes = tuple(map(_shape, held))
        state.pieces = cutter(fun, shapes, held_tree, held_shapes, state.treedef, live_shapes, layers)
    for i, piece in enumerate(states[0].pieces):
        gram, tokens = jnp.zeros((piece.k, piece.k), jnp.float32), 0
        for number, state in enumerate(states):
            part = state.pieces[i]
            if part.paths != piece.paths:
                raise ValueError(f"batch {number} runs the layers in another order: {part.paths} for {piece.paths}")
            x, live = part.run([*params.values(), *held], state.live)
            gram, finite = _accumulate(gram, x, part.dims)
            if not finite:
                raise ValueError(
                    f"{' and '.join(part.paths)}: the inputs hold NaN or inf in calibration batch {number}; look at "
                    "that batch, or at the layers before this one"
                )
            tokens += x.size // piece.k
            state.live = jax.device_get(live)
        params |= visit(Inputs(piece.paths, gram, tokens))
    return params


@dataclasses.dataclass
class _Batch:
    """The progress of one batch: the activations that are still to be read, on the host."""

    live: list[np.ndarray]
    treedef: Any
    pieces: tuple[Piece, ...] = ()


@functools.partial(jax.jit, static_argnums=2)
def _accumulate(gram: jax.Array, x: jax.Array, dims: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    x = jnp.moveaxis(x, dims, range(-len(dims), 0)).reshape(-1, gram.shape[0]).astype(jnp.float32)
    gram += jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    return gram, jnp.isfinite(x).all()


def _is_hashable(value: Any) -> bool:
    try:  # a frozen dataclass is an instance of Hashable whatever its fields hold
        hash(value)
    except TypeError:
        return False
    return True


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))
