"""Training and evaluating a language model on one long text, many steps in one compiled call."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(params, windows (batch, context + 1) int32, key) -> scalar."""


def adamw(
    learning_rate: float, warmup: int, decay: int, end: int, *, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW with clipped gradients: `warmup` steps up, a constant rate, from step `decay` down to zero at `end`."""
    up, down = optax.linear_schedule(0, learning_rate, warmup), optax.linear_schedule(learning_rate, 0, end - decay)
    rate = optax.join_schedules([up, down], [decay])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=b2, weight_decay=weight_decay))


class TrainState(NamedTuple):
    """What training changes; with the key, all that a stopped run needs to go on bit for bit.

    Attributes:
        params: parameters.
        opt_state: the optimizer's state.
        step: int32 scalar, steps done.
    """

    params: Any
    opt_state: optax.OptState
    step: jax.Array


def train_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))


def sample_windows(codes: jax.Array, key: jax.Array, batch: int, context: int) -> jax.Array:
    """Random windows of a text: codes (n,) to (batch, context + 1), starts uniform and with replacement."""
    starts = jax.random.randint(key, (batch,), 0, codes.shape[0] - context)
    return codes[starts[:, None] + jnp.arange(context + 1)]


@functools.partial(jax.jit, static_argnames=("loss", "tx", "steps", "batch", "context"), donate_argnums=0)
def train(
    state: TrainState,
    codes: jax.Array,
    key: jax.Array,
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    steps: int,
    batch: int,
    context: int,
) -> tuple[TrainState, jax.Array]:
    """Runs some steps of training in one `lax.scan`. The state passed in is given up (donated).

    Args:
        state: where to start.
        codes: (n,) int32, the training text; n must exceed `context`.
        key: of the whole run: every step's windows and noise depend on it and on the step's number alone.
        loss: the objective.
        tx: the optimizer; the one whose state this is.
        steps: how many steps.
        batch: windows a step.
        context: tokens a window.

    Returns:
        The state after these steps, and the loss of each: (steps,) float32.
    """

    def step(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
        window_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        windows = sample_windows(codes, window_key, batch, context)
        value, grads = jax.value_and_grad(loss)(state.params, windows, loss_key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return jax.lax.scan(step, state, length=steps)


def evaluate(losses: Callable[[Any, Any], jax.Array], params: Any, windows: np.ndarray, batch: int) -> float:
    """The mean of a loss over windows.

    Args:
        losses: a compiled function of (params, windows (batch, context + 1)) that gives each window's loss, (batch,).
        params: its first argument.
        windows: (n, context + 1), n >= 1.
        batch: windows a call. The last call is filled up with copies, so that one shape is compiled.
    """
    total = 0.0
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        filled = np.resize(part, (batch, windows.shape[1]))
        total += float(np.asarray(losses(params, filled), np.float64)[: len(part)].sum())
    return total / len(windows)
