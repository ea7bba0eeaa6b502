"""Errors as a client is told them, over whatever protocol."""

import logging

from winnow.errors import (
    DeadlineExceeded,
    EngineFailed,
    LeaseExpired,
    ModelMismatch,
    NoDecodeWorker,
    PrefillFailed,
    RegistryUnavailable,
    TransferRefused,
    WinnowError,
    status_of,
)

logger = logging.getLogger(__name__)

_OWN_FAILURE = 500  # in HTTP's numbers

_TOLD: dict[type[Exception], str] = {
    NoDecodeWorker: "no decode worker can serve the request now",
    RegistryUnavailable: "the workers cannot be looked up now",
    DeadlineExceeded: "the request did not end in its time",
    PrefillFailed: "the prompt could not be computed",
    TransferRefused: "the computed prompt could not be handed on",
    ModelMismatch: "the workers have another model than this gateway",
    LeaseExpired: "the prompt was not computed in its time",
    EngineFailed: "the answer could not be generated",
    WinnowError: "internal error",
}


def as_winnow_error(error: Exception) -> WinnowError:
    """The error itself, or one that hides an unexpected exception, which is logged."""
    if isinstance(error, WinnowError):
        return error
    logger.error("unexpected error", exc_info=error)
    return WinnowError("internal error")


def public_error(error: Exception) -> WinnowError:
    """The error as a client is told it: of the service's own failures the kind alone.

    What befell inside, with addresses and other programs' words, is in the log of the request.
    """
    typed = as_winnow_error(error)
    if status_of(typed).http < _OWN_FAILURE:
        return typed
    text = next(_TOLD[cls] for cls in type(typed).__mro__ if cls in _TOLD)
    return type(typed)(f"{text}; the service's log has more")
