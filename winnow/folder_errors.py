"""What libraries raise about a model folder becomes UnusableModel, with the reason in one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from winnow.errors import UnusableModel, WinnowError

logger = logging.getLogger(__name__)


@contextmanager
def as_unusable(what: str) -> Iterator[None]:
    """Whatever a library raises inside becomes UnusableModel: `what`, and the library's reason.

    All classes are caught, because what a folder holds can make a library raise any of them.
    """
    try:
        yield
    except WinnowError:
        raise
    except Exception as error:
        logger.debug("%s", what, exc_info=True)
        raise UnusableModel(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What a library's error says, without the paragraphs of advice that may follow.

    A line that only announces the next one brings it along; a bare word brings its error's class.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")
