import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax import VW, LayerSpec, Mask, Masks, Unstructured


@pytest.fixture
def sparse():
    rows = jnp.arange(12, dtype=jnp.int32)
    last = jnp.where(rows < 10, rows, 10)  # 10 rows: the last group is smaller
    kept = jnp.arange(6) < jnp.array([[1], [2], [4]])
    masks = {
        "ragged/kernel": Mask(last, kept, 10),
        "equal/kernel": Mask(jnp.stack([rows, rows]), jnp.broadcast_to(jnp.arange(6) < 2, (2, 3, 6)), 12),
        "dense/kernel": Mask(rows, jnp.arange(72).reshape(12, 6) % 2 == 0, 12),
    }
    specs = (
        LayerSpec("ragged/kernel", (6, 10), (), (0,), (1,), VW(0.5, group_size=4)),
        LayerSpec("equal/kernel", (2, 6, 12), (0,), (1,), (2,), VW(0.5, group_size=4)),
        LayerSpec("dense/kernel", (6, 12), (), (0,), (1,), Unstructured(0.5)),
    )
    params = {
        path.split("/")[0]: {"kernel": np.ones(spec.shape, np.float32)} for path, spec in zip(masks, specs, strict=True)
    }
    return shfl_jax.compress(params, Masks(masks, specs))


def test_rows_say_what_every_layer_is(sparse):
    rows = {row.path: row for row in shfl_jax.report(sparse).layers}
    ragged, equal, dense = (rows[f"{name}/kernel"] for name in ("ragged", "equal", "dense"))
    assert ragged.path == "ragged/kernel"
    assert (ragged.m, ragged.k, ragged.group_size, ragged.counts, ragged.route) == (10, 6, 4, "ragged", "row-grouped")
    assert ragged.sparsity == pytest.approx(1 - (4 * 1 + 4 * 2 + 2 * 4) / 60)  # two rows in the last group
    assert ragged.dense_nbytes == 60 * 4
    assert ragged.nbytes == (7 * 4 + 7 + 4 + 12) * 4  # values, columns, group_ptr, rows
    assert (equal.batch, equal.counts, equal.sparsity) == (2, "equal", pytest.approx(2 / 3))
    assert (dense.route, dense.group_size, dense.sparsity) == ("dense", None, 0.5)
    assert "element-wise" in dense.why
    assert dense.nbytes == dense.dense_nbytes == 72 * 4
    assert not any(row.timings for row in (ragged, equal, dense))


def test_times_are_measured_for_the_tokens_asked_for(sparse):
    rows = {row.path: row for row in shfl_jax.report(sparse, tokens=(3,)).layers}
    assert [timing.tokens for timing in rows["ragged/kernel"].timings] == [3]
    for timing in rows["equal/kernel"].timings:
        assert timing.time_us > 0
        assert timing.speedup == timing.dense_time_us / timing.time_us
    assert rows["dense/kernel"].timings == ()


def test_the_table_shows_it(sparse):
    text = str(shfl_jax.report(sparse, tokens=8))
    for part in ("ragged/kernel", "vw", "2 x 12 x 6", "66.7%", "element-wise", "N=8: dense / sparse", "µs"):
        assert part in text


def test_bad_input_is_an_error(sparse):
    with pytest.raises(ValueError, match="counts of at least 1"):
        shfl_jax.report(sparse, tokens=0)
    with pytest.raises(ValueError, match=r"\{'params', 'topology'\}"):
        shfl_jax.report({"params": {}})
