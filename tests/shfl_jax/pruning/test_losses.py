import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shfl_jax import pruning


def test_distillation_is_the_divergence_and_the_task():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 5))
    task, temperature = rng.uniform(size=3), 3.0

    def chances(logits):
        e = np.exp(logits / temperature)
        return e / e.sum(-1, keepdims=True)

    p, q = chances(teacher), chances(student)
    wanted = 0.7 * temperature**2 * (p * np.log(p / q)).sum(-1) + 0.3 * task
    arrays = (jnp.asarray(a, jnp.float32) for a in (student, teacher, task))
    got = pruning.distillation(*arrays, temperature=temperature, weight=0.7)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_only_the_student_learns_from_the_teacher():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 4, 6))
    mine, theirs = jax.grad(lambda a, b: pruning.distillation(a, b).sum(), argnums=(0, 1))(student, teacher)
    assert mine.any()
    assert not theirs.any()
    np.testing.assert_allclose(pruning.distillation(teacher, teacher, weight=1.0), 0, atol=1e-6)
    # A class that is ruled out, in half precision.
    ruled = teacher.astype(jnp.bfloat16).at[:, 0].set(-jnp.inf)
    value, slope = jax.value_and_grad(lambda a: pruning.distillation(a, ruled).sum())(student.astype(jnp.bfloat16))
    assert jnp.isfinite(value)
    assert jnp.isfinite(slope).all()


def test_distillation_refuses_what_cannot_be():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="shape"):
        pruning.distillation(logits, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="temperature=0"):
        pruning.distillation(logits, logits, temperature=0)
    with pytest.raises(ValueError, match="weight=2"):
        pruning.distillation(logits, logits, weight=2)
