"""What the tests of training read: a toy corpus, a teacher, and students of it. They compute in one thread."""

import shutil

import pytest
import torch

from tests.support import toy, updates


@pytest.fixture(scope="session")
def folder(root, tmp_path_factory):
    """`root` with students beside its teacher (updates.write_students); a test may read it and must not change it."""
    copy = shutil.copytree(root, tmp_path_factory.mktemp("students"), dirs_exist_ok=True)
    updates.write_students(copy)
    return copy


@pytest.fixture(scope="session")
def modern(tmp_path_factory):
    """The same of a ModernBERT that teaches ModernBERTs."""
    made = tmp_path_factory.mktemp("modern")
    toy.make_teacher(made / "teacher", toy.make_shards(made / "shards"), seed=1, **toy.MODERNBERT)
    updates.write_students(made)
    return made


@pytest.fixture(scope="session", params=["folder", "modern"])
def of_each(request):
    """`folder`, then `modern`: for what must hold of every computation that there is."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Toy sizes gain nothing from more, and on a busy machine threads wait for each other: ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
