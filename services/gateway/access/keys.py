"""API keys: a file of their hashes, each with its own limits.

The file is a YAML list, one entry per key, as `winnow key NAME` writes it:

    - name: research
      sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
      requests_per_minute: 600
      tokens_per_minute: 200000

It is reread when it changes, so keys can be added and removed without a restart. A key is 32 random
bytes, so its hash needs no salt and no slow hash function.
"""

import hashlib
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from winnow.errors import InvalidKey, InvalidSetting

logger = logging.getLogger(__name__)

_PREFIX = "wk-"
_LOOK_AGAIN_S = 1.0


class ApiKey(BaseModel):
    """One entry. Limits apply to a sliding minute; None means no limit.

    tokens_per_minute counts prompt tokens plus the most that answers may have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)


# Tracebacks must not show the file's contents: they may be a key.
_ENTRIES = TypeAdapter(list[ApiKey], config=ConfigDict(hide_input_in_errors=True))


@dataclass(frozen=True, slots=True)
class _Version:
    """Identifies a version of the file, to detect changes."""

    changed_ns: int
    size: int


def new_key(
    name: str, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
) -> tuple[str, ApiKey]:
    """A new key, shown only once, and its entry.  Raises InvalidSetting."""
    key = _PREFIX + secrets.token_urlsafe(32)
    try:
        return key, ApiKey(
            name=name,
            sha256=_hash(key),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidSetting(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from error


def entry_text(entry: ApiKey) -> str:
    """The entry as YAML for the file."""
    return str(yaml.safe_dump([entry.model_dump(exclude_none=True)], sort_keys=False))


class ApiKeys:
    """The keys in a file.  Raises InvalidSetting if it cannot be used at startup."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = self._look()
        self._keys = _read(path)
        self._looked_s = time.monotonic()

    def require(self, authorization: str | None) -> ApiKey:
        """The key in an Authorization header.  Raises InvalidKey."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise InvalidKey("no API key: send it as `Authorization: Bearer KEY`")
        self._refresh()
        found = self._keys.get(_hash(key.strip()))
        if found is None:
            raise InvalidKey("the API key is not valid")
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked_s < _LOOK_AGAIN_S:
            return
        self._looked_s = now
        try:
            version = self._look()
            if version != self._version:
                self._keys, self._version = _read(self._path), version
                logger.info("%d API keys were read from %s", len(self._keys), self._path)
        except InvalidSetting as error:
            logger.error("%s; the keys from before stay", error)

    def _look(self) -> _Version:
        try:
            status = self._path.stat()
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return _Version(status.st_mtime_ns, status.st_size)


def _read(path: Path) -> dict[str, ApiKey]:
    """Keys by hash."""
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text()) or [])
    except OSError as error:
        raise _unreadable(path, error) from error
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InvalidSetting(f"api_keys_file {path} is not YAML") from None  # it quotes the line
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidSetting(f"api_keys_file {path}: {where}: {first['msg']}") from error
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidSetting(f"api_keys_file {path} has two keys named {twice}")
    return {entry.sha256: entry for entry in entries}


def _unreadable(path: Path, error: OSError) -> InvalidSetting:
    return InvalidSetting(f"api_keys_file {path} cannot be read: {error.strerror}")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
