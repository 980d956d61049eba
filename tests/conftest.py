"""What tests of several packages share."""

import pytest

from pallas_kernels._backend import BACKENDS


@pytest.fixture
def registry():
    """The backends; whatever a test registers is gone after it."""
    before = dict(BACKENDS)
    yield BACKENDS
    BACKENDS.clear()
    BACKENDS.update(before)
