"""One line for whatever keeps a model of the hub from being there."""

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from winnow.errors import UnusableModel
from winnow.folder_errors import first_line
from winnow.hub.cache import cache_folder
from winnow.hub.reference import HubModel

_UNAUTHORIZED = 401


def refusal(model: HubModel, error: BaseException) -> UnusableModel:
    """What the user is told."""
    if isinstance(error, UnusableModel):
        return error
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return refusal(model, error.__cause__)
    return UnusableModel(_reason(model, error))


def _reason(model: HubModel, error: BaseException) -> str:
    hub, repository, cache = constants.ENDPOINT, model.repository, cache_folder()
    if isinstance(error, GatedRepoError):
        return (
            f"model {repository} is gated: accept its terms at {hub}/{repository} and set HF_TOKEN "
            f"to a token of that account ({_token()})"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"model {repository} has no revision {model.revision} on {hub}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no folder {repository}, and {hub} has no such model, or it is private and "
            f"needs HF_TOKEN ({_token()})"
        )
    if isinstance(error, HfHubHTTPError):
        return _http_reason(model, error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"model {model} cannot be written into {cache}: {error.strerror}"
    return (
        f"model {model} is not in {cache}, and {hub} cannot be reached "
        f"({type(error).__name__}: {first_line(error)})"
    )


def _http_reason(model: HubModel, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == _UNAUTHORIZED:
        return f"{constants.ENDPOINT} does not accept the token ({_token()})"
    said = error.server_message or error.response.reason_phrase
    return f"model {model} cannot be fetched: {constants.ENDPOINT} answers {status}, {said}"


def _token() -> str:
    return "one is set" if get_token() else "none is set"
