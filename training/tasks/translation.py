"""Translation between two invented languages, and an encoder-decoder Transformer: the stand-in for WMT.

The source language has an order subject, verb, object, its adjectives before the noun and a word for the tense. The
target language puts the verb last and adjectives after the noun; determiners and adjectives agree with the gender,
number and case of their noun, nouns with their case, and the word for a verb depends on its subject's number and on its
object's gender. Lemmas are drawn with Zipf's frequencies, so that many forms are rare.
"""

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import DTypeLike

from training.tasks.task import Recipe, Task, draw_examples

PAD, BEGIN, END = 0, 1, 2
LENGTH = 32
"""Tokens of the longest sentence with its end."""
RECIPE = Recipe(64, 600, 800, 40, 1e-3, dropout=0.1)
"""How all models are trained; see docs/accuracy.md for how it was chosen."""


@dataclasses.dataclass(frozen=True)
class Language:
    """How many lemmas there are of each kind, and the vocabularies that follow.

    Attributes:
        nouns: number of nouns.
        adjectives: of adjectives.
        verbs: of verbs.
        adverbs: of adverbs.
    """

    nouns: int = 1200
    adjectives: int = 320
    verbs: int = 320
    adverbs: int = 160

    @property
    def source_size(self) -> int:
        """Number of source tokens: the three marks, tenses, prepositions, determiners, nouns in two numbers, others."""
        return 3 + 3 + 4 + 4 + 2 * self.nouns + self.adjectives + self.verbs + self.adverbs

    @property
    def target_size(self) -> int:
        """Number of target tokens: every form of every word."""
        return 3 + 3 + 4 + 4 * 12 + 4 * self.nouns + 6 * self.adjectives + 6 * self.verbs + self.adverbs


def sentence(language: Language, rng: random.Random) -> tuple[list[int], list[int]]:
    """A random sentence and its translation, without the marks of begin and end, each shorter than `LENGTH`."""
    starts_source = _starts(3, 4, 4, 2 * language.nouns, language.adjectives, language.verbs, language.adverbs)
    starts_target = _starts(3, 4, 48, 4 * language.nouns, 6 * language.adjectives, 6 * language.verbs, language.adverbs)
    tense_s, preposition_s, determiner_s, noun_s, adjective_s, verb_s, adverb_s = starts_source
    tense_t, preposition_t, determiner_t, noun_t, adjective_t, verb_t, adverb_t = starts_target

    def phrase(case: int, depth: int) -> tuple[list[int], list[int], int, int]:
        noun, number, determiner = _zipf(language.nouns, rng), rng.randrange(2), rng.randrange(4)
        gender = _gender(noun)
        adjectives = [_zipf(language.adjectives, rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        source = [determiner_s + determiner, *(adjective_s + a for a in adjectives), noun_s + 2 * noun + number]
        target = [
            determiner_t + determiner * 12 + gender * 4 + number * 2 + case,
            noun_t + 4 * noun + number * 2 + case,
        ]
        # Of several adjectives the last comes first.
        target += [adjective_t + 6 * a + gender * 2 + number for a in reversed(adjectives)]
        if depth and rng.random() < 0.35:
            preposition = rng.randrange(4)
            inner_source, inner_target, *_ = phrase(1, depth - 1)
            source += [preposition_s + preposition, *inner_source]
            target += [*inner_target, preposition_t + preposition]  # postpositions
        return source, target, gender, number

    def clause() -> tuple[list[int], list[int]]:
        subject_s, subject_t, _, number = phrase(0, 1)
        object_s, object_t, gender, _ = phrase(1, 1)
        verb, tense = _zipf(language.verbs, rng), rng.randrange(3)
        adverb = _zipf(language.adverbs, rng) if rng.random() < 0.4 else None
        spoken = [] if adverb is None else [adverb_s + adverb]
        told = [] if adverb is None else [adverb_t + adverb]
        source = [tense_s + tense, *subject_s, verb_s + verb, *object_s, *spoken]
        target = [*subject_t, *told, *object_t, verb_t + 6 * verb + gender * 2 + number, tense_t + tense]
        return source, target

    while True:
        source, target = clause()
        if rng.random() < 0.4:
            more_source, more_target = clause()
            source, target = source + more_source, target + more_target
        if max(len(source), len(target)) < LENGTH:
            return source, target


def _starts(*sizes: int) -> list[int]:
    """The first token of every kind of words, after the three marks."""
    return [3 + sum(sizes[:i]) for i in range(len(sizes))]


def _zipf(count: int, rng: random.Random) -> int:
    """A rank below `count`; its probability falls about as 1 / (rank + 4)."""
    return min(count - 1, int(4 * ((count + 4) / 4) ** rng.random()) - 4)


def _gender(noun: int) -> int:
    """One of three genders, which must be learned for each noun."""
    return noun * 7919 % 31 % 3


def data(language: Language, train: int, test: int, seed: int = 0) -> tuple[dict[str, np.ndarray], ...]:
    """Training and test sentences, as a function of the seed. No source sentence is there twice.

    Returns:
        Two times {'source': (n, 32) int32, 'target': (n, 33) int32}; sources end with the mark END, targets begin with
        BEGIN and end with END, both are filled up with PAD.
    """
    rng, seen = random.Random(seed), {}
    while len(seen) < train + test:
        source, target = sentence(language, rng)
        seen.setdefault(tuple(source), target)
    sources = np.full((train + test, LENGTH), PAD, np.int32)
    targets = np.full((train + test, LENGTH + 1), PAD, np.int32)
    for i, (source, target) in enumerate(seen.items()):
        sources[i, : len(source) + 1] = [*source, END]
        targets[i, : len(target) + 2] = [BEGIN, *target, END]
    return tuple({"source": sources[part], "target": targets[part]} for part in (slice(test, None), slice(test)))


class Attention(nn.Module):
    """Multi-head attention whose four projections are layers of their own, so that they are pruned apart."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
        """Queries of x (B, T, D), keys and values of y (B, S, D), mask as (B, heads, T, S) bool, to (B, T, D)."""
        d = x.shape[-1]

        def project(z: jax.Array, name: str) -> jax.Array:
            return nn.Dense(d, dtype=self.dtype, name=name)(z).reshape(*z.shape[:-1], self.heads, d // self.heads)

        query, key, value = project(x, "query"), project(y, "key"), project(y, "value")
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return nn.Dense(d, dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """A pre-norm Transformer layer, with attention to the encoder if there is one to attend to."""

    heads: int
    mlp: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Maps x (B, T, D) to the same shape."""

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(dtype=self.dtype, name=name)

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        y = norm("attn_norm")(x)
        x = x + drop(Attention(self.heads, self.dtype, name="attn")(y, y, mask))
        if encoded is not None and encoded_mask is not None:
            y = norm("cross_norm")(x)
            x = x + drop(Attention(self.heads, self.dtype, name="cross")(y, encoded, encoded_mask))
        y = nn.relu(nn.Dense(self.mlp, dtype=self.dtype, name="up")(norm("mlp_norm")(x)))
        return x + drop(nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(y))


class Translator(nn.Module):
    """An encoder-decoder Transformer.

    Attributes:
        source_size: source tokens.
        target_size: target tokens.
        d_model: width.
        layers: of the encoder, and of the decoder.
        heads: attention heads.
        mlp: width between the layers of an MLP.
        dropout: rate on every residual branch, when training.
        dtype: of activations and products; parameters are float32.
    """

    source_size: int
    target_size: int
    d_model: int = 256
    layers: int = 2
    heads: int = 4
    mlp: int = 256
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the parts that `encode` and `decode` share their names with."""
        settings = (self.heads, self.mlp, self.dropout, self.dtype)
        init = nn.initializers.normal(0.02)
        self.source = nn.Embed(self.source_size, self.d_model, embedding_init=init, dtype=self.dtype)
        self.target = nn.Embed(self.target_size, self.d_model, embedding_init=init, dtype=self.dtype)
        self.source_position = self.param("source_position", init, (LENGTH, self.d_model))
        self.target_position = self.param("target_position", init, (LENGTH, self.d_model))
        self.encoder = [Layer(*settings) for _ in range(self.layers)]
        self.decoder = [Layer(*settings) for _ in range(self.layers)]
        self.encoder_norm = nn.LayerNorm(dtype=self.dtype)
        self.decoder_norm = nn.LayerNorm(dtype=self.dtype)
        self.head = nn.Dense(self.target_size, dtype=self.dtype)

    def encode(self, source: jax.Array, train: bool = False) -> jax.Array:
        """Maps source tokens (B, S) int32 to (B, S, d_model)."""
        x = self.source(source) + self.source_position[: source.shape[1]].astype(self.dtype)
        for layer in self.encoder:
            x = layer(x, (source != PAD)[:, None, None, :], train=train)
        return self.encoder_norm(x)

    def decode(self, encoded: jax.Array, source: jax.Array, target: jax.Array, train: bool = False) -> jax.Array:
        """Maps the encoder's output and target tokens (B, T) int32 to (B, T, target_size) float32 logits."""
        x = self.target(target) + self.target_position[: target.shape[1]].astype(self.dtype)
        causal = jnp.tril(jnp.ones((target.shape[1],) * 2, bool))[None, None]
        for layer in self.decoder:
            x = layer(x, causal, encoded, (source != PAD)[:, None, None, :], train=train)
        return self.head(self.decoder_norm(x)).astype(jnp.float32)

    def __call__(self, source: jax.Array, target: jax.Array, train: bool = False) -> jax.Array:
        """Logits (B, T, target_size) float32 of every next target token. With `train`, 'dropout' is drawn from."""
        return self.decode(self.encode(source, train), source, target, train)


def translate(apply: Any, source: jax.Array) -> jax.Array:
    """Greedy translation: source tokens (B, 32) int32 to target tokens (B, 32) int32 after BEGIN; PAD after END."""
    encoded = apply(source, method="encode")

    def step(i: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = apply(encoded, source, tokens[:, :-1], method="decode")
        following = jax.lax.dynamic_index_in_dim(logits, i, 1, keepdims=False).argmax(-1).astype(jnp.int32)
        last = jax.lax.dynamic_index_in_dim(tokens, i, 1, keepdims=False)
        following = jnp.where((last == END) | (last == PAD), PAD, following)
        return jax.lax.dynamic_update_slice_in_dim(tokens, following[:, None], i + 1, 1)

    begin = jnp.full((source.shape[0], LENGTH + 1), PAD, jnp.int32).at[:, 0].set(BEGIN)
    return jax.lax.fori_loop(0, LENGTH, step, begin)[:, 1:]


def bleu(found: np.ndarray, expected: np.ndarray) -> float:
    """BLEU by sacrebleu, 0 to 100, of token sentences (n, T) that END or PAD ends; a token is a word.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed; the text says how to install it.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'shfl-jax[accuracy]'", name=error.name) from error

    def written(tokens: np.ndarray) -> str:
        ends = np.flatnonzero((tokens == END) | (tokens == PAD))
        return " ".join(f"w{token}" for token in tokens[: ends[0] if len(ends) else None])

    hypotheses, references = ([written(tokens) for tokens in part] for part in (found, expected))
    return float(BLEU(tokenize="none", force=True).corpus_score(hypotheses, [references]).score)


def task(smoke: bool = False) -> Task:
    """The task; `smoke` makes a tiny one of it, to try the program."""
    language = Language(12, 6, 6, 4) if smoke else Language()
    train, test = data(language, 64, 8) if smoke else data(language, 30_000, 2_048)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" and not smoke else jnp.float32
    sizes = (32, 1, 2, 64, 0.0) if smoke else (256, 2, 4, 256, RECIPE.dropout)
    model = Translator(language.source_size, language.target_size, *sizes, dtype)

    def losses(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cross entropy of every token, and which tokens count."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, target), target != PAD

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        target = batch["target"]
        logits = model.apply({"params": params}, batch["source"], target[:, :-1], True, rngs={"dropout": key})
        each, real = losses(jnp.asarray(logits), target[:, 1:])
        return jnp.sum(each * real) / real.sum()

    def evaluate(apply: Any, batch: Any) -> dict[str, jax.Array]:
        target = batch["target"]
        logits = apply(batch["source"], target[:, :-1])
        each, real = losses(logits, target[:, 1:])
        right = (logits.argmax(-1) == target[:, 1:]) & real
        return {
            "token_accuracy": right.sum() / real.sum(),
            "loss": jnp.sum(each * real) / real.sum(),
            "translation": translate(apply, batch["source"]),
        }

    def finish(found: Any) -> dict[str, float]:
        numbers = {name: float(value) for name, value in found.items() if name != "translation"}
        return {**numbers, "bleu": bleu(found["translation"], test["target"][:, 1:])}

    return Task(
        name="translation",
        measure="token_accuracy",
        higher=True,
        model=model,
        example=(jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros((1, LENGTH), jnp.int32)),
        pruned=r"(encoder|decoder)_\d/.*",
        recipe=Recipe(4, 4, 4, 2, 1e-3) if smoke else RECIPE,
        train=train,
        test=test,
        test_batch=8 if smoke else 256,
        draw=draw_examples,
        loss=loss,
        evaluate=evaluate,
        finish=finish,
    )
