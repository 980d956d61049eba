"""What tests of products and convolutions on a GPU ask for: they are skipped without one."""

import jax
import pytest

from pallas_kernels._devices import HOPPER


@pytest.fixture
def gpu() -> str:
    """The kind of the GPU."""
    try:
        return jax.devices("cuda")[0].device_kind
    except RuntimeError:
        pytest.skip("needs a CUDA device")


@pytest.fixture
def on_hopper(gpu: str) -> None:
    """A GPU with the Mosaic backend's instructions."""
    if not any(name in gpu for name in HOPPER):
        pytest.skip("needs a Hopper GPU")
