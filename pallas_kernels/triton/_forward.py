"""The forward product as a Pallas-Triton kernel.

A step of a program reads `block_k` column ids, gathers those rows of the feature-major activations and multiplies.
docs/kernels.md tells why the kernel looks as it does.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._layout import Prepared
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import load_tile


class Operands(NamedTuple):
    """What the kernel reads: arrays, or references to them."""

    values: Any
    columns: Any
    x: Any


def forward(
    matrix: Prepared, x: jax.Array, bias: jax.Array | None, *, activation: str | None, precision: lax.PrecisionLike,
    config: Config,
) -> jax.Array:  # fmt: skip
    """Computes activation(W x + bias), feature-major: (K, N) to (M, N)."""

    def walk(tile: _product.Tile, refs: Operands) -> Any:
        def load_columns(step: Any) -> jax.Array:
            slots, live = tile.slots(step)
            return refs.columns[slots] if live is None else plgpu.load(refs.columns.at[slots], mask=live, other=0)

        def gather(columns: jax.Array, live: jax.Array | None) -> jax.Array:
            return load_tile(refs.x, columns, tile.tokens, live, tile.live_tokens)

        return load_columns, _product.product(tile, refs.values, gather, flip=config.flip, precision=precision)

    operands = Operands(matrix.values, matrix.layout.columns, x)
    return _product.forward(
        walk, matrix.layout, operands, bias, x.shape[1], dtype=x.dtype, activation=activation, config=config,
        name="row_grouped_matmul",
    )  # fmt: skip
