"""Client of a service's REST API: raises the service's errors, retries when it is busy."""

import json
import re
import time
from collections.abc import Generator, Mapping
from typing import Any

import httpx

from winnow.errors import InvalidSetting, WinnowError, error_class

_TIMEOUT_S = 600.0
_PATIENCE_S = 120.0
_PAUSE_S = 1.0
_TRY_AGAIN = frozenset({429, 502, 503, 504})
_SECONDS = re.compile(r"[0-9]{1,4}")


class RestClient:
    """A REST client for up to `num_parallel` threads at a time; a context manager."""

    def __init__(self, url: str, num_parallel: int, api_key: str | None = None) -> None:
        """Raises InvalidSetting if `url` is not a URL."""
        self.num_parallel = num_parallel
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = self._connect(api_key)

    def _connect(self, api_key: str | None) -> httpx.Client:
        try:
            return httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=_TIMEOUT_S,
                limits=httpx.Limits(max_connections=self.num_parallel),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidSetting(
                f"--endpoint {self.url!r} is not a URL: {error}", param="endpoint"
            ) from error

    def __enter__(self) -> "RestClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def model_card(self, name: str | None) -> dict[str, Any]:
        """The card of the served model `name`, or of the first one if None."""
        try:
            response = self._http.get("/v1/models")
            if response.status_code == httpx.codes.UNAUTHORIZED:
                raise InvalidSetting(
                    f"--endpoint {self.url} wants an API key that it knows, in OPENAI_API_KEY",
                    param="endpoint",
                )
            cards = {card["id"]: card for card in response.raise_for_status().json()["data"]}
            card: dict[str, Any] = cards[name] if name in cards else next(iter(cards.values()))
            int(card["max_model_len"])
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InvalidSetting(
                f"--endpoint {self.url}: no service answers there: {error}", param="endpoint"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            raise self.no_winnow_service(error) from error
        if name is not None and card["id"] != name:
            raise InvalidSetting(
                f"--endpoint {self.url} does not serve {name!r}; it serves {', '.join(cards)}",
                param="model",
            )
        return card

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post a request and return the response body; retries if the service is busy or down.

        Raises the service's own error; if it stays busy or down for _PATIENCE_S, that error.
        """
        give_up_s = time.monotonic() + _PATIENCE_S
        while True:
            pause_s = _PAUSE_S
            try:
                response = self._http.post(path, json=body)
            except httpx.RequestError as error:
                if time.monotonic() > give_up_s:
                    raise WinnowError(f"{self.url} does not answer: {error!r}") from error
            else:
                if response.status_code not in _TRY_AGAIN or time.monotonic() > give_up_s:
                    return self._body(response)
                pause_s = _pause_s(response)
            time.sleep(pause_s)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any] | None]:
        """Post a request and yield the JSON of its events; None for a sign of life between them.

        Closing the iterator ends the request.  Raises the service's own error, at any time.
        """
        try:
            with self._http.stream("POST", path, json={**body, "stream": True}) as response:
                if not response.is_success:
                    response.read()
                    self._body(response)
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield self._event(line.removeprefix("data: "))
                    elif line.startswith(":"):
                        yield None
        except httpx.RequestError as error:
            raise WinnowError(f"{self.url} does not answer: {error!r}") from error

    def _event(self, text: str) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(text)
            failure = event.get("error")
            if failure is None:
                return event
            error = error_class(failure["code"])(failure["message"], param=failure["param"])
        except (ValueError, KeyError, TypeError) as fault:
            raise self.no_winnow_service(fault) from fault
        raise error

    def no_winnow_service(self, error: Exception) -> InvalidSetting:
        """The error to raise for a response that failed to parse with `error`."""
        return InvalidSetting(
            f"--endpoint {self.url} is not a Winnow service: {error!r} in its answer",
            param="endpoint",
        )

    def _body(self, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
            if response.is_success:
                return dict(body)
            error = body["error"]
            refusal = error_class(error["code"])(error["message"], param=error["param"])
        except (ValueError, KeyError, TypeError) as error:
            raise WinnowError(
                f"{self.url} answered {response.status_code} with what is no answer of Winnow's"
            ) from error
        raise refusal


def _pause_s(response: httpx.Response) -> float:
    """Seconds to wait: Retry-After's, if it is in seconds."""
    told = response.headers.get("retry-after", "")
    return float(told) if _SECONDS.fullmatch(told) else _PAUSE_S
