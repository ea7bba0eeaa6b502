"""Shared by all tests: few torch threads, tiny models on disk."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from tests.certificates import authority, tls_files  # noqa: F401 - fixtures
from tests.guarded_redis import guarded  # noqa: F401 - a fixture
from tests.side_by_side import SideBySide, in_order

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("winnow", deadline=None)  # a busy machine is slow now and then
settings.load_profile("winnow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `gpu` out where there is no GPU; put the others into their order."""
    gpu = {item for item in items if item.get_closest_marker("gpu")}
    if gpu and not torch.cuda.is_available():
        config.hook.pytest_deselected(items=list(gpu))
        items[:] = [item for item in items if item not in gpu]
    items[:] = in_order(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SideBySide:
    return SideBySide(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test is a failure on CI."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 model of each family, saved to disk: once for all workers of a run."""
    from tests.models_in_code import FAMILIES, save_tiny_model

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    paths = {family: shared / "models" / family for family in FAMILIES}
    with FileLock(shared / "models.lock"):
        for family, path in paths.items():
            if not path.exists():
                save_tiny_model(path, family)
    return paths
