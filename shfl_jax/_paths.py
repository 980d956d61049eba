"""How parameters are named: the keys from the root to a leaf, joined by '/'."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def key_path(keys: tuple[Any, ...]) -> str:
    """Spells one JAX key path, e.g. 'block_0/attn/query/kernel'.

    Boxes around an array (an NNX Variable, a Linen `Partitioned`) add a last attribute `value`, which is dropped.
    """
    if keys and isinstance(keys[-1], GetAttrKey) and keys[-1].name in ("value", "raw_value"):
        keys = keys[:-1]
    return "/".join(_spell(key) for key in keys)


def path_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Lists the leaves of a tree by path, in the tree's own order.

    Args:
        tree: any pytree: Linen params, an `nnx.State`, optimizer state.
        is_leaf: as in `jax.tree.flatten`.

    Returns:
        path -> leaf.

    Raises:
        ValueError: two leaves have the same path (a key holds a '/'); the text names it.
    """
    leaves = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        path = key_path(keys)
        if path in leaves:
            raise ValueError(f"two leaves are called {path!r}; rename a key so that every path is unique")
        leaves[path] = leaf
    return leaves


def update_paths(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Replaces leaves by path.

    Args:
        tree: any pytree.
        leaves: path -> new leaf. A new leaf may be a whole pytree.

    Returns:
        A new tree; leaves that are not named are the same objects.

    Raises:
        ValueError: a path that the tree does not have.
    """
    unknown = set(leaves) - set(path_leaves(tree))
    if unknown:
        raise ValueError(f"the tree has no leaf {sorted(unknown)}; it has {sorted(path_leaves(tree))}")

    def replaced(keys: Any, leaf: Any) -> Any:
        return leaves.get(key_path(keys), leaf)

    return jax.tree_util.tree_map_with_path(replaced, tree)


def _spell(key: Any) -> str:
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return key.name if isinstance(key, GetAttrKey) else str(key)
