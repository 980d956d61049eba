"""Availability checks for the Mosaic backend: GPU and JAX version."""

import importlib
from types import ModuleType

import jax.numpy as jnp

from pallas_kernels import _devices as devices
from pallas_kernels.triton import _tiles as triton_tiles

GROUP_SIZES = (64, 128, 256)


def kernel(name: str = "_forward") -> ModuleType:
    """A kernel's module, imported when it is needed: other versions of JAX may lack what it imports."""
    try:
        return importlib.import_module(f"pallas_kernels.mosaic.{name}")
    except ImportError as error:
        raise NotImplementedError(f"the Mosaic kernel needs another version of JAX: {error}") from error


def check(topology, dtype) -> None:
    """Raises NotImplementedError for what the kernels cannot do, whatever the tokens and the GPU."""
    triton_tiles.check(topology, dtype)
    if topology.group_size not in GROUP_SIZES:
        raise NotImplementedError(f"the Mosaic kernel needs groups of {GROUP_SIZES} rows, got {topology.group_size}")
    if jnp.dtype(dtype).itemsize != 2:
        raise NotImplementedError(f"the Mosaic kernel computes in bfloat16 and float16, got {jnp.dtype(dtype).name}")


def multiprocessors() -> int:
    """How many multiprocessors the Hopper GPU has that is lowered for.

    Raises:
        NotImplementedError: it is another GPU, or none.
    """
    gpu = devices.gpu()
    if gpu is None or not gpu.is_hopper:
        raise NotImplementedError(f"the Mosaic kernel needs a Hopper GPU{'' if gpu is None else f', got {gpu.kind}'}")
    assert gpu.multiprocessors is not None
    return gpu.multiprocessors
