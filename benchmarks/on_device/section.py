"""What a section is given, and what it gives: rows, and the figures that have a target."""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.on_device.scale import Scale
from winnow.kv import ModelShape

_YES_NO = {True: "yes", False: "no"}


@dataclass(frozen=True, slots=True)
class Bench:
    """What every section needs.  copy_bandwidth: bytes per second that a copy reads and writes."""

    device: torch.device
    scale: Scale
    copy_bandwidth: float

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> ModelShape:
        model = self.scale.model
        return ModelShape(
            num_layers=model["num_hidden_layers"],
            num_heads=model["num_attention_heads"],
            num_kv_heads=model["num_key_value_heads"],
            head_dim=model["head_dim"],
            hidden_size=model["hidden_size"],
            dtype=self.dtype,
        )

    def require_cuda(self) -> None:
        """Raise NeedsCuda on any other device."""
        if not self.is_cuda:
            raise NeedsCuda("needs CUDA")


class NeedsCuda(Exception):
    """The section, or one of its rows, cannot run on this device."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the short table.  at_most, at_least: its target, if it has one."""

    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def row(self, *, is_cuda: bool) -> dict[str, Any]:
        """For a table; targets are for GPUs."""
        target, met = "", ""
        if is_cuda and self.at_most is not None:
            target, met = f"≤ {self.at_most:g}", _YES_NO[self.value <= self.at_most]
        elif is_cuda and self.at_least is not None:
            target, met = f"≥ {self.at_least:g}", _YES_NO[self.value >= self.at_least]
        return {"figure": self.name, "value": self.value, "target": target, "met": met}


@dataclass(frozen=True, slots=True)
class Result:
    """rows: all that was measured.  figures: what the short table shows of it."""

    rows: Sequence[dict[str, Any]]
    figures: Sequence[Figure] = field(default=())


Section = Callable[[Bench], Result]

_note: ContextVar[Callable[[dict[str, Any]], object]] = ContextVar("note", default=lambda _: None)


@contextmanager
def noting(note: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """In it, `note` is called with each row as soon as it is measured."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


def attempt(labels: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row: `labels`, and what was measured or the error that kept it from being.

    What Winnow logs meanwhile is in it too: it may have fallen back to another way.
    """
    with logged_warnings() as log:
        row = labels | _measured_or_error(measure)
    gc.collect()  # what one row holds of the device's memory, the next one needs
    row |= {"log": log} if log else {}
    _note.get()(row)
    return row


def _measured_or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except NeedsCuda as error:
        return {"error": str(error)}
    except Exception as error:  # compilers, drivers and memory each have errors of their own
        return {"error": reason(error)}


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """The warnings that Winnow logs in the block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("winnow")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def reason(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def measured(rows: Sequence[dict[str, Any]], name: str, **labels: Any) -> list[float]:  # noqa: ANN401
    """The column `name` of the rows that have it and these labels."""
    return [row[name] for row in rows if name in row and labels.items() <= row.items()]
