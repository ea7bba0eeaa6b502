"""How users name a model of the hub."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from winnow.errors import UnusableModel
from winnow.gguf import SUFFIX

DEFAULT_REVISION = "main"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUFFIXES = re.compile(r"(?=[@:])")


@dataclass(frozen=True, slots=True)
class HubModel:
    """`org/name`, `org/name/file.gguf` or `org/name:quantization`, each with `@revision` behind it.

    revision: a branch, a tag or a commit.
    file: a path in the repository.
    quantization: as in the file's name, like Q4_K_M.
    """

    repository: str
    revision: str = DEFAULT_REVISION
    file: str | None = None
    quantization: str | None = None

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        quantization = f":{self.quantization}" if self.quantization else ""
        return f"{self.repository}{file}{quantization}@{self.revision}"

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is named."""
        return self.file is not None or self.quantization is not None


def parse(text: str) -> HubModel | None:
    """None if it does not look like one of the hub; raises UnusableModel for a half-right one."""
    base, *suffixes = _SUFFIXES.split(text)
    owner, _, rest = base.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{owner}/{name}"
    if not _REPOSITORY.fullmatch(repository) or (file and not file.endswith(SUFFIX)):
        return None
    found = {suffix[0]: suffix[1:] for suffix in suffixes}
    if len(found) < len(suffixes) or not all(found.values()) or (file and ":" in found):
        raise UnusableModel(
            f"model {text} is no name of a hub's model: that is org/name, then @revision if any; "
            f"of GGUF files org/name/file{SUFFIX} or org/name:quantization"
        )
    return HubModel(
        repository,
        found.get("@", DEFAULT_REVISION),
        file or None,
        found.get(":"),
    )


def short_name(model: str) -> str:
    """A folder's or file's name, or a repository's without its owner; without `.gguf`."""
    hub_model = parse(model)
    path = hub_model.file or hub_model.repository if hub_model else model
    return PurePosixPath(path).name.removesuffix(SUFFIX)
