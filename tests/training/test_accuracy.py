import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shfl_jax
from shfl_jax import pruning
from training import accuracy, accuracy_plot, claims
from training.sweep import Sweep, make_sweep, sparsities
from training.tasks import TASKS, Recipe, digits, shapes, translation
from training.tasks.task import unfolded_convolution

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "accuracy.json"
H200 = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu"))


def records_of(task, label, values, sparsity=0.75, higher=True):
    measure = "accuracy" if higher else "bits_per_char"
    shared = {"op": "accuracy", "task": task, "label": label, "pattern": label, "sparsity": sparsity, "higher": higher}
    return [
        {**shared, "measure": measure, measure: v, "seed": i, "measured_sparsity": sparsity}
        for i, v in enumerate(values)
    ]


# The program.


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("digits", ["dense", "VW 32"]),
        ("topics", ["dense", "EW"]),
        ("translation", ["dense", "2:4"]),
        ("shapes", ["dense", "VW 32"]),
    ],
)
def test_every_task_trains_and_leaves_records(tmp_path, name, labels):
    path = tmp_path / "accuracy.json"
    document = accuracy.run(path, [name], minutes=5, seeds=2, smoke=True, labels=labels)
    assert document == json.loads(path.read_text())
    records = [r for r in document["records"] if r["op"] == "accuracy"]
    assert {r["label"] for r in records} == set(labels)
    for record in records:
        assert record["task"] == name
        assert np.isfinite(record[record["measure"]])
        assert record["measured_sparsity"] == pytest.approx(record["sparsity"], abs=0.05)
        if record["pattern"] == "vw" and record["seed"] == 0:
            assert record["compressed_accuracy"] == pytest.approx(record["accuracy"], abs=0.011)
            assert record["compressed_loss"] == pytest.approx(record["loss"], rel=1e-5)
            assert record["compressed_layers"] == {"digits": 3, "shapes": 2}[name]
    means = [r for r in document["records"] if r["op"] == "accuracy_mean"]
    assert {r["seeds"] for r in means} == {2}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("name", "convolutions"), [("digits", 2), ("shapes", 2)])
def test_compressed_convolutions_run_in_the_kernels_of_a_gpu(name, convolutions):
    task, pattern = TASKS[name](True), shfl_jax.VW(0.5, group_size=16)
    specs = make_sweep(task, (0,)).specs
    params = jax.jit(task.model.init)(jax.random.key(0), *task.example)["params"]
    kernels = shfl_jax.path_leaves(params)
    masks = {path: shfl_jax.mask(jnp.abs(spec.to_matrix(kernels[path])), pattern) for path, spec in specs.items()}
    sparse = shfl_jax.prepare(shfl_jax.compress(params, shfl_jax.Masks(masks, tuple(specs.values()))), "triton")
    apply = jax.jit(functools.partial(shfl_jax.linen.apply, task.model))
    with jax.sharding.use_abstract_mesh(H200):
        text = apply.trace(sparse, *task.example).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "row_grouped_conv"') == convolutions


@pytest.mark.parametrize("task", ["digits", "shapes"])
def test_compressed_models_of_the_record_are_as_accurate_as_masked_ones(task):
    records = [r for r in json.loads(RECORD.read_text())["records"] if r["op"] == "accuracy" and r["task"] == task]
    compressed = [r for r in records if "compressed_accuracy" in r]
    grouped = [label for label, make in accuracy.PATTERNS.items() if make is not None and make(0.75).group_size > 1]
    assert sorted(r["label"] for r in compressed) == sorted(grouped)
    for record in compressed:
        assert record["compressed_accuracy"] == pytest.approx(record["accuracy"], abs=0.0005)
        assert record["compressed_loss"] == pytest.approx(record["loss"], rel=1e-4)


def test_what_is_there_is_not_trained_again(tmp_path, monkeypatch):
    asked = []

    def train(task, wanted, seeds, deadline, progress):
        for case in wanted:
            asked.append((case.label, case.sparsity))
            yield [r | {"seconds": 0.0} for r in records_of(task.name, case.label, [0.5] * seeds, case.sparsity)]

    monkeypatch.setattr(accuracy, "_train_task", train)
    path = tmp_path / "accuracy.json"
    first = accuracy.run(path, ["topics"], minutes=5, seeds=1, smoke=True, labels=["dense"])
    accuracy.run(path, ["topics"], minutes=5, seeds=1, smoke=True, labels=["dense", "EW"])
    assert asked == [("dense", 0.0), *(("EW", s) for s in (0.75, 0.5, 0.875, 0.9))]
    # Another seed asks for all cases again, and leaves what is there as it is.
    third = accuracy.run(path, ["topics"], minutes=5, seeds=2, smoke=True, labels=["dense", "EW"])
    assert len(asked) == 10
    assert third["records"][0] == first["records"][0]
    keys = [(r["label"], r["sparsity"], r["seed"]) for r in third["records"] if r["op"] == "accuracy"]
    assert len(keys) == len(set(keys)) == 10
    accuracy.run(path, ["topics"], minutes=5, seeds=2, smoke=True, labels=["dense", "EW"])
    assert len(asked) == 10
    with pytest.raises(ValueError, match="smoke records"):
        accuracy.run(path, ["topics"], minutes=5, seeds=1)
    document = json.loads(path.read_text())
    document["records"][0]["recipe"] = {"batch": 1}
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="another recipe"):
        accuracy.run(path, ["topics"], minutes=5, seeds=3, smoke=True, labels=["dense"])


def test_files_of_different_tasks_are_merged(tmp_path):
    def write(name, *records, smoke=False, device="a"):
        records = [r | {"smoke": smoke} for r in records]
        document = {"device": device, "jax": "1", "date": "2000-01-01", "records": records}
        (tmp_path / name).write_text(json.dumps(document))
        return tmp_path / name

    dense, sparse = records_of("digits", "dense", [0.9, 0.8], 0.0), records_of("digits", "EW", [0.7, 0.7])
    first, second = write("first", *sparse, *dense), write("second", *records_of("shapes", "dense", [0.5], 0.0))
    # Another run of a task has other dense models: none of it is taken, whatever the first one lacks.
    third = write("third", *records_of("digits", "VW 32", [0.1, 0.6]))
    path = tmp_path / "merged"
    document = accuracy.merge(path, [first, second, third])
    assert document == json.loads(path.read_text())
    assert document["device"] == "a"
    records = [r for r in document["records"] if r["op"] == "accuracy"]
    assert [(r["task"], r["label"], r["accuracy"]) for r in records] == [
        ("digits", "dense", 0.9),
        ("digits", "dense", 0.8),
        ("digits", "EW", 0.7),
        ("digits", "EW", 0.7),
        ("shapes", "dense", 0.5),
    ]
    mean = next(r for r in document["records"] if r["op"] == "accuracy_mean" and r["label"] == "EW")
    assert mean["differences"] == "-20.00, -10.00"
    # What the file holds counts too.
    more = write("more", *records_of("topics", "dense", [1.0], 0.0), *records_of("translation", "dense", [1.0], 0.0))
    tasks = [r["task"] for r in accuracy.merge(path, [more], ["topics"])["records"] if r["op"] == "accuracy"]
    assert tasks == ["digits"] * 4 + ["topics", "shapes"]
    for other in (
        write("smoke", *dense, smoke=True),
        write("device", *records_of("translation", "dense", [0.9], 0.0), device="b"),
    ):
        with pytest.raises(ValueError, match="belong together"):
            accuracy.merge(path, [other])


def test_no_case_begins_after_the_minutes(tmp_path):
    assert accuracy.run(tmp_path / "accuracy.json", ["topics"], minutes=0, seeds=1, smoke=True) == {"records": []}


def test_the_cases_are_those_of_the_record():
    cases = list(accuracy.cases())
    assert len(cases) == len(set(cases)) == 1 + 13 + 1 + 12
    assert cases[0] == accuracy.Case("dense", 0.0)
    for case in cases[1:]:
        assert case.pattern.sparsity == case.sparsity


# The sweep.


def small(every=4):
    task = TASKS["topics"](True)
    recipe = Recipe(4, 8, 8, every, 1e-2)
    return type(task)(**{**vars(task), "recipe": recipe})


def test_a_sweep_does_what_the_transformation_does():
    task, pattern = small(), shfl_jax.VW(0.75, group_size=16)
    programs = make_sweep(task, (3,))
    models, renewal, masks = programs.start(), programs.compile_renewal(pattern), programs.whole(pattern)
    models, masks, kept = renewal(models, masks, np.float32(0.75), np.float32(1))
    # The transformation finds the same masks in weights that are pruned already, and its first gradient is theirs too.
    params = jax.tree.map(lambda a: jnp.array(a[0]), models.params)
    for step in (0, 4):
        models, _ = programs.train(models, kept, step)

    plan = shfl_jax.Plan({task.pruned: pattern})
    specs = shfl_jax.linen.resolve(plan, task.model, *task.example)
    tx = pruning.prune(task.recipe.optimizer(), specs, pruning.one_shot())

    @jax.jit
    def step(params, state, i):
        draw_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(3), i))
        batch = task.draw(programs.data, draw_key, task.recipe.batch)
        updates, state = tx.update(jax.grad(task.loss)(params, batch, loss_key), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(8):
        params, state = step(params, state, i)
    for path, mask in pruning.masks(state).items():
        np.testing.assert_array_equal(mask.elements(), masks[path].elements()[0])
    found = shfl_jax.path_leaves(models.params)
    for path, array in shfl_jax.path_leaves(params).items():
        # A bias of keys has no gradient but rounding errors, of which Adam makes whole steps.
        if not path.endswith("key/bias"):
            np.testing.assert_allclose(array, found[path][0], atol=1e-3, err_msg=path)


def test_one_program_of_masks_serves_every_sparsity():
    programs = make_sweep(small(), (0, 1))
    renewal = programs.compile_renewal(shfl_jax.VW(0.75, group_size=8))
    for sparsity in (0.5, 0.9):
        models, masks = programs.start(), programs.whole(shfl_jax.VW(sparsity, group_size=8))
        for fraction in (0.5, 1):
            models, masks, kept = renewal(models, masks, np.float32(sparsity), np.float32(fraction))
            np.testing.assert_allclose(sparsities(masks, programs.specs), sparsity * fraction, atol=0.01)
        kernels = shfl_jax.path_leaves(models.params)
        for path, keep in kept.items():
            assert not np.asarray(kernels[path])[~np.asarray(keep)].any()


def test_a_test_set_of_a_wrong_size_is_an_error():
    task = small()
    with pytest.raises(ValueError, match="does not divide the 16 examples"):
        Sweep(type(task)(**{**vars(task), "test_batch": 7}), (0,), {})._batches()


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "SAME"), ((2, 2), "SAME"), ((2, 1), [(1, 0), (0, 2)])])
def test_an_unfolded_convolution_is_one(strides, padding):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 7, 8, 3), (3, 3, 3, 5)]))
    with jax.default_matmul_precision("highest"):
        found = unfolded_convolution(x, kernel, strides, padding)
        expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be unfolded"):
        unfolded_convolution(x, kernel, strides, padding, feature_group_count=3)


def test_a_recipe_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="every=7 must divide"):
        Recipe(8, 14, 20, 7, 1e-3)
    fractions = Recipe(8, 40, 100, 10, 1e-3).fractions
    assert len(fractions) == 6
    assert fractions[-1] == 1
    assert list(fractions) == sorted(fractions)


# The data.


def rows_of(images):
    return {image.tobytes() for image in images}


def test_digits_are_kept_apart(monkeypatch):
    train, test = digits.data()
    assert len(test["label"]) == digits.TEST * digits.DRAWS
    assert len(train["label"]) + digits.TEST == 1797
    again = digits.data()
    np.testing.assert_array_equal(again[1]["image"], test["image"])
    monkeypatch.setattr(digits, "NOISE", 0)
    still, moves = digits.data()[1]["image"], [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert not rows_of(still) & rows_of(np.roll(image, move, (0, 1)) for image in train["image"] for move in moves)


def test_shapes_are_those_of_the_seed():
    first, again, other = shapes.data(40, 0), shapes.data(40, 0), shapes.data(40, 1)
    np.testing.assert_array_equal(first["image"], again["image"])
    assert not rows_of(first["image"]) & rows_of(other["image"])
    assert first["image"].shape == (40, 32, 32, 3)
    assert abs(first["image"]).max() < 3
    assert set(shapes.data(1000, 2)["label"]) == set(range(20))


def test_sentences_are_those_of_the_seed_and_kept_apart():
    language = translation.Language(12, 6, 6, 4)
    train, test = translation.data(language, 300, 50)
    again = translation.data(language, 300, 50)
    np.testing.assert_array_equal(train["target"], again[0]["target"])
    assert len(rows_of(train["source"])) == 300
    assert not rows_of(train["source"]) & rows_of(test["source"])
    assert train["source"].max() < language.source_size
    assert train["target"].max() < language.target_size
    assert (train["target"][:, 0] == translation.BEGIN).all()
    assert ((train["target"] == translation.END).sum(1) == 1).all()
    assert ((train["source"] == translation.END).sum(1) == 1).all()


def test_bleu_counts_words_up_to_the_end():
    expected = np.asarray([[5, 6, 7, 8, 9, 2, 0], [9, 8, 7, 6, 5, 4, 2]])
    assert translation.bleu(expected, expected) == pytest.approx(100)
    after = expected.copy()
    after[0, 6] = 7
    assert translation.bleu(after, expected) == pytest.approx(100)
    after[1, :3] = 3
    assert 0 < translation.bleu(after, expected) < 90


# The claims.


def test_differences_are_paired_and_judged_by_their_mean():
    records = [
        *records_of("a", "dense", [0.90, 0.80], 0.0),
        *records_of("a", "EW", [0.90, 0.82]),
        *records_of("a", "Shfl-BW 64", [0.89, 0.80]),
        *records_of("a", "BW 32", [0.90, 0.70]),
    ]
    found = {(r["claim"], r["task"]): r for r in claims.verdicts(records)}
    better = found["Shfl-BW 64 > BW 32", "a"]
    assert better["differences"] == "-1.00, +10.00"
    assert better["difference"] == pytest.approx(4.5)
    assert better["holds"] == "yes"
    assert found["EW >= Shfl-BW 64", "a"]["holds"] == "yes"
    loses = found["Shfl-BW 64 loses at most 1 against dense", "a"]
    assert (loses["difference"], loses["holds"]) == (pytest.approx(-0.5), "yes")
    # One task of four settles nothing, unless it fails what must hold on every one.
    assert found["Shfl-BW 64 > BW 32", "all"]["holds"] == "undecided"
    assert ("Shfl-BW 64 >= VW 64", "a") not in found


def test_a_claim_counts_tasks():
    records = []
    for task, shuffled in zip("abcd", (0.9, 0.9, 0.9, 0.7), strict=True):
        records += records_of(task, "dense", [0.9, 0.9], 0.0) + records_of(task, "Shfl-BW 64", [shuffled] * 2)
        records += records_of(task, "BW 32", [0.8] * 2) + records_of(task, "VW 64", [0.8] * 2)
        records += records_of(task, "Shfl-BW 64, K-means", [0.8] * 2)
    verdicts = {r["claim"]: r["holds"] for r in claims.verdicts(records) if r["task"] == "all"}
    assert verdicts["Shfl-BW 64 > BW 32"] == "no"
    assert verdicts["Shfl-BW 64 >= VW 64"] == "yes"
    assert verdicts["Shfl-BW 64: annealing > K-means"] == "yes"
    assert verdicts["Shfl-BW 64 loses at most 1 against dense"] == "yes"


def test_bits_are_compared_in_percent_of_the_dense_ones():
    records = records_of("t", "dense", [2.0], 0.0, False) + records_of("t", "Shfl-BW 64", [2.05], higher=False)
    means = {r["label"]: r for r in claims.summary(records)}
    assert means["Shfl-BW 64"]["difference"] == pytest.approx(-2.5)
    assert means["dense"]["difference_text"] == ""
    (loses,) = [r for r in claims.verdicts(records) if r["task"] == "t"]
    assert loses["holds"] == "no"


def test_a_record_is_told_and_drawn(tmp_path):
    records = records_of("a", "dense", [0.9, 0.8], 0.0)
    for sparsity in (0.5, 0.75):
        records += records_of("a", "EW", [0.9, 0.8], sparsity) + records_of("a", "Shfl-BW 64", [0.8, 0.8], sparsity)
    document = {"records": [*records, *claims.summary(records), *claims.verdicts(records)]}
    means, judged = claims.tables(document)
    assert means.row_count == 5
    assert judged.row_count == 4
    accuracy_plot.draw(tmp_path / "a.png", document)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        accuracy_plot.draw(tmp_path / "b.png", {"records": []})
