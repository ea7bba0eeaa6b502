"""From a model's name on the hub to the folder or file that holds it on this machine."""

import errno
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RevisionNotFoundError

from winnow.errors import UnusableModel
from winnow.hub.cache import CachedModel, cache_folder, is_commit
from winnow.hub.choice import small_files, weights
from winnow.hub.download import STALLED_S, Pause, RemoteFile, fetch_files, in_background
from winnow.hub.errors import refusal
from winnow.hub.progress import OnProgress, Progress, in_units
from winnow.hub.reference import HubModel

logger = logging.getLogger(__name__)

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """path: a folder, or a GGUF file.  commit: what `model.revision` stands for."""

    model: HubModel
    commit: str
    path: Path

    @property
    def pinned(self) -> HubModel:
        return replace(self.model, revision=self.commit)


def local_model(
    model: HubModel, *, pause: Pause = time.sleep, on_progress: OnProgress | None = None
) -> LocalModel:
    """The model on this machine, fetched unless it is there.

    The hub is asked what a branch or tag is now; where it cannot be asked, what lies in the cache
    is taken, with a warning.
    pause: called while files come, and may raise to end that.
    Raises UnusableModel with the reason.
    """
    try:
        found = _local_model(CachedModel(model), pause, on_progress)
    except Exception as error:
        raise refusal(model, error) from error
    logger.info("model %s is commit %s, in %s", model, found.commit, found.path)
    return found


def _local_model(cached: CachedModel, pause: Pause, on_progress: OnProgress | None) -> LocalModel:
    model, offline = cached.model, constants.is_offline_mode()
    if offline or is_commit(model.revision):
        try:
            return _in_cache(cached)
        except UnusableModel as reason:
            if offline:
                raise UnusableModel(f"{reason}, and HF_HUB_OFFLINE forbids to fetch it") from None
    try:
        commit, files = in_background(lambda: _listing(model), pause)
    except RevisionNotFoundError:
        raise
    except Exception as error:  # a model that is here is used whatever the hub says
        return _instead(cached, error)
    try:
        _fetch_missing(cached, commit, files, pause, on_progress)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        return _instead(cached, error)
    cached.remember(commit)
    return LocalModel(model, commit, cached.require_whole(commit))


def _in_cache(cached: CachedModel) -> LocalModel:
    """Raises UnusableModel if it is not there, or not whole."""
    commit = cached.commit()
    if commit is None:
        raise UnusableModel(f"model {cached.model} is not in {cache_folder()}")
    return LocalModel(cached.model, commit, cached.require_whole(commit))


def _instead(cached: CachedModel, error: Exception) -> LocalModel:
    """What the cache had before; raises the error if that is nothing."""
    try:
        found = _in_cache(cached)
    except UnusableModel:
        raise error from None
    logger.warning("%s; commit %s of it is used", refusal(cached.model, error), found.commit)
    return found


def _listing(model: HubModel) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that the revision is, and its files by name."""
    info = HfApi(constants.ENDPOINT).model_info(
        model.repository,
        revision=model.revision,
        files_metadata=True,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    if info.sha is None or not info.siblings:
        raise UnusableModel(f"model {model} has no files on {constants.ENDPOINT}")
    files = {
        file.rfilename: RemoteFile(
            file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None
        )
        for file in info.siblings
    }
    return info.sha, files


def _fetch_missing(
    cached: CachedModel,
    commit: str,
    files: Mapping[str, RemoteFile],
    pause: Pause,
    on_progress: OnProgress | None,
) -> None:
    """Small files first: then a snapshot that has its weights is whole."""
    model, snapshot = cached.model, cached.snapshot(commit)
    small = small_files(model, files)

    def missing(names: Iterable[str]) -> list[RemoteFile]:
        return [files[name] for name in cached.missing(commit, names)]

    if not missing(small) and not missing(weights(model, files, snapshot)):
        return
    with _turn(cached, pause):
        if first := missing(small):
            size = sum(file.size for file in first)
            _require_space(model, size)
            fetch_files(cached, commit, first, Progress(str(model), size), pause)
        if rest := missing(weights(model, files, snapshot)):
            _fetch_weights(cached, commit, rest, pause, on_progress)


def _fetch_weights(
    cached: CachedModel,
    commit: str,
    files: Sequence[RemoteFile],
    pause: Pause,
    on_progress: OnProgress | None,
) -> None:
    total = sum(file.size for file in files)
    present = sum(cached.present_bytes(file.sha256) for file in files if file.sha256)
    _require_space(cached.model, total - present)
    logger.info(
        "fetching model %s at commit %s from %s into %s: %s in %d files, of which %s are there",
        *(cached.model, commit, constants.ENDPOINT, cache_folder()),
        *(in_units(total), len(files), in_units(present)),
    )
    progress = Progress(str(cached.model), total, present, on_progress, has_bar=True)
    fetch_files(cached, commit, files, progress, pause)
    logger.info("fetched %s", progress)


def _require_space(model: HubModel, num_bytes: int) -> None:
    free = shutil.disk_usage(cache_folder()).free
    if num_bytes > free:
        raise UnusableModel(
            f"model {model} needs {in_units(num_bytes)} more in {cache_folder()}, whose disk has "
            f"{in_units(free)} free; HF_HOME names another place"
        )


@contextmanager
def _turn(cached: CachedModel, pause: Pause) -> Iterator[None]:
    """Wait until no other process fetches the model.

    Raises UnusableModel if the one that does shows no sign of life.
    """
    last, last_s, has_told = 0, time.monotonic(), False
    while True:
        with cached.turn() as is_ours:
            if is_ours:
                yield
                return
        if not has_told:
            logger.info("another process fetches model %s; waiting for it", cached.model)
            has_told = True
        pause(0.0)
        if (now := cached.lock_file.stat().st_mtime_ns) != last:
            last, last_s = now, time.monotonic()
        if time.monotonic() - last_s > 2 * STALLED_S:
            raise UnusableModel(
                f"model {cached.model} is being fetched by another process, which has done nothing "
                f"for {2 * STALLED_S:g} s; if there is none, remove {cached.lock_file}"
            )
