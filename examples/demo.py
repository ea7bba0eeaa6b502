"""`make demo`: starts the service on the embedded model, sends a long prompt, shows the result.

The service is `winnow serve` as a user would start it, with the arguments given here; the client is
an ordinary HTTP one.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

PROMPT_FILE = Path(__file__).resolve().with_name("long_prompt.txt")
STOP_TIMEOUT_S = 60

console = Console(highlight=False)


@dataclass
class TimedAnswer:
    """The streamed text, seconds to the first text and until the end, and the `usage`."""

    text: str = ""
    ttft_s: float = 0.0
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)


@contextmanager
def running_service(*arguments: str) -> Iterator[str]:
    """Start a service and yield its base URL; stop it with SIGINT, as Ctrl-C does."""
    command = [sys.executable, "-m", "winnow_serve", "serve", "--log-level", "warning"]
    ports = ["--port", "0", "--grpc-port", "0", "--admin-port", "0"]
    with subprocess.Popen(
        [*command, *ports, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield _read_url(process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)


def _read_url(process: "subprocess.Popen[str]") -> str:
    """URL in the ready message, which is the first line the service writes."""
    assert process.stdout is not None
    found = re.search(r"http://[^\s,;]+:\d+", process.stdout.readline())
    if found is None:
        sys.exit(
            f"the service ended with exit code {process.wait(STOP_TIMEOUT_S)} before it was ready"
        )
    return found.group()


def ask(url: str, prompt: str) -> TimedAnswer:
    """Stream a completion to the terminal."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer, start = TimedAnswer(), time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        if response.is_error:
            sys.exit(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                _take_chunk(answer, json.loads(line.removeprefix("data: ")), start)
    answer.total_s = time.perf_counter() - start
    return answer


def _take_chunk(answer: TimedAnswer, chunk: dict[str, Any], start: float) -> None:
    if "error" in chunk:
        sys.exit(chunk["error"]["message"])
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        answer.ttft_s = answer.ttft_s or time.perf_counter() - start
        answer.text += choice["text"]
        console.print(choice["text"], end="", style="bold green")


def show(answer: TimedAnswer) -> None:
    """Print what was done to the prompt, and how long it took."""
    usage, winnow = answer.usage, answer.usage["winnow"]
    prompt_tokens, answer_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    layer = winnow.get("selection_layer")
    kept_share = winnow["kv_bytes_kept"] / winnow["kv_bytes_full"]
    rho = ", ".join(f"layer {at}: {value:.2f}" for at, value in winnow["rho"].items())
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in {
        "selection layer": winnow.get("no_selection_reason") if layer is None else str(layer),
        "relative rank variance ρ": rho or "not looked at",
        "tokens kept": f"{winnow['selected_tokens']:,} of {prompt_tokens:,}",
        "layer-tokens computed": f"{winnow['computed_share']:.0%}",
        "KV cache, whole prompt": f"{winnow['kv_bytes_full'] / 1e6:.2f} MB",
        "KV cache, shipped": f"{winnow['kv_bytes_kept'] / 1e6:.2f} MB ({kept_share:.0%})",
        "time to first token": f"{answer.ttft_s * 1e3:.0f} ms (prefill "
        f"{winnow['prefill_s'] * 1e3:.0f} ms, exposed transfer "
        f"{winnow['exposed_transfer_s'] * 1e3:.1f} ms)",
        "time per output token": f"{_per_token_ms(answer, answer_tokens):.1f} ms",
    }.items():
        table.add_row(name, value)
    console.print(table)


def _per_token_ms(answer: TimedAnswer, num_tokens: int) -> float:
    return (answer.total_s - answer.ttft_s) / max(1, num_tokens - 1) * 1e3


def main() -> None:
    prompt = PROMPT_FILE.read_text().rstrip("\n")
    with running_service(*sys.argv[1:]) as url:
        console.print(f"\nThe prompt ({PROMPT_FILE.name}) begins and ends with:", style="dim")
        console.print(f"  {prompt[:160]} …\n  … {prompt[-160:]}".replace("\n", "\n  "), style="dim")
        console.print("\nAnswer:", end="")
        answer = ask(url, prompt)
        console.print("\n")
        show(answer)
    console.print("\nThe service has stopped.", style="dim")


if __name__ == "__main__":
    main()
