"""How single settings are read and checked: the types of the fields of `Settings`."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field
from pydantic_settings import NoDecode

from winnow.adapters.ref import require_adapter_name
from winnow.errors import UnusableModel
from winnow.generation_defaults import FROM_MODEL, NONE
from winnow.hub.reference import parse
from winnow.pruning_settings import PruningSettings

MAX_PORT = 65535
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")
_T = TypeVar("_T")


def _absolute_model(model: str) -> str:
    """Make a folder's path absolute, because workers have other working directories."""
    if not model:
        raise ValueError("it names no model")
    try:
        if Path(model).exists():
            return str(Path(model).absolute())
        parse(model)
    except OSError:  # the name is too long; `describe_model` reports it
        return model
    except UnusableModel as error:
        raise ValueError(error.message) from error
    return model


def _absolute_generation_config(source: str) -> str:
    is_folder = source not in (FROM_MODEL, *NONE) and Path(source).is_dir()
    return str(Path(source).resolve()) if is_folder else source


def _split_list(listed: object) -> object:
    """Split the single string that variables and flags give."""
    if isinstance(listed, str):
        return tuple(one for part in listed.split(",") if (one := part.strip()))
    return tuple(listed) if isinstance(listed, list) else listed


def _exact_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Require origins in the form that browsers send, since they are compared as strings."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is neither * nor like https://app.example.com:8443")
    return origins


def _known_pruning(pruning: dict[str, Any]) -> dict[str, Any]:
    known = sorted(field.name for field in fields(PruningSettings))
    for name in pruning:
        if name not in known:
            raise ValueError(f"{name!r} is not a pruning setting; known are {', '.join(known)}")
    return pruning


def _named_folders(adapters: object) -> object:
    """Split NAME=FOLDER pairs, which variables and flags give with spaces between them."""
    if isinstance(adapters, str):
        adapters = adapters.split()
    if isinstance(adapters, dict):
        for name, folder in adapters.items():
            if not folder:
                raise ValueError(f"{name} has no folder")
    if not isinstance(adapters, list):
        return adapters
    pairs = [str(pair).partition("=") for pair in adapters]
    for name, equals, folder in pairs:
        if not (equals and folder):
            raise ValueError(f"{name!r} is not NAME=FOLDER")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError("a name is there twice")
    return {name: folder for name, _, folder in pairs}


def _sound_adapters(adapters: dict[str, Path]) -> dict[str, Path]:
    for name in adapters:
        require_adapter_name(name)
    return adapters


Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
KnownPort = Annotated[int, Field(ge=1, le=MAX_PORT)]
Count = Annotated[int, Field(ge=1)]
NumRanks = Annotated[int, Field(ge=1, le=64)]
PositiveBytes = Annotated[ByteSize, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Alias = Annotated[str, Field(min_length=1, max_length=256)]
AbsolutePath = Annotated[Path, AfterValidator(Path.resolve)]
Listed = Annotated[tuple[_T, ...], NoDecode, BeforeValidator(_split_list)]
Origins = Annotated[Listed[str], AfterValidator(_exact_origins)]
ModelSource = Annotated[str, AfterValidator(_absolute_model)]
GenerationConfig = Annotated[str, Field(min_length=1), AfterValidator(_absolute_generation_config)]
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral", "harmony", "json", "off"]
Pruning = Annotated[dict[str, Any], AfterValidator(_known_pruning)]
Adapters = Annotated[
    dict[str, AbsolutePath],
    NoDecode,
    BeforeValidator(_named_folders),
    AfterValidator(_sound_adapters),
]
