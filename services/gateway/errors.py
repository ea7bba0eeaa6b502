"""The gateway's errors as clients see them, independent of the protocol."""

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

_OWN_FAILURE = 500  # as an HTTP status

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
    """The error itself, or a generic one for an unexpected exception, which is logged."""
    if isinstance(error, WinnowError):
        return error
    logger.error("unexpected error", exc_info=error)
    return WinnowError("internal error")


def public_error(error: Exception) -> WinnowError:
    """The error to send to a client: internal failures show only their kind.

    Details, such as addresses and other programs' messages, are in the request's log.
    """
    typed = as_winnow_error(error)
    if status_of(typed).http < _OWN_FAILURE:
        return typed
    text = next(_TOLD[cls] for cls in type(typed).__mro__ if cls in _TOLD)
    return type(typed)(f"{text}; the service's log has more")
