"""Fine-tuning compressed kernels: from the optimizer's state of dense parameters to that of compressed ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shfl_jax._paths import update_paths
from shfl_jax.pruning._prune import masks, prune_states
from shfl_jax.sparse import compress_kernel, matrices


@dataclasses.dataclass(frozen=True)
class _Moment:
    """A compressed moment in a tree; not a pytree, so that it is one leaf."""

    values: jax.Array


def compressed_state(inner: optax.GradientTransformation, opt_state: Any, sparse: Mapping[str, Any]) -> optax.OptState:
    """Carries an optimizer's moments over to compressed parameters. On the host, once.

    A compressed kernel's `values` are a leaf like any other, and the kernels have derivatives of their own, so that any
    optimizer trains them with the masks fixed, and no array of the dense weight's size is a parameter, a gradient or a
    moment:

        sparse = shfl_jax.compress(params, shfl_jax.pruning.masks(opt_state))
        opt_state = shfl_jax.pruning.compressed_state(inner, opt_state, sparse)

        def loss(params, batch):
            return task(shfl_jax.linen.apply(model, {**sparse, "params": params}, batch))

        grads = jax.grad(loss)(sparse["params"], batch)  # then inner.update and optax.apply_updates as usual

    Args:
        inner: the optimizer that the pruning method wrapped.
        opt_state: the state with one pruning method in it.
        sparse: {'params', 'topology'} of `shfl_jax.compress`, from the masks in that state and not prepared.

    Returns:
        The state of `inner` for `sparse['params']`. Arrays of a kernel's shape are compressed like the kernel; whatever
        else belongs to a compressed kernel (Adafactor's factored moments) starts afresh; the rest stays as it is.

    Raises:
        ValueError: no pruning method in the state or several, or `sparse` was compressed from other masks.
    """
    states = prune_states(opt_state)
    if len(states) > 1:
        raise ValueError(f"{len(states)} pruning methods in this state; pass the state of one of them")
    state, compressed = states[0], matrices(sparse)
    found = masks(state)

    def carry(moment: Any, path: str | None) -> Any:
        if not path or not hasattr(moment, "shape") or moment.shape != found.spec(path).shape:
            return moment
        matrix = compress_kernel(found.spec(path).to_matrix(moment), found[path])
        if matrix.values.shape != compressed[path].values.shape:
            raise ValueError(
                f"{path}: compressed by the state's mask it has values of shape {matrix.values.shape}, but "
                f"{compressed[path].values.shape} in the compressed parameters; compress with "
                "`shfl_jax.pruning.masks` of this very state"
            )
        return _Moment(matrix.values)

    fresh = inner.init(sparse["params"])
    leaves, tree = jax.tree.flatten(sparse["params"])
    names = update_paths(jax.tree.unflatten(tree, [""] * len(leaves)), {path: path for path in compressed})
    carried = optax.tree_utils.tree_map_params(
        inner.init, carry, state.inner_state, names, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
    )

    def settle(moment: Any, new: Any) -> Any:
        if isinstance(moment, _Moment):
            return jnp.asarray(moment.values, new.dtype)
        return moment if jnp.shape(moment) == jnp.shape(new) else new

    return jax.tree.map(settle, carried, fresh)
