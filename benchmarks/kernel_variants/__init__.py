"""The study of the Triton kernels; see `__main__`."""
