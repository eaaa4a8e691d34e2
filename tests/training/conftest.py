"""What the tests of training read: a toy corpus, a teacher, and students of it."""

import shutil

import pytest

from tests.support import updates


@pytest.fixture(scope="session")
def folder(root, tmp_path_factory):
    """`root` with students beside its teacher (updates.write_students); a test may read it and must not change it."""
    copy = shutil.copytree(root, tmp_path_factory.mktemp("students"), dirs_exist_ok=True)
    updates.write_students(copy)
    return copy
