"""What the tests of the plan and of micro-batches read."""

import pytest

from fastdistil.data.shards import Shards


@pytest.fixture(scope="session")
def shards(root):
    """The toy corpus, opened; a test must not change it."""
    return Shards(root / "shards")
