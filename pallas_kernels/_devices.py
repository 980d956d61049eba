"""Which GPU is lowered for, and what it can do."""

import functools
import importlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HOPPER = ("H100", "H20", "H800")  # what the names of these GPUs hold: GH200 and H200 too
MULTIPROCESSORS = 132  # of an H100 and an H200


class GPU(NamedTuple):
    """A kind of GPU.

    Attributes:
        kind: as `jax.Device.device_kind`.
        multiprocessors: how many it has; None where JAX does not know.
    """

    kind: str
    multiprocessors: int | None = MULTIPROCESSORS

    @property
    def is_hopper(self) -> bool:
        """Whether it has Hopper's warpgroup matrix instructions, and JAX knows its multiprocessors."""
        return self.multiprocessors is not None and any(name in self.kind for name in HOPPER)

    @property
    def runs_triton(self) -> bool:
        """Whether Pallas-Triton knows this kind; for others it raises RuntimeError when lowering."""
        return _runs_triton(self.kind)


def gpu() -> GPU | None:
    """The GPU that is lowered for: that of the abstract mesh, else the first of this process; None without one."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return GPU(abstract.device_kind, abstract.num_cores)
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return GPU(device.device_kind, device.core_count)


@functools.cache
def missing_module(name: str) -> str:
    """Why a module of this version of JAX cannot be imported; "" where it can."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return ""


@functools.cache
def _runs_triton(kind: str) -> bool:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    device = jax.sharding.AbstractDevice(kind, 1, "gpu")
    kernel = pl.pallas_call(_copy, jax.ShapeDtypeStruct((16,), jnp.float32), compiler_params=plgpu.CompilerParams())
    mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    with mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the backend is deprecated is said where it is used
        traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((16,), jnp.float32))
        try:
            traced.lower(lowering_platforms=("cuda",))
        except RuntimeError:
            return False
    return True


def _copy(x_ref: Any, y_ref: Any) -> None:
    y_ref[...] = x_ref[...]
