"""What several test files share: the servers, one of each for the whole run, and a single thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is there; kernels inherit it: the tests run on as many
# processes as there are cores, and threads that wait for each other on a core take several times as long

import pytest  # noqa: E402
import torch  # noqa: E402

from servers import ceph, moto  # noqa: E402


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")  # the longest file first, beside all others


@pytest.fixture(scope="session")
def moto_env(tmp_path_factory):
    """The environment variables of a running moto."""
    with moto.moto(tmp_path_factory.mktemp("moto")) as env:
        yield env


@pytest.fixture(scope="session")
def ceph_env(tmp_path_factory):
    """The environment variables of a running Ceph Object Gateway."""
    if ceph.missing():
        pytest.skip(f"Ceph is not installed here, missing: {', '.join(ceph.missing())}")
    with ceph.ceph(tmp_path_factory.mktemp("ceph")) as env:
        yield env


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread: more change the order of sums, and so the last bits, and wait long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
