"""A real SLURM, started once for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import slurm
from support.slurm import Cluster


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes; skips where SLURM is not installed or cannot have them."""
    reason = slurm.why_not()
    if reason:
        pytest.skip(f"no SLURM for tests: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, all nodes idle before and after the test."""
    yield session_cluster
    session_cluster.clear()
