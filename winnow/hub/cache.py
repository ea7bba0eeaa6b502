"""The hub's models that lie on this machine, in the cache of huggingface_hub."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout
from huggingface_hub import constants
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from winnow.errors import UnusableModel
from winnow.hub.choice import is_gguf_model, weights
from winnow.hub.reference import HubModel

logger = logging.getLogger(__name__)

_LOCK_TRY_S = 0.5


def cache_folder() -> Path:
    """Of all models, from HF_HUB_CACHE or HF_HOME."""
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def is_commit(revision: str) -> bool:
    return REGEX_COMMIT_HASH.fullmatch(revision) is not None


class CachedModel:
    """What the cache has of a model."""

    def __init__(self, model: HubModel) -> None:
        self.model = model
        self._name = repo_folder_name(repo_id=model.repository, repo_type="model")
        self.folder = cache_folder() / self._name

    def commit(self) -> str | None:
        """What the revision was when it was fetched last."""
        if is_commit(self.model.revision):
            return self.model.revision
        return self._ref.read_text().strip() if self._ref.is_file() else None

    def remember(self, commit: str) -> None:
        """Note what the revision is, for `commit`; a cache that cannot be written is left alone."""
        if self.commit() == commit:
            return
        new = self._ref.with_name(f"{self._ref.name}.{os.getpid()}")
        try:
            self._ref.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(commit)
            new.replace(self._ref)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._ref, error.strerror)

    @property
    def _ref(self) -> Path:
        return self.folder / "refs" / self.model.revision

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def missing(self, commit: str, names: Iterable[str]) -> list[str]:
        return [name for name in names if not (self.snapshot(commit) / name).is_file()]

    def require_whole(self, commit: str) -> Path:
        """The folder or file to load.  Raises UnusableModel if files are missing."""
        folder = self.snapshot(commit)
        names = [path.relative_to(folder).as_posix() for path in _files(folder)]
        if not names:
            raise UnusableModel(f"model {self.model} is not in {cache_folder()}")
        is_gguf = is_gguf_model(self.model, names)
        if not is_gguf and "config.json" not in names:
            raise UnusableModel(f"model {self.model} in {folder} has no config.json")
        chosen = weights(self.model, names, folder)
        return folder / chosen[0] if is_gguf else folder

    def blob(self, etag: str) -> Path:
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """Where a file grows until it is whole."""
        return self.folder / "blobs" / f"{etag}.partial"

    def present_bytes(self, etag: str) -> int:
        """Of a file that earlier tries, or other commits, have brought."""
        found = next(
            (path for path in (self.blob(etag), self.partial(etag)) if path.is_file()), None
        )
        return 0 if found is None else found.stat().st_size

    @property
    def lock_file(self) -> Path:
        return cache_folder() / ".locks" / self._name / "model.lock"

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether it is this process's turn to fetch; none else fetches the model then.

        Raises OSError if the cache cannot be written.
        """
        self.lock_file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(WeakFileLock(self.lock_file, timeout=_LOCK_TRY_S))
            except Timeout:
                yield False
            else:
                yield True


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
