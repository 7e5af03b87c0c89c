"""Shared fixtures: pools of real ranks that stay alive for a session of tests, and prepared data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Helpers of the tests, importable here and in the ranks.
sys.path.insert(0, str(Path(__file__).parent))
# Nothing looked up on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Workers beside each other share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.ranks import RankPool

ROOT = Path(__file__).resolve().parent.parent
POOLS = {"two_ranks", "four_ranks"}
# Groups of several minutes: begun last, they would keep one worker busy while the others have nothing left.
LONG = ("slurm", "forked", "four ranks")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what runs on a pool of several processes, and say which tests share a worker of pytest-xdist.

    Those of a file do, whose fixtures are made once; and all that need four ranks, since starting those costs most.
    """
    fixtures = set(getattr(item, "fixturenames", ()))
    if POOLS & fixtures:
        item.add_marker(pytest.mark.ranks)
    if item.get_closest_marker("xdist_group") is None:
        own = str(item.path.relative_to(ROOT))
        item.add_marker(pytest.mark.xdist_group("four ranks" if "four_ranks" in fixtures else own))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put long groups first. Refuse to run where pytest-xdist cannot keep groups together: it would split them silently."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(next(item.iter_markers("xdist_group")).args[0], len(LONG)))
    if getattr(config.option, "loadgroup", False) and items and not items[0].nodeid.endswith(tuple(
        f"@{mark.args[0]}" for mark in items[0].iter_markers("xdist_group")
    )):  # fmt: skip
        raise pytest.UsageError(
            f"pytest {pytest.__version__}: pytest-xdist loses its groups: use pytest below 9.2, or -n 0"
        )


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


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four processes in a gloo world, alive for the session. They take two gigabytes, once a test asks for them."""
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
