"""All errors that users of Winnow can see, and their HTTP and gRPC status.

WinnowError
├── InvalidRequest          the request is invalid and must be changed
│   ├── InvalidSetting      a parameter is out of its range, or settings contradict each other
│   │   ├── InvalidGrammar  a schema or grammar that cannot be compiled or enforced
│   │   └── UnusableAdapter  an adapter that is broken, unsupported, or of another model
│   ├── GrammarFailed       a grammar that became too complex, or does not allow replayed tokens
│   ├── UnknownParameter    a parameter that the API does not have
│   ├── UnsupportedParameter  a parameter of OpenAI's API that Winnow does not support
│   ├── PromptTooLong       more prompt tokens than the model or the operator allows
│   ├── BodyTooLarge        the HTTP body is over the limit
│   ├── BodyTooSlow         the HTTP body did not arrive in time
│   ├── BodyEncoded         the HTTP body is compressed
│   ├── BodyNotJson         the HTTP body is not declared as JSON in UTF-8
│   ├── HeadersTooLarge     the HTTP request line and headers are over the limit
│   └── UnknownModel        the service does not serve that model
├── InvalidKey              no API key, or one that does not exist (any more)
├── Overloaded              no KV memory or queue slot is free; retry later
│   └── Preempted           KV memory ran short during decode; another worker can continue
├── RateLimited             the API key has used up its limit for this minute
├── NoDecodeWorker          no compatible decode worker is registered
├── RegistryUnavailable     the worker registry does not respond
├── DeadlineExceeded        the request did not finish in time
├── RequestCancelled        the client disconnected
├── PrefillFailed           prefill could not compute or deliver the prompt's KV
│   ├── PrefillLost         the prefill worker died, or there is none at the moment
│   └── DeliveryFailed      the decode worker could not be reached, or refused the KV
├── TransferRefused         the received KV does not match what was announced
│   ├── UnknownReservation  no admitted request has that id (any more)
│   ├── TransferMismatch    wire version, model or shape differs from the receiver's
│   ├── TransferMalformed   frames that cannot be parsed, or that contradict the reservation
│   ├── TransferDamaged     bad checksum, gap, overlap, duplicate, bad digest
│   ├── TransferForged      the sender does not have the token of the attempt
│   └── StaleAttempt        a newer attempt was seen, the KV is in place, or none began for a part
├── ModelMismatch           the worker has another model or adapter than the requested one
├── LeaseExpired            the reservation's KV did not arrive in time
├── EngineFailed            the decode engine failed during generation
│   └── NotFinite           the model produces NaN or inf; another worker would fail as well
└── UnusableModel           a model folder that is missing, broken or unsupported (startup)
"""

from dataclasses import dataclass
from typing import ClassVar


class WinnowError(Exception):
    """Base class; `param` names the invalid field of the request, if there is one."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with `param`, which Exception's default omits."""
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(cls: type[WinnowError], message: str, param: str | None) -> WinnowError:
    return cls(message, param=param)


class InvalidRequest(WinnowError):
    code = "invalid_request"


class InvalidSetting(InvalidRequest):
    code = "invalid_value"


class InvalidGrammar(InvalidSetting):
    code = "invalid_grammar"


class UnusableAdapter(InvalidSetting):
    code = "unusable_adapter"


class GrammarFailed(InvalidRequest):
    code = "grammar_failed"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class BodyTooLarge(InvalidRequest):
    code = "body_too_large"


class BodyTooSlow(InvalidRequest):
    code = "body_too_slow"


class BodyEncoded(InvalidRequest):
    code = "body_encoded"


class BodyNotJson(InvalidRequest):
    code = "body_not_json"


class HeadersTooLarge(InvalidRequest):
    code = "headers_too_large"


class UnknownModel(InvalidRequest):
    code = "model_not_found"


class Overloaded(WinnowError):
    code = "overloaded"


class Preempted(Overloaded):
    code = "preempted"


class InvalidKey(WinnowError):
    code = "invalid_api_key"


class RateLimited(WinnowError):
    """retry_after_s: seconds until a request may be admitted again."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 60) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class NoDecodeWorker(WinnowError):
    code = "no_decode_worker"


class RegistryUnavailable(WinnowError):
    code = "registry_unavailable"


class DeadlineExceeded(WinnowError):
    code = "deadline_exceeded"


class RequestCancelled(WinnowError):
    code = "cancelled"


class PrefillFailed(WinnowError):
    code = "prefill_failed"


class PrefillLost(PrefillFailed):
    code = "prefill_lost"


class DeliveryFailed(PrefillFailed):
    code = "delivery_failed"


class TransferRefused(WinnowError):
    code = "transfer_refused"


class UnknownReservation(TransferRefused):
    code = "unknown_reservation"


class TransferMismatch(TransferRefused):
    code = "transfer_mismatch"


class TransferMalformed(TransferRefused):
    code = "transfer_malformed"


class TransferDamaged(TransferRefused):
    code = "transfer_damaged"


class TransferForged(TransferRefused):
    code = "transfer_forged"


class StaleAttempt(TransferRefused):
    code = "stale_attempt"


class ModelMismatch(WinnowError):
    code = "model_mismatch"


class LeaseExpired(WinnowError):
    code = "lease_expired"


class EngineFailed(WinnowError):
    code = "engine_failed"


class NotFinite(EngineFailed):
    code = "not_finite"


class UnusableModel(WinnowError):
    code = "unusable_model"


@dataclass(frozen=True, slots=True)
class Status:
    """An error's HTTP status, gRPC status code name, and OpenAI `error.type`."""

    http: int
    grpc: str
    openai_type: str


_STATUS: dict[type[WinnowError], Status] = {
    InvalidRequest: Status(400, "INVALID_ARGUMENT", "invalid_request_error"),
    BodyTooLarge: Status(413, "INVALID_ARGUMENT", "invalid_request_error"),
    BodyTooSlow: Status(408, "DEADLINE_EXCEEDED", "timeout_error"),
    BodyEncoded: Status(415, "INVALID_ARGUMENT", "invalid_request_error"),
    BodyNotJson: Status(415, "INVALID_ARGUMENT", "invalid_request_error"),
    HeadersTooLarge: Status(431, "INVALID_ARGUMENT", "invalid_request_error"),
    UnknownModel: Status(404, "NOT_FOUND", "invalid_request_error"),
    InvalidKey: Status(401, "UNAUTHENTICATED", "authentication_error"),
    Overloaded: Status(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    RateLimited: Status(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    NoDecodeWorker: Status(503, "UNAVAILABLE", "service_unavailable_error"),
    RegistryUnavailable: Status(503, "UNAVAILABLE", "service_unavailable_error"),
    DeadlineExceeded: Status(504, "DEADLINE_EXCEEDED", "timeout_error"),
    RequestCancelled: Status(499, "CANCELLED", "cancelled_error"),
    PrefillFailed: Status(502, "UNAVAILABLE", "server_error"),
    TransferRefused: Status(502, "ABORTED", "server_error"),
    UnknownReservation: Status(502, "NOT_FOUND", "server_error"),
    TransferMismatch: Status(502, "FAILED_PRECONDITION", "server_error"),
    TransferMalformed: Status(502, "INVALID_ARGUMENT", "server_error"),
    TransferDamaged: Status(502, "DATA_LOSS", "server_error"),
    TransferForged: Status(502, "PERMISSION_DENIED", "server_error"),
    ModelMismatch: Status(503, "FAILED_PRECONDITION", "service_unavailable_error"),
    LeaseExpired: Status(504, "ABORTED", "timeout_error"),
    EngineFailed: Status(500, "INTERNAL", "server_error"),
    WinnowError: Status(500, "INTERNAL", "server_error"),
}


def status_of(error: WinnowError) -> Status:
    """The status of the error's class, or of its nearest base class that has one."""
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


def error_class(code: str) -> type[WinnowError]:
    """The class with this `code`; WinnowError if there is none (an error of a newer peer)."""
    return _BY_CODE.get(code, WinnowError)


def _subclasses(cls: type[WinnowError]) -> list[type[WinnowError]]:
    return [cls] + [leaf for child in cls.__subclasses__() for leaf in _subclasses(child)]


_BY_CODE = {cls.code: cls for cls in _subclasses(WinnowError)}
ERROR_CODES = tuple(_BY_CODE)


def one_line(error: BaseException) -> str:
    """All that an error says, in one line for the log; its class if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
