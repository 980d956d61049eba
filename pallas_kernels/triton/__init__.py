"""The products as Pallas-Triton kernels for NVIDIA GPUs (on other platforms they are interpreted, slowly)."""

__all__: list[str] = []
