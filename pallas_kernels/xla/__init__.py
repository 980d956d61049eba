"""The products in plain XLA: every platform, every dtype, every derivative."""

__all__: list[str] = []
