"""The servers that several test files share: one of each for the whole run."""

import pytest

from servers import ceph, moto


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
