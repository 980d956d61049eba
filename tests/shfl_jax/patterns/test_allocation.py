import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shfl_jax
from shfl_jax import BW, NM, TEW, TVW, TW, VW, ShflBW, ShflTVW, Unstructured
from shfl_jax.patterns import _ranking as ranking


def spec(path, shape, pattern, batch=0):
    axes = tuple(range(len(shape)))
    return shfl_jax.LayerSpec(path, shape, axes[:batch], (axes[batch],), (axes[batch + 1],), pattern)


SPECS = {
    "a": spec("a", (12, 16), shfl_jax.VW(0.5, 4)),
    "b": spec("b", (3, 8, 10), shfl_jax.Unstructured(0.9), batch=1),
}
SCORES = {"a": jnp.ones((16, 12)), "b": jnp.ones((3, 10, 8))}


def test_uniform_meets_every_sparsity_and_follows_a_traced_fraction():
    counts = shfl_jax.allocate(SCORES, SPECS)
    assert {path: int(c) for path, c in counts.items()} == {"a": 24, "b": 8}
    half = jax.jit(lambda s, f: shfl_jax.allocate(s, SPECS, f))(SCORES, 0.5)
    assert {path: int(c) for path, c in half.items()} == {"a": 36, "b": 44}
    masks = {path: shfl_jax.mask(s, SPECS[path].pattern, counts[path]) for path, s in SCORES.items()}
    np.testing.assert_allclose(masks["b"].density(), [0.1] * 3, rtol=1e-6)


def test_errors_name_the_layer():
    with pytest.raises(ValueError, match="unknown allocation method 'magic'"):
        shfl_jax.allocate(SCORES, SPECS, method="magic")
    with pytest.raises(ValueError, match="c: scores without a spec"):
        shfl_jax.allocate({"c": SCORES["a"]}, SPECS)
    with pytest.raises(ValueError, match=r"a: scores of shape \(12, 16\)"):
        shfl_jax.allocate({"a": SCORES["a"].T}, SPECS)
    with pytest.raises(ValueError, match=r"b: scores of shape \(10, 8\) .* leading axes \(3,\)"):
        shfl_jax.allocate({"b": SCORES["b"][0]}, SPECS)
    with pytest.raises(ValueError, match="b: the allocation gives it no sparsity, only a"):
        shfl_jax.allocate(SCORES, SPECS, method={"a": 0.5})
    with pytest.raises(ValueError, match=r"a: VW.* cannot have a sparsity of 1.0"):
        shfl_jax.allocate(SCORES, SPECS, method={"a": 1.0, "b": 0.5})


SHAPES = {"wide": (12, 40), "more": (12, 40), "stack": (3, 20, 8), "one": (20, 8)}
PATTERNS = [
    NM(),
    BW(0.75, 4),
    VW(0.75, 4, balanced=True),
    ShflBW(0.75, 3, shards=2),
]
each = functools.partial(pytest.mark.parametrize, "pattern", ids=lambda pattern: pattern.name)


def layers(pattern, shapes=SHAPES, seed=0):
    """Specs, and scores of scales that differ from layer to layer."""
    rng = np.random.default_rng(seed)
    specs = {path: spec(path, (*s[:-2], s[-1], s[-2]), pattern, batch=len(s) - 2) for path, s in shapes.items()}
    scales = rng.permutation(np.linspace(0.6, 1.6, len(shapes)))
    scores = {
        p: (scale * rng.random(s)).astype(np.float32) for (p, s), scale in zip(shapes.items(), scales, strict=True)
    }
    return specs, scores


def total(counts, specs):
    return sum(int(np.broadcast_to(n, specs[path].batch_shape).sum()) for path, n in counts.items())


@each(PATTERNS)
def test_a_global_ranking_meets_the_plans_total_and_empties_nothing(pattern):
    specs, scores = layers(pattern)
    compiled = []

    @jax.jit
    def run(scores, fraction):
        compiled.append(None)
        return shfl_jax.allocate(scores, specs, fraction, "global")

    for fraction in (0, 0.4, 1):
        counts, uniform = run(scores, jnp.float32(fraction)), shfl_jax.allocate(scores, specs, fraction)
        unit = 5 if pattern.name == "vw" else 1  # a vector of every group
        assert 0 <= total(uniform, specs) - total(counts, specs) < unit
        for path, count in counts.items():
            units, least = (getattr(pattern, name)(specs[path].matrix_shape) for name in ("units", "least"))
            floor = 0.1 * np.asarray(uniform[path]) - unit
            assert ((count <= units) & (count >= max(least, 1)) & (count >= floor)).all()
            if fraction == 0:
                assert (count == units).all()
    assert len(compiled) == 1
    if not isinstance(pattern, NM):  # which has one sparsity
        assert any((count != uniform[path]).any() for path, count in counts.items())


@each([*PATTERNS, Unstructured(0.75), TEW(0.75, 4), TVW(0.75, 4), ShflTVW(0.75, 4)])
def test_erdos_renyi_totals_and_what_patterns_allow(pattern):
    specs, scores = layers(pattern)
    counts, uniform = shfl_jax.allocate(scores, specs, method="erk"), shfl_jax.allocate(scores, specs)
    step = max(pattern.step(s.matrix_shape) * int(np.prod(s.batch_shape)) for s in specs.values())
    assert 0 <= total(uniform, specs) - total(counts, specs) < step
    for path, layer in specs.items():
        most = pattern.count(layer.matrix_shape, pattern.min_sparsity)
        assert pattern.least(layer.matrix_shape) <= int(counts[path]) <= int(most)
    assert isinstance(pattern, NM) or int(counts["wide"]) < int(uniform["wide"])


def ranked(units, budget, floors):
    """The reference: a list of units of every layer in float64, and how many of them each keeps."""
    order = sorted((-score, layer, i) for layer, scores in enumerate(units) for i, score in enumerate(scores))
    counts = list(floors)
    ranks = [np.argsort(np.argsort(-scores, kind="stable"), kind="stable") for scores in units]
    for _, layer, i in order:
        if ranks[layer][i] >= floors[layer] and sum(counts) < budget:
            counts[layer] += 1
    return counts


@each([Unstructured(0.7), VW(0.7, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_global_ranking_is_that_of_a_sort(pattern, ties):
    specs, scores = layers(pattern, seed=1)
    if ties:
        scores = {path: np.round(3 * s) for path, s in scores.items()}
    slices = [s for path in SHAPES for s in scores[path].reshape(-1, *SHAPES[path][-2:])]
    if isinstance(pattern, VW):
        units = [s.astype(float).reshape(-1, 4, s.shape[1]).sum(1).ravel() for s in slices]
    else:
        units = [s.astype(float).ravel() for s in slices]
    uniform = [int(pattern.count(s.shape)) for s in slices]
    expected = ranked(units, sum(uniform), [max(1, round(0.1 * count)) for count in uniform])
    found = shfl_jax.allocate(scores, specs, method="global")
    np.testing.assert_array_equal(np.concatenate([np.ravel(found[path]) for path in SHAPES]), expected)


def test_ties_go_to_the_earlier_layer_and_the_floor_holds():
    specs, scores = layers(Unstructured(0.5), {"a": (4, 5), "b": (2, 4, 5), "c": (4, 5)})
    equal = {path: np.ones_like(s) for path, s in scores.items()}
    counts = shfl_jax.allocate(equal, specs, method="global", min_share=0.2)
    assert {path: np.asarray(n).tolist() for path, n in counts.items()} == {"a": 20, "b": [16, 2], "c": 2}


def tile_wise(scores, v, density):
    """The reference of TW's ranking over matrices of equal K: outputs of all, then the inputs of all their tiles."""
    k = scores[0].shape[1]
    norms = [np.linalg.norm(s.astype(float), axis=1) / k for s in scores]
    cut = np.sort(np.concatenate(norms))[::-1][round(sum(map(len, norms)) * density**0.5) - 1]
    masks = [np.zeros(s.shape, bool) for s in scores]
    units = []
    for layer, s in enumerate(scores):
        alive = np.flatnonzero(norms[layer] >= cut)
        for tile in np.split(alive, range(v, len(alive), v)):
            values = np.linalg.norm(s[tile].astype(float), axis=0) / len(tile)
            units += [(value, layer, tile, i) for i, value in enumerate(values)]
    kept, budget = 0, density * sum(s.size for s in scores)
    for _, layer, tile, i in sorted(units, key=lambda unit: -unit[0]):
        if kept + len(tile) / 2 > budget:
            break
        masks[layer][tile, i] = True
        kept += len(tile)
    return masks


def test_tile_wise_ranks_all_outputs_and_then_all_inputs():
    pattern = TW(0.75, 4)
    specs, _ = layers(pattern, {"a": (20, 24), "b": (2, 20, 24)})
    a, *b = np.random.default_rng(0).random((3, 20, 24), np.float32) * np.array([[[1]], [[0.9]], [[0.95]]], np.float32)
    scores = {"a": a, "b": np.stack(b)}
    counts = shfl_jax.allocate(scores, specs, method="global", min_share=0)
    count = jax.tree.map(lambda a, b: np.concatenate([a[None], b]), counts["a"], counts["b"])
    expected = np.stack(tile_wise([a, *b], 4, 0.25))
    outputs = expected.any(2).sum(1)
    assert sorted(outputs) != [10, 10, 10]
    np.testing.assert_array_equal(count.outputs, outputs)
    assert np.abs(count.weights - expected.sum((1, 2))).sum() <= 4  # the unit at the threshold
    first = np.asarray(shfl_jax.mask(a, pattern, counts["a"]).elements())
    assert (first != expected[0]).sum() <= 4


def test_more_weights_than_integers_count():
    keys = [jnp.array([[5, 3, 1]]), jnp.array([[4, 4, 2]]), jnp.array([[6, 1, 1]])]
    price = 2**29

    @jax.jit
    def kept(count):
        return ranking.rank_together(keys, [price] * 3, [ranking.Limits(0, count, 3 * price)] * 3)

    assert [int(n[0]) // price for n in kept(2 * price)] == [2, 3, 1]
    assert [int(n[0]) // price for n in kept(3 * price)] == [3, 3, 3]


def test_erdos_renyi_densities_and_their_cap():
    specs, scores = layers(Unstructured(0.8), {"a": (100, 100), "b": (100, 50), "c": (10, 10)})
    counts = shfl_jax.allocate(scores, specs, method="erk")
    densities = {path: int(n) / scores[path].size for path, n in counts.items()}
    # "c" would have a density of 0.2 * 15100 / (200 + 150 + 20) * 20 / 100 > 1; the others share 3020 - 100.
    factor = (0.2 * 15100 - 100) / (200 + 150)
    expected = {"a": factor * 200 / 1e4, "b": factor * 150 / 5e3, "c": 1}
    assert densities == pytest.approx(expected, abs=2e-4)
    assert sum(map(int, counts.values())) == 3020
    # 2:4 inside leaves no layer above one half.
    specs, scores = layers(TVW(0.8, 4), {"a": (100, 100), "b": (100, 50), "c": (10, 10)})
    assert int(shfl_jax.allocate(scores, specs, method="erk")["c"]) == 50


def test_given_sparsities_and_budgets_by_pattern():
    specs, scores = layers(Unstructured(0.5))
    given = {"wide": 0.25, "stack": 0.5, "more": 0.75, "one": 0.0}
    counts = jax.jit(lambda f: shfl_jax.allocate(scores, specs, f, given))(0.5)
    assert {path: int(n) for path, n in counts.items()} == {"wide": 420, "stack": 120, "more": 300, "one": 160}
    # A rule's layers share the rule's budget alone.
    specs = {"a": spec("a", (8, 8), Unstructured(0.5)), "b": spec("b", (8, 8), Unstructured(0.75))}
    scores = {"a": jnp.ones((8, 8)), "b": 9 * jnp.ones((8, 8))}
    for method in ("global", "erk"):
        counts = shfl_jax.allocate(scores, specs, method=method)
        assert {path: int(n) for path, n in counts.items()} == {"a": 32, "b": 16}


def test_sensitivity_finds_the_best_of_all_allocations():
    specs, scores = layers(Unstructured(0.5), {"a": (8, 10), "b": (2, 8, 10), "c": (8, 20)})
    grid = np.arange(11) / 10
    sizes = np.array([80, 160, 160])
    rises = [1.0 * grid**2, 0.5 * grid**3, 4.0 * grid**2]
    table = shfl_jax.Sensitivity(
        tuple(grid[1:]), {path: 3 + rise[1:] for path, rise in zip(specs, rises, strict=True)}, 3.0
    )
    found = table.allocation(specs)
    choices = [c for c in itertools.product(range(11), repeat=3) if sizes @ grid[list(c)] >= 200 - 1e-9]
    best = min(sum(rise[i] for rise, i in zip(rises, choice, strict=True)) for choice in choices)
    loss = sum(np.interp(found[path], grid, rise) for path, rise in zip(specs, rises, strict=True))
    assert loss <= best + 1e-9
    counts = shfl_jax.allocate(scores, specs, method=found)
    assert total(counts, specs) == 200
    assert found["c"] < found["a"] < found["b"]


def test_sensitivity_with_curves_that_are_not_convex_and_losses_that_are_not_finite():
    specs, _ = layers(Unstructured(0.5), {"a": (10, 10), "b": (10, 10)})
    losses = {"a": np.array([0.9, 0.4, np.inf]), "b": np.array([0.3, 0.8, 2.0])}
    found = shfl_jax.Sensitivity((0.25, 0.5, 0.9), losses, 0.0).allocation(specs)
    # On its hull "a" costs 0.8 a unit of sparsity up to 0.5, "b" 1.2 up to 0.25 and 2 from there on.
    assert found == pytest.approx({"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="measure higher sparsities"):
        shfl_jax.Sensitivity((0.25,), {"a": losses["a"][:1], "b": losses["b"][:1]}, 0.0).allocation(specs)
    with pytest.raises(ValueError, match="b: not measured, only a"):
        shfl_jax.Sensitivity((0.9,), {"a": np.ones(1)}, 0.0).allocation(specs)
    specs, _ = layers(NM(), {"a": (8, 8), "b": (8, 8)})
    found = shfl_jax.Sensitivity((0.25, 0.5), {"a": np.array([1, 2]), "b": np.array([0, 1])}, 0.0).allocation(specs)
    assert found == {"a": 0.5, "b": 0.5}
    specs, _ = layers(TVW(0.75, 4), {"a": (8, 8), "b": (8, 8)})
    found = shfl_jax.Sensitivity((0.75, 0.95), {"a": np.array([9, 10]), "b": np.array([0, 1])}, 0.0).allocation(specs)
    assert found["a"] >= 0.5
    assert sum(found.values()) == pytest.approx(1.5, abs=0.02)


def test_layers_may_proceed_on_their_own():
    specs = {path: shfl_jax.LayerSpec(path, (8, 16), (), (1,), (0,), VW(0.75, 4)) for path in ("a", "b")}
    scores = {path: jnp.ones((8, 16)) for path in specs}
    counts = shfl_jax.allocate(scores, specs, {"a": 0.0, "b": 1.0})
    assert {path: int(count) for path, count in counts.items()} == {"a": 32, "b": 8}
    with pytest.raises(ValueError, match="give it one fraction"):
        shfl_jax.allocate(scores, specs, {"a": 0.0, "b": 1.0}, "global")
