"""What the GPU backends share: the layout of a prepared matrix, and where a convolution's slots point."""
