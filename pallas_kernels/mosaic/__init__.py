"""The products as Pallas-Mosaic kernels for Hopper GPUs; what they lack is Triton's."""

__all__: list[str] = []
