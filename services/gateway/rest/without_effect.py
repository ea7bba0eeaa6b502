"""Parameters that are accepted without effect: other servers bill, store or cache by them.

Only their types are checked. docs/api.md lists them.
"""

from typing import Any

from pydantic import BaseModel


class WithoutEffect(BaseModel):
    """Parameters accepted by both completions and chat, since clients do not distinguish them."""

    # OpenAI's
    metadata: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    verbosity: str | None = None
    # vLLM's
    guided_decoding_backend: str | None = None
    priority: int | None = None
