"""Which GPU is lowered for, and what it is known for."""

from typing import NamedTuple

import jax

HOPPER = ("H100", "H20", "H800")  # what the names of these GPUs hold: GH200 and H200 too


class GPU(NamedTuple):
    """A kind of GPU.

    Attributes:
        kind: as `jax.Device.device_kind`.
        multiprocessors: how many it has; None where JAX does not know.
    """

    kind: str
    multiprocessors: int | None

    @property
    def is_hopper(self) -> bool:
        """Whether it has Hopper's warpgroup matrix instructions, and JAX knows its multiprocessors."""
        return self.multiprocessors is not None and any(name in self.kind for name in HOPPER)


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


def kind() -> str | None:
    """The kind of the GPU that is lowered for, None without one."""
    found = gpu()
    return None if found is None else found.kind
