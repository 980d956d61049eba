"""What the Mosaic backend asks first: whether there is a Hopper GPU, and whether JAX has what its kernel imports."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.triton import _tiles as triton_tiles

GROUP_SIZES = (64, 128, 256)
HOPPER = ("H100", "H20", "H800")  # what the names of these GPUs hold: GH200 and H200 too


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
    """How many multiprocessors the Hopper GPU has that is lowered for; NotImplementedError for another or none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind, count = device.device_kind, device.num_cores
    else:
        try:
            gpu = jax.devices("cuda")[0]
        except RuntimeError as error:
            raise NotImplementedError("the Mosaic kernel needs a Hopper GPU") from error
        kind, count = gpu.device_kind, gpu.core_count
    if count is None or not any(name in kind for name in HOPPER):
        raise NotImplementedError(f"the Mosaic kernel needs a Hopper GPU, got {kind}")
    return count
