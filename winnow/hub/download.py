"""Fetching files of the hub into its cache; what was broken off goes on where it ended."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from winnow.errors import UnusableModel
from winnow.hub.cache import CachedModel, cache_folder
from winnow.hub.progress import FileBar, Progress

STALLED_S = 180.0
_NUM_THREADS = 4
_POLL_S = 0.25
_READ_BYTES = 1 << 22
_T = TypeVar("_T")

Pause = Callable[[float], object]  # returns after so many seconds, or raises to end the download


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """sha256: of large files, which the hub keeps apart from its Git repository."""

    name: str
    size: int
    sha256: str | None


def fetch_files(
    cached: CachedModel,
    commit: str,
    files: Sequence[RemoteFile],
    progress: Progress,
    pause: Pause,
) -> None:
    """Return when the files are in the commit's snapshot.  Raises what a download raises.

    The threads are daemons, so that nothing waits for a connection that is silent.
    Raises UnusableModel if no byte comes for STALLED_S.
    """
    waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
    for file in files:
        waiting.put(file)
    errors: list[Exception] = []

    def work() -> None:
        try:
            while not errors:
                _fetch(cached, commit, waiting.get_nowait(), progress)
        except queue.Empty:
            return
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, name="download", daemon=True)
        for _ in range(min(_NUM_THREADS, len(files)))
    ]
    for thread in threads:
        thread.start()
    try:
        _wait(cached, threads, errors, progress, pause)
    finally:
        progress.cancel()
        progress.close()


def _wait(
    cached: CachedModel,
    threads: Sequence[threading.Thread],
    errors: Sequence[Exception],
    progress: Progress,
    pause: Pause,
) -> None:
    while any(thread.is_alive() for thread in threads) and not errors:
        pause(_POLL_S)
        cached.lock_file.touch()  # a sign of life to those who wait
        progress.show()
        if time.monotonic() - progress.last_change_s > STALLED_S:
            raise UnusableModel(
                f"model {cached.model}: no byte came from {constants.ENDPOINT} for {STALLED_S:g} "
                f"s; {progress} are in {cache_folder()}, and another try goes on from there"
            )
    if errors:
        raise errors[0]


def _fetch(cached: CachedModel, commit: str, file: RemoteFile, progress: Progress) -> None:
    """Bring a file into the cache, and link it into the snapshot."""
    repository = cached.model.repository
    if file.sha256 is not None and not cached.blob(file.sha256).exists():
        url = hf_hub_url(repository, file.name, revision=commit, endpoint=constants.ENDPOINT)
        metadata = get_hf_file_metadata(
            url, token=get_token(), endpoint=constants.ENDPOINT, retry_on_errors=True
        )
        if metadata.etag == file.sha256 and not _comes_by_xet(metadata):
            _resume(cached, url, file, progress)
    hf_hub_download(
        repository,
        file.name,
        revision=commit,
        cache_dir=cache_folder(),
        endpoint=constants.ENDPOINT,
        tqdm_class=cast(Any, FileBar(progress)),
    )


def _comes_by_xet(metadata: HfFileMetadata) -> bool:
    return metadata.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET


def _resume(cached: CachedModel, url: str, file: RemoteFile, progress: Progress) -> None:
    """Fetch the file from where an earlier try ended, by HTTP ranges.

    huggingface_hub by itself begins a file anew in each process.
    """
    assert file.sha256 is not None
    partial = cached.partial(file.sha256)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    with partial.open("ab") as stream:
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers(token=get_token()),
            expected_size=file.size,
            displayed_filename=file.name,
            tqdm_class=cast(Any, FileBar(progress)),
        )
    if _sha256(partial, progress) != file.sha256:
        partial.unlink()
        raise UnusableModel(
            f"{file.name} of model {cached.model} came damaged: its checksum is another one than "
            "the hub's; another try fetches it anew"
        )
    partial.replace(cached.blob(file.sha256))


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
            progress.add(0)
    return digest.hexdigest()


def in_background(task: Callable[[], _T], pause: Pause) -> _T:
    """What the task returns, or the error that it raises; it is left alone if `pause` raises."""
    done: queue.SimpleQueue[_T | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put(task())
        except Exception as error:
            done.put(error)

    thread = threading.Thread(target=work, name="hub", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.02)
        pause(0.0)
    if isinstance(result := done.get(), Exception):
        raise result
    return result
