import jax
import numpy as np
import pytest

from training import cubic, one_shot


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
