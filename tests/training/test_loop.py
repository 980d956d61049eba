import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shfl_jax
from shfl_jax import pruning
from shfl_jax.pruning import _losses as losses
from training import gpt, loop, text


def test_topics_are_split_without_loss():
    data = text.topics()
    whole = np.concatenate([data.train, data.validation])
    assert len(data.train) == round(0.9 * len(whole))
    assert 'The "assert" statement' in "".join(data.alphabet[c] for c in whole)
    assert data.train.max() < len(data.alphabet)


def test_windows_predict_every_character_once():
    windows = text.windows(np.arange(23), 5)
    assert windows.shape == (4, 6)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 21))
    np.testing.assert_array_equal(windows[:, 0], [0, 5, 10, 15])


@pytest.mark.parametrize("order", [1, 3])
def test_the_markov_model_equals_a_plain_one(order):
    data = text.split("abracadabra, said the abbot; abracadabra, said the cat. " * 6 + "quite another end", 0.2)
    train, size, delta = list(data.train), len(data.alphabet), 0.1
    bits = []
    for i in range(order, len(data.validation)):
        context, nxt = list(data.validation[i - order : i]), data.validation[i]
        seen = [train[j + order] for j in range(len(train) - order) if train[j : j + order] == context]
        bits.append(-math.log2((seen.count(nxt) + delta) / (len(seen) + delta * size)))
    assert text.markov_bits(data, order, (delta,)) == pytest.approx(np.mean(bits), rel=1e-12)
    assert text.markov_bits(data, order, (delta, 1e-9)) <= text.markov_bits(data, order, (delta,))


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_a_split_needs_a_fraction(fraction):
    with pytest.raises(ValueError, match="validation"):
        text.split("some text", fraction)


def test_bits_per_token():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    targets = np.array([[0, 1, 2], [4, 3, 0]])
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = -np.log2(np.take_along_axis(chances, targets[..., None], -1)[..., 0]).mean(-1)
    np.testing.assert_allclose(losses.bits_per_token(jnp.asarray(logits, jnp.float32), targets), wanted, rtol=1e-5)


def test_evaluate_weighs_every_window_once():
    windows = np.arange(14, dtype=np.int32).reshape(7, 2)
    calls = []

    def window_losses(scale, part):
        calls.append(part.shape)
        return jnp.asarray(part[:, 0] * scale)

    assert loop.evaluate(window_losses, 2.0, windows, 3) == 2 * windows[:, 0].mean()
    assert set(calls) == {(3, 2)}


MODEL = gpt.GPT(vocab=11, context=8, d_model=16, layers=1, heads=2, mlp=16, dropout=0.1)


def model_loss(params, windows, key):
    logits = MODEL.apply({"params": params}, windows[:, :-1], True, rngs={"dropout": key})
    return losses.bits_per_token(logits, windows[:, 1:]).mean()


def test_blocks_of_steps_equal_each_other_and_learn():
    example = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(MODEL.init)(jax.random.key(0), example)["params"]
    specs = shfl_jax.linen.resolve(shfl_jax.Plan({"(.*/)?(mlp|attn)/.*": shfl_jax.VW(0.5, 8)}), MODEL, example)
    assert len(specs) == 6
    tx = pruning.prune(optax.adam(0.01), specs, pruning.cubic(4, 12, 4))
    codes = jnp.asarray(np.arange(400) % 11, jnp.int32)
    run = functools.partial(loop.train, loss=model_loss, tx=tx, batch=4, context=8)
    key = jax.random.key(1)
    start = loop.train_state(params, tx)
    halves, first = run(jax.tree.map(jnp.copy, start), codes, key, steps=12)
    halves, second = run(halves, codes, key, steps=12)
    ones, third = run(jax.tree.map(jnp.copy, start), codes, key, steps=12)
    resumed, fourth = run(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), ones), codes, key, steps=12)
    np.testing.assert_array_equal(np.r_[first, second], np.r_[third, fourth])
    jax.tree.map(np.testing.assert_array_equal, halves, resumed)
    assert int(halves.step) == 24
    assert float(second[-4:].mean()) < float(first[:4].mean())
    assert all(mask.density() == 0.5 for mask in pruning.masks(halves.opt_state).values())


def test_the_model_does_not_look_ahead():
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)
    variables = jax.jit(MODEL.init)(jax.random.key(1), tokens)
    changed = tokens.at[:, 5:].set((tokens[:, 5:] + 1) % 11)
    before, after = MODEL.apply(variables, tokens), MODEL.apply(variables, changed)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-3
    assert before.shape == (2, 8, 11)
