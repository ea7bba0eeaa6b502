"""What each command does with its arguments; what takes long to load is imported when it runs."""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from typing import TextIO

from services.cli import flags
from services.cli.calibrate import run_calibrate as calibrate
from services.cli.eval import run_eval as evaluate
from services.common.logs import configure_logging, show_downloads
from services.common.settings import Settings
from services.common.settings_sources import load_settings
from services.gateway.access.keys import entry_text, new_key

# Read by the Hugging Face libraries at import. Progress bars do not belong in logs, and loading a
# model fails if its bar cannot be written (disk full).
_NO_PROGRESS_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


def _settings(args: argparse.Namespace) -> Settings:
    return load_settings(flags.settings_from_flags(args), args.config)


def _local_settings(args: argparse.Namespace) -> Settings:
    """Of a command whose model is in this process."""
    show_downloads()
    return _settings(args)


def run_serve(args: argparse.Namespace) -> None:
    settings = _settings(args)
    if args.print_config:
        from services.deploy_config import deploy_config  # noqa: PLC0415 - loads YAML

        print(deploy_config(settings), end="")
        return
    from services.cli.serve import run_service  # noqa: PLC0415 - loads transformers

    configure_logging(settings.log_level, settings.log_format)
    line = _ProgressLine()
    run_service(settings, line.show, lambda served: line.end(_ready_message(served)))


def run_decode(args: argparse.Namespace) -> None:
    os.environ.setdefault(_NO_PROGRESS_BARS, "1")
    from services.decode.main import run_decode as decode  # noqa: PLC0415 - loads transformers

    settings = _settings(args)
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(decode(settings))


def run_fetch(args: argparse.Namespace) -> None:
    from services.cli.fetch import fetch  # noqa: PLC0415 - loads the hub's client

    settings = _settings(args)
    configure_logging(settings.log_level, settings.log_format)
    print(fetch(settings))


def run_health(args: argparse.Namespace) -> None:
    from services.cli.health import check  # noqa: PLC0415 - loads gRPC

    check(args.target, load_settings(), args.service)


def run_key(args: argparse.Namespace) -> None:
    key, entry = new_key(args.name, args.requests_per_minute, args.tokens_per_minute)
    print(entry_text(entry), end="")
    print(f"# the key, shown this once:\n{key}", file=sys.stderr)


def run_drain(args: argparse.Namespace) -> None:
    from services.cli.health import drain  # noqa: PLC0415 - loads gRPC

    left = drain(args.target, args.timeout, load_settings())
    print(f"{left} requests are left")


def run_generate(args: argparse.Namespace) -> None:
    from services.cli.generate import generate  # noqa: PLC0415 - loads transformers

    generate(args, _local_settings(args))


def run_chat(args: argparse.Namespace) -> None:
    from services.cli.chat import chat  # noqa: PLC0415 - loads transformers

    chat(args, _local_settings(args))


def run_explain(args: argparse.Namespace) -> None:
    from services.cli.explain import run_explain as explain  # noqa: PLC0415 - loads transformers

    explain(args, _local_settings(args))


def run_eval(args: argparse.Namespace) -> None:
    evaluate(args, _local_settings(args))


def run_calibrate(args: argparse.Namespace) -> None:
    calibrate(args, _local_settings(args))


def _ready_message(settings: Settings) -> str:
    url = f"{settings.scheme}://{settings.host}:{settings.port}"
    grpc = f", gRPC on {settings.host}:{settings.grpc_port}" if settings.grpc_port else ""
    admin = (
        f", admin on {settings.decode_host}:{settings.admin_port}" if settings.admin_port else ""
    )
    body = f'{{"model": "{settings.served_name}", "prompt": "Once upon a time", "max_tokens": 32}}'
    return (
        f"Winnow serves {settings.served_name} on {url}{grpc}{admin}; Ctrl-C stops it.\n"
        f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    )


class _ProgressLine:
    """Shows the current step on one line that is overwritten; on separate lines without a terminal.

    Write errors are ignored: a full disk must not keep a service from starting.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._last = ""

    def show(self, text: str) -> None:
        if sys.stderr.isatty():
            seconds = time.monotonic() - self._started_s
            self._write(f"\r\033[Kwinnow: {text} ({seconds:.0f} s)", sys.stderr)
        elif text != self._last:
            self._write(f"winnow: {text}\n", sys.stderr)
        self._last = text

    def end(self, message: str) -> None:
        if sys.stderr.isatty():
            self._write("\r\033[K", sys.stderr)
        self._write(f"{message}\n", sys.stdout)

    def _write(self, text: str, stream: TextIO) -> None:
        with contextlib.suppress(OSError):
            print(text, end="", file=stream, flush=True)
