"""One-line reasons why a folder cannot be used: Winnow's own, and those of libraries."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from winnow.errors import UnusableModel, WinnowError

logger = logging.getLogger(__name__)


@contextmanager
def as_unusable(what: str, kind: type[WinnowError] = UnusableModel) -> Iterator[None]:
    """Translate any library error raised inside to a `kind`: `what`, and the reason.

    Every exception class is caught, since broken files can make a library raise any of them.
    """
    try:
        yield
    except WinnowError:
        raise
    except Exception as error:
        logger.debug("%s", what, exc_info=True)
        raise kind(f"{what}: {first_line(error)}") from error


def cannot_run(family: str, reason: str) -> UnusableModel:
    """The error for a family, as transformers names it, that Winnow does not run."""
    return UnusableModel(f"Winnow cannot run {family}: {reason}")


def first_line(error: BaseException) -> str:
    """The first line of an error, without the advice that may follow.

    A line that ends with a colon includes the next line; a single word is prefixed with the class.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")
