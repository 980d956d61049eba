"""A small GPT in Flax Linen, written without regard to sparsity."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


class Attention(nn.Module):
    """Causal multi-head self-attention; query, key and value are layers of their own, so that they are pruned apart."""

    heads: int
    dtype: DTypeLike
    out_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., tokens, d_model) to the same shape."""
        d = x.shape[-1]

        def dense(name: str, std: float = 0.02) -> nn.Dense:
            return nn.Dense(d, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name)

        heads = (*x.shape[:-1], self.heads, d // self.heads)
        query, key, value = (dense(name)(x).reshape(heads) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return dense("out", self.out_std)(mixed.reshape(x.shape))


class MLP(nn.Module):
    """Two layers with GELU between them."""

    width: int
    dtype: DTypeLike
    out_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., d_model) to the same shape."""
        up = nn.Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name="up")
        init = nn.initializers.normal(self.out_std)
        down = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="down")
        return down(nn.gelu(up(x)))


class Block(nn.Module):
    """A pre-norm Transformer block."""

    heads: int
    mlp: int
    dropout: float
    dtype: DTypeLike
    out_std: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps (..., tokens, d_model) to the same shape."""
        for name, layer in (
            ("attn", Attention(self.heads, self.dtype, self.out_std, name="attn")),
            ("mlp", MLP(self.mlp, self.dtype, self.out_std, name="mlp")),
        ):
            y = layer(nn.LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x))
            x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        return x


class GPT(nn.Module):
    """A decoder-only Transformer over characters.

    Attributes:
        vocab: characters.
        context: the longest input.
        d_model: width.
        layers: blocks.
        heads: attention heads; they divide `d_model`.
        mlp: width between the layers of an MLP.
        dropout: rate on every residual branch, when training.
        dtype: of activations and products; parameters are float32.
    """

    vocab: int
    context: int = 128
    d_model: int = 256
    layers: int = 2
    heads: int = 4
    mlp: int = 1024
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Maps (batch, tokens) int32 to (batch, tokens, vocab) float32 logits of the next characters.

        With `train`, dropout draws from the rng 'dropout'.
        """
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab, self.d_model, embedding_init=init, dtype=self.dtype, name="embed")
        position = self.param("position", init, (self.context, self.d_model))
        x = embed(tokens) + position[: tokens.shape[-1]].astype(self.dtype)
        out_std = 0.02 / (2 * self.layers) ** 0.5
        for i in range(self.layers):
            block = Block(self.heads, self.mlp, self.dropout, self.dtype, out_std, name=f"block_{i}")
            x = block(x, train)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.vocab, dtype=self.dtype, kernel_init=init, name="head")(x).astype(jnp.float32)
