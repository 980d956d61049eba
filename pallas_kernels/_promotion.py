"""How dtypes and ranks are promoted inside this package."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Promotion of dtypes and ranks as this package is written for, whatever the user's settings are."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
