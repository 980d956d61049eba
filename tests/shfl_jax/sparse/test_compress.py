import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels
import shfl_jax
from shfl_jax import NM, VW, LayerSpec, Mask, Masks, Unstructured


def layer(m=7, k=5, v=4, batch=(), seed=0, kept=None, dtype=np.float32, pattern=None):
    """Parameters with one shuffled layer (kernel (*batch, K, M)) and its masks."""
    rng = np.random.default_rng(seed)
    groups = -(-m // v)
    rows = np.full((*batch, groups * v), m, np.int32)
    rows[..., :m] = rng.permuted(np.broadcast_to(np.arange(m), (*batch, m)), axis=-1)
    kept = rng.random((*batch, groups, k)) < rng.random((*batch, groups, 1)) if kept is None else kept
    n, v = len(batch), rows.shape[-1] // groups
    spec = LayerSpec("mlp/kernel", (*batch, k, m), tuple(range(n)), (n,), (n + 1,), pattern or VW(0.5, group_size=v))
    kernel = rng.normal(size=(*batch, k, m)).astype(dtype)
    params = {"mlp": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(m)}}
    return params, Masks({"mlp/kernel": Mask(jnp.asarray(rows), jnp.asarray(kept), m)}, (spec,))


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("m", "k", "v", "batch"),
    [(7, 5, 4, ()), (1, 1, 2, ()), (3, 9, 16, ()), (9, 1, 2, (2,)), (8, 6, 4, (3,)), (5, 7, 2, (2, 2))],
)
def test_decompress_undoes_compress_bit_for_bit(m, k, v, batch):
    params, masks = layer(m, k, v, batch)
    kernel = np.array(params["mlp"]["kernel"])
    kernel.flat[0] = -0.0
    params["mlp"]["kernel"] = kernel
    sparse = shfl_jax.compress(params, masks)
    expected = np.where(masks.specs[0].from_matrix(np.asarray(masks["mlp/kernel"].elements())), kernel, np.float32(0))
    decompress = jax.jit(shfl_jax.decompress)
    same_bits(decompress(sparse)["mlp"]["kernel"], expected)
    same_bits(decompress(shfl_jax.prepare(sparse))["mlp"]["kernel"], expected)
    same_bits(jax.jit(masks.apply)(params)["mlp"]["kernel"], expected)
    assert sparse["params"]["mlp"]["bias"] is params["mlp"]["bias"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_keep_the_dtype(dtype):
    params, masks = layer(dtype=dtype)
    sparse = shfl_jax.compress(params, masks)
    assert sparse["params"]["mlp"]["kernel"].dtype == dtype
    same_bits(shfl_jax.decompress(sparse)["mlp"]["kernel"], masks.apply(params)["mlp"]["kernel"])


@pytest.mark.parametrize(
    "kept",
    [
        np.array([[True, False, True, False, False], [False] * 5]),  # an empty group
        np.arange(10).reshape(2, 5) == 7,  # everything but one column of one group
        np.arange(5) < np.array([[5], [3]]),  # a full group
    ],
)
def test_extreme_masks_multiply_as_the_masked_weight_does(kept):
    params, masks = layer(kept=kept)
    sparse = shfl_jax.compress(params, masks)
    entry = sparse["topology"]["mlp"]["kernel"]
    assert entry.dense_because == ""
    matrix = pallas_kernels.RowGrouped(sparse["params"]["mlp"]["kernel"], entry.topology)
    x = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    expected = np.float64(x) @ np.float64(masks.apply(params)["mlp"]["kernel"])
    np.testing.assert_allclose(pallas_kernels.matmul(matrix, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "v", "kept", "why"),
    [
        (VW(0.0, group_size=4), 4, np.ones((2, 5), bool), "nothing is pruned"),
        (VW(0.5, group_size=4), 4, np.zeros((2, 5), bool), "everything is pruned"),
        (Unstructured(0.5), 1, None, "unstructured is element-wise"),
        (NM(2, 4), 1, None, "nm is element-wise"),
    ],
)
def test_layers_without_a_gain_stay_dense_and_masked(pattern, v, kept, why):
    params, masks = layer(v=v, kept=kept, pattern=pattern)
    sparse = shfl_jax.compress(params, masks, tokens=(16, 256))
    entry = sparse["topology"]["mlp"]["kernel"]
    assert entry.topology is None
    assert why in entry.dense_because
    assert entry.tokens == (16, 256)
    same_bits(sparse["params"]["mlp"]["kernel"], masks.apply(params)["mlp"]["kernel"])
    same_bits(shfl_jax.decompress(sparse)["mlp"]["kernel"], masks.apply(params)["mlp"]["kernel"])


def test_masks_are_a_pytree_and_a_mapping():
    params, masks = layer()
    again = jax.jit(lambda masks: masks)(masks)
    assert list(again) == ["mlp/kernel"]
    assert again.specs == masks.specs
    assert again.spec("mlp/kernel").matrix_shape == (7, 5)
    poisoned = {"mlp": {**params["mlp"], "kernel": jnp.full((5, 7), jnp.nan)}}
    assert (masks.apply(poisoned)["mlp"]["kernel"] == 0).sum() == (~masks["mlp/kernel"].elements()).sum()


def test_bad_input_names_the_layer_the_shape_and_the_fix_and_changes_nothing():
    params, masks = layer()
    kernel = params["mlp"]["kernel"]

    def fails(text, params=params, masks=masks, **kwargs):
        before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, masks))]
        with pytest.raises(ValueError, match=text):
            shfl_jax.compress(params, masks, **kwargs)
        assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, masks))] == before

    def with_kernel(kernel):
        return {"mlp": {**params["mlp"], "kernel": kernel}}

    fails("no 'mlp/kernel'; pass the tree", params={"other": kernel})
    fails(r"mlp/kernel: expected .*\(5, 7\), got \(7, 5\)", params=with_kernel(kernel.T))
    fails(
        r"mlp/kernel: a kernel of shape \(5, 7\) must be floating, got int32", with_kernel(jnp.ones((5, 7), jnp.int32))
    )
    fails(r"mlp/kernel: 1 of .* 35 weights \(shape \(5, 7\)\) are NaN", with_kernel(kernel.at[0, 0].set(jnp.nan)))
    fails("mlp/kernel: 2 of .* infinite; compress", with_kernel(kernel.at[:2, 0].set(jnp.inf)))
    fails(r"tied weights: 'head' and 'mlp/kernel' hold the same array of shape \(5, 7\)", {**params, "head": kernel})
    fails("tokens are counts of at least 1", tokens=(16, 0))
    other = Masks(layer(m=8)[1].masks, masks.specs)
    fails(r"mlp/kernel: expected a mask of \(M, K\) = \(7, 5\).*got \(8, 5\)", masks=other)
    stacked = Masks(layer(batch=(2,))[1].masks, masks.specs)
    fails(r"leading axes \(\), got \(7, 5\) with \(2,\)", masks=stacked)
    with pytest.raises(ValueError, match=r"\{'params', 'topology'\}.*\['mlp'\]"):
        shfl_jax.decompress(params)
    sparse = shfl_jax.compress(params, masks)
    with pytest.raises(ValueError, match="'topology' has 'mlp/kernel', 'params' has not"):
        shfl_jax.decompress({**sparse, "params": {}})


def test_the_dtype_that_layers_compute_in_decides_what_stays_dense(monkeypatch):
    speedups = {"bfloat16": 0.5, "float16": 2.0}
    asked = []

    def predict(*shape, dtype, **_):
        asked.append((shape, dtype))
        return pallas_kernels.Prediction(1.0, speedups[dtype]) if dtype in speedups else None

    monkeypatch.setattr(pallas_kernels, "predict", predict)
    params, masks = layer()
    sparse = shfl_jax.compress(params, masks, tokens=16, dtype=jnp.float16)
    assert sparse["topology"]["mlp"]["kernel"].topology is not None
    for dtype in (jnp.bfloat16, None):  # float32, the kernel's own, was never measured
        left = shfl_jax.compress(params, masks, tokens=16, dtype=dtype)
        assert "predicted at 0.50 of dense speed for 16 tokens" in left["topology"]["mlp"]["kernel"].dense_because
        assert left["params"]["mlp"]["kernel"].dtype == params["mlp"]["kernel"].dtype
    assert asked == [((7, 5, 16), dtype) for dtype in ("float16", "bfloat16", "float32", "bfloat16")]


def test_convolutions_are_looked_up_by_their_own_counts(monkeypatch):
    asked = []

    def predict(*shape, taps, **_):
        asked.append((*shape, taps))
        return pallas_kernels.Prediction(1.0, 0.5 if shape[-1] > 100 else 2.0)

    monkeypatch.setattr(pallas_kernels, "predict_convolution", predict)
    rng = np.random.default_rng(0)
    shape, axes = (3, 3, 4, 8), ((), (0, 1, 2), (3,))
    specs = tuple(LayerSpec(f"{name}/kernel", shape, *axes, VW(0.5, group_size=4), name < "c") for name in "abd")
    mask = Mask(jnp.arange(8, dtype=jnp.int32), jnp.asarray(rng.random((2, 36)) < 0.5), 8)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name in "abd"}
    masks = Masks({spec.path: mask for spec in specs}, specs)
    # A product of three axes, the last of them, is no convolution.
    sparse = shfl_jax.compress(params, masks, tokens={"a/kernel": 64, "b/kernel": (50, 200), "d/kernel": 200})
    assert asked == [(8, 36, 64, 9), (8, 36, 50, 9), (8, 36, 200, 9)]
    assert sparse["topology"]["a"]["kernel"].dense_because == ""
    assert "0.50 of dense speed for 200 tokens" in sparse["topology"]["b"]["kernel"].dense_because
    assert sparse["topology"]["b"]["kernel"].tokens == (50, 200)
    with pytest.raises(ValueError, match=r"tokens name \['c/kernel'\]"):
        shfl_jax.compress(params, masks, tokens={"c/kernel": 64})
    asked.clear()
    assert shfl_jax.compress(params, masks, tokens={})["topology"]["b"]["kernel"].dense_because == ""
    assert not asked
