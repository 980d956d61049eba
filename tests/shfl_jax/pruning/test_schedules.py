import jax
import numpy as np
import pytest

from shfl_jax import pruning
from shfl_jax.pruning import constant, cubic, grow_and_prune, linear, one_shot, stages


@pytest.mark.parametrize(("begin", "end", "every"), [(0, 10, 1), (3, 20, 5), (2, 13, 4), (0, 3, 7)])
def test_cubic_reaches_the_target_at_its_end(begin, end, every):
    schedule = cubic(begin, end, every)
    steps = np.arange(end + 10)
    t = np.clip((steps.astype(np.float64) - begin) / (end - begin), 0, 1)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), 1 - (1 - t) ** 3, atol=1e-6)
    assert schedule(end) == 1
    due = [s for s in steps if schedule.is_update(s)]
    assert due == sorted({*range(begin, end + 1, every), end})


def test_one_shot_updates_once():
    schedule = one_shot(4)
    assert [bool(schedule.is_update(s)) for s in range(8)] == [s == 4 for s in range(8)]
    assert [float(schedule(s)) for s in (0, 3, 4, 9)] == [0, 0, 1, 1]


def test_schedules_are_hashable_values():
    assert cubic(1, 5, 2) == cubic(1, 5, 2)
    assert hash(one_shot(3)) == hash(one_shot(3))


@pytest.mark.parametrize("arguments", [(-1, 5, 1), (5, 5, 1), (6, 5, 1), (0, 5, 0)])
def test_cubic_refuses_what_cannot_be(arguments):
    with pytest.raises(ValueError, match=r"begin|every"):
        cubic(*arguments)


def test_one_shot_refuses_a_negative_step():
    with pytest.raises(ValueError, match="step=-2"):
        one_shot(-2)


def updates(schedule, steps=40):
    return [s for s in range(steps) if schedule.is_update(s)]


def test_linear_and_constant():
    schedule = linear(4, 14, 5)
    np.testing.assert_allclose([schedule(s) for s in (0, 4, 9, 14, 20)], [0, 0, 0.5, 1, 1])
    assert updates(schedule) == [4, 9, 14]
    schedule = constant(3, 8, 2)
    assert [float(schedule(s)) for s in (0, 2, 3, 8, 20)] == [0, 0, 1, 1, 1]
    assert updates(schedule) == [3, 5, 7, 8]


def test_stages_reach_their_share_of_the_target():
    schedule = stages([2, 5, 9], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(
        jax.vmap(schedule)(np.array([0, 1, 2, 4, 5, 8, 9, 30])), np.array([0, 0, 1, 1, 2, 2, 3, 3]) / 3
    )
    assert updates(schedule) == [2, 5, 9]


def test_rows_are_searched_when_the_schedule_says():
    assert not any(cubic(2, 12, 2).is_search(s) for s in range(20))
    assert [s for s in range(20) if linear(2, 12, 2, search_every=4).is_search(s)] == [2, 6, 10]
    assert [s for s in range(20) if stages([2, 5], [0.5, 0.6], search=True).is_search(s)] == [2, 5]
    assert isinstance(cubic(0, 1), pruning.RowSchedule)
    assert not isinstance(one_shot(0), pruning.RowSchedule)


def test_partitions_take_turns():
    schedule = grow_and_prune(["a.*", "b.*"], begin=1, turn=3, rounds=2)
    paths = ("a1", "a2", "b", "other")
    assert isinstance(schedule, pruning.LayerSchedule)
    assert updates(schedule) == [1, 4, 7, 10, 13] == [*range(1, schedule.end + 1, 3)]
    shown = {}
    for step in updates(schedule):
        turns = schedule.turns(step, paths)
        shown[step] = "".join(str(int(turns[path].fraction)) if turns[path].due else "." for path in paths)
    # Dense is 0, pruned is 1, a dot is left alone.
    assert shown == {1: "0011", 4: "110.", 7: "001.", 10: "110.", 13: "..1."}
    whole = grow_and_prune([".*"], begin=0, turn=2, rounds=2)
    assert [float(whole.turns(s, ("a",))["a"].fraction) for s in updates(whole)] == [0, 0, 1]
    with pytest.raises(ValueError, match=r"partition 'b\.\*' owns no pruned layer"):
        schedule.turns(0, ("a1",))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: linear(3, 3), "begin=3"),
        (lambda: cubic(0, 9, 2, search_every=3), "search_every=3 must be a multiple of every=2"),
        (lambda: stages([], []), "0 steps"),
        (lambda: stages([1, 2], [0.5]), "2 steps"),
        (lambda: stages([2, 2], [0.5, 0.6]), "ascend"),
        (lambda: stages([1, 2], [0.6, 0.5]), "not fall"),
        (lambda: stages([1], [0.0]), r"\(0, 1\]"),
        (lambda: grow_and_prune([], 0, 1), "at least one partition"),
        (lambda: grow_and_prune(["("], 0, 1), "no regular expression"),
        (lambda: grow_and_prune(["a"], 0, 0), "turn=0"),
    ],
)
def test_schedules_refuse_what_cannot_be(make, text):
    with pytest.raises(ValueError, match=text):
        make()
