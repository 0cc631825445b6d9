"""What several test files share: the servers, one of each for the whole run, and one thread for PyTorch."""

import functools
import os
import secrets
import zipfile

# Before PyTorch is there; kernels inherit it. More threads change the order of sums, and so the last bits; and where tests
# run on every core, threads that wait for each other take several times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import botocore.loaders  # noqa: E402
import botocore.session  # noqa: E402
import pytest  # noqa: E402

from helpers import storage  # noqa: E402
from servers import ceph, moto  # noqa: E402
from servers.embedded import cleaned, connected  # noqa: E402


# What AWS offers is read from its large files once, not at each connection, where it takes 0.2 s of the processor.
botocore.session.create_loader = functools.cache(botocore.loaders.create_loader)

# First, so that none is left for the end.
LONGEST = "notebooks notebooks_models training_exact processes rent storage bot run convert".split()


def pytest_collection_modifyitems(items):
    order = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


@pytest.fixture
def clean_environment():
    """No setting of the person who runs the tests gets in, none of a test gets out."""
    with cleaned():
        yield


@pytest.fixture(scope="session")
def moto_env(tmp_path_factory):
    """The environment variables of a running moto."""
    with moto.moto(tmp_path_factory.mktemp("moto")) as env:
        yield env


@pytest.fixture(scope="session")
def ceph_env(tmp_path_factory):
    """The environment variables of a running Ceph Object Gateway."""
    if ceph.missing():
        pytest.skip(f"Ceph is not installed here, .ci/run does it; missing: {', '.join(ceph.missing())}")
    with ceph.ceph(tmp_path_factory.mktemp("ceph")) as env:
        yield env


@pytest.fixture(scope="module")
def embedded_env(tmp_path_factory):
    """The environment variables of a running embedded server."""
    return storage.serve(tmp_path_factory.mktemp("s3"))


@pytest.fixture
def embedded(embedded_env):
    """The same, and this process connected to it."""
    with connected(embedded_env):
        yield embedded_env


@pytest.fixture
def bucket():
    """The name of a bucket that is not there yet."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def every(tmp_path_factory):
    """every(n): a zip of every n-th of the leaves."""

    @functools.cache
    def make(n):
        path = tmp_path_factory.mktemp("zip") / "some_leaves.zip"
        leaves = zipfile.ZipFile(storage.REPOSITORY / "data_samples/leaves.zip")
        with leaves, zipfile.ZipFile(path, "w") as some:
            for info in leaves.infolist()[::n]:
                some.writestr(info, leaves.read(info))  # with its date: the same bytes again
        return str(path)

    return make
