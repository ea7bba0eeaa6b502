import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.common.cores import SharedCores, open_shared_cores
from services.common.settings import Settings
from tests.deadlines import SOON_S
from tests.services.common.prefill_process import prefill_process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cores"


@pytest.fixture
def cores(folder: Path) -> Iterator[SharedCores]:
    cores = SharedCores(folder)
    yield cores
    cores.close()


def wait_until_idle(cores: SharedCores) -> None:
    deadline = time.monotonic() + SOON_S
    while cores.prefill_runs:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_prompt_is_seen_while_it_is_computed(cores: SharedCores, folder: Path) -> None:
    prefill = SharedCores(folder)
    assert not cores.prefill_runs
    for _ in range(2):
        with prefill.prefilling():
            assert cores.prefill_runs
        assert not cores.prefill_runs
    prefill.close()


def test_who_comes_while_a_prompt_is_computed_sees_it(cores: SharedCores, folder: Path) -> None:
    with cores.prefilling():
        late = SharedCores(folder)
        assert late.prefill_runs
    assert not late.prefill_runs
    late.close()


def test_of_several_prefill_workers_the_last_one_counts(cores: SharedCores, folder: Path) -> None:
    first, second = SharedCores(folder), SharedCores(folder)
    with first.prefilling():
        with second.prefilling():
            pass
        assert cores.prefill_runs
    assert not cores.prefill_runs
    first.close()
    second.close()


def test_an_error_ends_it_too(cores: SharedCores) -> None:
    with pytest.raises(ZeroDivisionError), cores.prefilling():
        raise ZeroDivisionError
    assert not cores.prefill_runs


def test_a_killed_prefill_worker_holds_nothing(cores: SharedCores, folder: Path) -> None:
    with prefill_process(folder) as process:
        assert cores.prefill_runs
        process.kill()
        wait_until_idle(cores)


def test_a_stopped_prefill_worker_is_taken_for_one_that_computes(
    cores: SharedCores, folder: Path
) -> None:
    with prefill_process(folder) as process:
        process.send_signal(signal.SIGSTOP)
        assert cores.prefill_runs


def test_who_runs_on_other_cores_sees_nothing(
    cores: SharedCores, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 8, 9})
    elsewhere = SharedCores(folder)
    with cores.prefilling():
        assert not elsewhere.prefill_runs
    with elsewhere.prefilling():
        assert not cores.prefill_runs
    elsewhere.close()


def test_a_pipe_that_somebody_deletes_still_leads_from_one_to_the_other(
    cores: SharedCores, folder: Path
) -> None:
    prefill = SharedCores(folder)
    for pipe in folder.iterdir():
        pipe.unlink()
    with prefill.prefilling():
        assert cores.prefill_runs
    assert not cores.prefill_runs
    prefill.close()


def test_nothing_of_somebody_elses_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SharedCores(folder).close()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(PermissionError):
        SharedCores(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError):
        SharedCores(folder)


def test_something_else_in_its_place_is_not_used(cores: SharedCores, folder: Path) -> None:
    (pipe,) = folder.iterdir()
    pipe.unlink()
    pipe.write_text("")
    with pytest.raises(PermissionError):
        SharedCores(folder)


def test_leaves_no_file_open(folder: Path) -> None:
    before = psutil.Process().num_fds()
    cores = SharedCores(folder)
    with cores.prefilling():
        pass
    cores.close()
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("settings", [Settings(device="cuda"), Settings(decode_share=1)])
def test_a_gpu_and_a_whole_share_need_none(settings: Settings) -> None:
    assert open_shared_cores(settings) is None


def test_without_a_folder_they_compete_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert open_shared_cores(Settings(cores_dir=tmp_path / "file" / "cores")) is None
    assert "will compete for the cores" in caplog.text


def test_workers_find_each_other_without_being_told_where() -> None:
    prefill, decode = open_shared_cores(Settings()), open_shared_cores(Settings())
    assert prefill is not None and decode is not None
    with prefill.prefilling():
        assert decode.prefill_runs
    prefill.close()
    decode.close()
