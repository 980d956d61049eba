"""What the GPU backends share: the layout of a prepared matrix, and where a convolution's slots point."""

__all__: list[str] = []
