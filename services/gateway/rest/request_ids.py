"""The id by which a request is found in the log."""

import secrets


def new_request_id() -> str:
    """For a request that is refused before it has an answer's id."""
    return f"req_{secrets.token_hex(16)}"


def request_ids(request_id: str) -> dict[str, str]:
    """The headers in which OpenAI's and Anthropic's clients look for a request's id."""
    return {"x-request-id": request_id, "request-id": request_id}
