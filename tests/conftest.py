"""Shared fixtures: pools of real ranks that stay alive for a session of tests, and prepared data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Helpers of the tests, importable here and in the ranks.
sys.path.insert(0, str(Path(__file__).parent))
# One set of threads per rank, and nothing looked up on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from support.ranks import RankPool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two processes in a gloo world, alive for the session: starting them costs more than most tests."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """One process in a world of its own, for what must not share state with pytest's."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    """Four processes in a gloo world; for a module only, since they take two gigabytes."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder in which the embedded corpus `tiny` is prepared once."""
    from megagamma.data.preparation.prepare import embedded_settings, prepare

    cache = tmp_path_factory.mktemp("data")
    prepare(embedded_settings("tiny", str(cache)))
    return str(cache)


@pytest.fixture(scope="session")
def root() -> Path:
    """The source tree."""
    return ROOT
