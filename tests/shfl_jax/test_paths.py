import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from shfl_jax import path_leaves, update_paths


def test_paths_join_keys_and_drop_the_boxes():
    boxed = nn.Partitioned(jnp.ones(2), names=("a",))
    tree = {"block": {"value": {"kernel": boxed}, "layers": [jnp.zeros(1), jnp.ones(3)]}}
    assert {path: leaf.shape for path, leaf in path_leaves(tree).items()} == {
        "block/value/kernel": (2,),
        "block/layers/0": (1,),
        "block/layers/1": (3,),
    }


def test_nnx_states_and_linen_params_are_spelled_alike():
    state = nnx.state(nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False), nnx.Param)
    assert "value/kernel" in path_leaves(state)
    assert "value/bias" in path_leaves(state)
    updated = update_paths(state, {"value/bias": jnp.full((2, 2), 7.0)})
    assert (path_leaves(updated)["value/bias"] == 7).all()
    assert isinstance(updated, nnx.State)


def test_update_keeps_every_other_leaf_the_same_object():
    tree = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    updated = update_paths(tree, {"b/c": jnp.zeros(3)})
    assert updated["a"] is tree["a"]
    assert (updated["b"]["c"] == 0).all()
    assert (tree["b"]["c"] == 1).all()


def test_unknown_and_ambiguous_paths_are_errors():
    with pytest.raises(ValueError, match=r"no leaf \['b'\].*\['a'\]"):
        update_paths({"a": 1}, {"b": 2})
    with pytest.raises(ValueError, match=r"'a/b'.*rename"):
        path_leaves({"a": {"b": 1}, "a/b": 2})
