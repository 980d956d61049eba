"""The forward product as a Pallas-Triton kernel.

A step of a program reads `block_k` column ids, gathers those rows of the feature-major activations and multiplies.
docs/kernels.md tells why the kernel looks as it does.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _devices as devices
from pallas_kernels._matrix import RowGrouped
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton import _product
from pallas_kernels.triton._configs import Config
from pallas_kernels.triton._tiles import check, load_tile, pad_tokens, problem


def forward(
    matrix: RowGrouped, x: jax.Array, bias: jax.Array | None, *, activation: str | None, layout: str,
    precision: lax.PrecisionLike, config: Config | None = None,
) -> jax.Array:  # fmt: skip
    """Computes activation(W x + bias); see `matmul` for the arguments, here 2-D.

    Args:
        matrix: canonical or prepared.
        x: (N, K) token-major or (K, N) feature-major.
        bias: (M,) or None.
        activation: see `matmul`.
        layout: see `matmul`.
        precision: see `matmul`.
        config: None looks one up.

    Raises:
        NotImplementedError: a group size or dtype that the kernel does not support.
    """
    topology = matrix.topology
    check(topology, x.dtype)
    if layout == "token_major":
        x = x.T
    n = x.shape[1]
    if n == 0:
        y = jnp.zeros((topology.m, 0), x.dtype)
        return y.T if layout == "token_major" else y
    x = pad_tokens(x)
    if config is None:
        config = configs.config(problem("forward", topology, x), devices.kind())

    def walk(tile, values_ref, columns_ref, x_ref):
        def load_columns(step):
            slots, live = tile.slots(step)
            return columns_ref[slots] if live is None else plgpu.load(columns_ref.at[slots], mask=live, other=0)

        def gather(columns, live):
            return load_tile(x_ref, columns, tile.tokens, live, tile.live_tokens)

        return load_columns, _product.product(tile, values_ref, gather, flip=config.flip, precision=precision)

    operands = matrix.values, topology.columns, x
    y = _product.forward(
        walk, topology, operands, bias, x.shape[1], dtype=x.dtype, activation=activation, config=config,
        name="row_grouped_matmul",
    )[:, :n]  # fmt: skip
    return y.T if layout == "token_major" else y
