"""The pairs of 2:4: for each value the slot of its four that it belongs to, two bits each, packed along the values."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


def pack(pairs: Array) -> Array:
    """Packs (..., Q, V) integers in 0..3 into (..., ceil(Q / 4), V) uint8, the first in the lowest bits.

    Here and below NumPy arrays give NumPy arrays.
    """
    lib: Any = np if isinstance(pairs, np.ndarray) else jnp
    *batch, q, v = pairs.shape
    padded = lib.pad(pairs.astype(np.uint8), [(0, 0)] * len(batch) + [(0, -q % 4), (0, 0)])
    quads = padded.reshape(*batch, -(-q // 4), 4, v)
    return quads[..., 0, :] | quads[..., 1, :] << 2 | quads[..., 2, :] << 4 | quads[..., 3, :] << 6


def pack_bits(flags: Array) -> Array:
    """Packs (..., Q, V) booleans into (..., ceil(Q / 8), V) uint8, the first in the lowest bit."""
    lib: Any = np if isinstance(flags, np.ndarray) else jnp
    return lib.packbits(flags, axis=-2, bitorder="little")


def unpack_bits(packed: Array, q: int) -> Array:
    """Undoes `pack_bits`: the first q flags, (..., q, V) uint8 of 0 and 1."""
    lib: Any = np if isinstance(packed, np.ndarray) else jnp
    return lib.unpackbits(packed, axis=-2, count=q, bitorder="little")


def unpack(packed: Array, q: int) -> Array:
    """Undoes `pack`, whether of bytes or `wide_pairs`: the first q pairs, (..., q, V) uint8."""
    shifts = np.arange(0, 8 * packed.dtype.itemsize, 2).astype(packed.dtype)
    shifts = shifts.reshape((1,) * (packed.ndim - 1) + (-1, 1))
    pairs: Any = (packed[..., None, :] >> shifts & packed.dtype.type(3)).astype(np.uint8)
    return pairs.reshape(*packed.shape[:-2], -1, packed.shape[-1])[..., :q, :]


def wide_pairs(packed: Array) -> Array:
    """Joins every two bytes (..., B, V) to a uint16, (..., ceil(B / 2), V), the first in the lower bits.

    What is wide already stays. Kernels read them in the shape of the values: a word holds the pairs of
    four fours.
    """
    if packed.dtype == np.uint16:
        return packed
    lib: Any = np if isinstance(packed, np.ndarray) else jnp
    *batch, b, v = packed.shape
    padded = lib.pad(packed, [(0, 0)] * len(batch) + [(0, b % 2), (0, 0)]).astype(np.uint16)
    halves = padded.reshape(*batch, -1, 2, v)
    return halves[..., 0, :] | halves[..., 1, :] << 8
