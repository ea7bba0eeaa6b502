"""The `winnow` command-line interface."""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from services.cli.signals import Interrupts
from services.common.logs import configure_logging, show_downloads
from services.common.openmp import SHORT_WAITS
from winnow.errors import WinnowError

if TYPE_CHECKING:
    from services.common.settings import Settings

EXIT_REFUSED = 2
# Read by the Hugging Face libraries at import. Progress bars do not belong in logs, and loading a
# model fails if its bar cannot be written (disk full).
_NO_PROGRESS_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"

_SETTINGS_HELP = (
    "Every setting can also be given as a variable (--max-n is WINNOW_MAX_N) or in a YAML file "
    "(max_n: 4). Flags win over variables, variables over the file; unknown ones are refused. "
    "`null` unsets one. Workers find each other through Redis where WINNOW_REDIS_URL is set."
)


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 2 if it was refused.

    Ctrl-C is handled from here on, so slow imports happen inside the commands.
    """
    for name, value in SHORT_WAITS.items():
        os.environ.setdefault(name, value)
    interrupts = Interrupts()
    try:
        with interrupts:
            args = _parser().parse_args(arguments)
            interrupts.farewell = args.farewell.format(args)
            args.run(args)
    except KeyboardInterrupt:
        interrupts.end_process()
    except WinnowError as error:
        print(f"winnow: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="winnow",
        description="Long-context completions: the prompt is pruned, prefill and decode are apart.",
    )
    parser.set_defaults(farewell="stopped")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(_add_command(commands, "serve", "run the service in the foreground"))
    _add_decode(_add_command(commands, "decode", "run a decode worker that joins through Redis"))
    _add_fetch(_add_command(commands, "fetch", "bring a hub's model to this machine"))
    _add_generate(_add_command(commands, "generate", "answer one prompt in this process"))
    _add_chat(_add_command(commands, "chat", "talk about a file"))
    _add_explain(_add_command(commands, "explain", "show on a page what was kept of one prompt"))
    _add_eval(_add_command(commands, "eval", "measure how well pruned prompts are answered"))
    _add_calibrate(_add_command(commands, "calibrate", "find pruning settings for a model"))
    health = commands.add_parser("health", help="ask whether a gateway or a worker serves")
    health.add_argument("target", help="http://HOST:PORT/ready, or a decode worker's HOST:PORT")
    health.add_argument("--service", default="", help="of a decode worker (default: all)")
    health.set_defaults(run=_health)
    key = commands.add_parser("key", help="make an API key, and its entry for api_keys_file")
    key.add_argument("name", help="of whom it is for")
    key.add_argument("--requests-per-minute", type=int, help="limit (default: none)")
    key.add_argument("--tokens-per-minute", type=int, help="limit (default: none)")
    key.set_defaults(run=_key)
    drain = commands.add_parser(
        "drain", help="let a decode worker move or finish what it runs, and admit no more"
    )
    drain.add_argument("target", help="the worker's HOST:PORT")
    drain.add_argument("--timeout", type=float, default=30, help="seconds (default: 30)")
    drain.set_defaults(run=_drain)
    return parser


def _add_command(commands: _Commands, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        usage=f"winnow {name} [OPTIONS]",
        description=f"{what.capitalize()}.",
        epilog=_SETTINGS_HELP,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_config_flag(parser)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="write what `serve deploy` needs to run this service on a Ray cluster, and stop",
    )
    from services.cli import flags  # noqa: PLC0415 - loads pydantic

    flags.add_settings_flags(parser, flags.SERVE_GROUPS)
    parser.set_defaults(run=_serve)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic

    _add_config_flag(parser)
    flags.add_settings_flags(parser, flags.DECODE_GROUPS)
    parser.set_defaults(run=_decode)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic

    _add_config_flag(parser)
    flags.add_settings_flags(parser, flags.FETCH_GROUPS)
    farewell = "stopped; the same command goes on where it ended"
    parser.set_defaults(run=_fetch, farewell=farewell)


def _add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings (or WINNOW_CONFIG)"
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic

    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read it from a file; - is stdin")
    parser.add_argument("--chat", action="store_true", help="put it into the chat template")
    groups = {name: flags.SERVE_GROUPS[name] for name in ("Model", "Chat")}
    flags.add_settings_flags(parser, groups | {"Memory": ("num_threads", "kv_memory_bytes")})


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic

    flags.add_settings_flags(parser, {"Adapters": ("adapters",)})
    _add_adapter_choice(parser)


def _add_adapter_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", metavar="NAME", help="that answers (default: the model alone)")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    _add_prompt(parser)
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answers (default: 64)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page"
    )
    _add_adapter(parser)
    parser.set_defaults(run=_explain, config=None)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_prompt(parser)
    sampling = parser.add_argument_group("Sampling")
    sampling.add_argument("--max-tokens", type=int, default=256, help="(default: 256)")
    sampling.add_argument("--temperature", type=float, default=0, help="0 is greedy (default)")
    sampling.add_argument("--top-p", type=float, default=1, help="(default: 1)")
    sampling.add_argument("--seed", type=int, default=0, help="(default: 0)")
    sampling.add_argument("--stop", action="append", default=[], help="ends the answer; repeatable")
    _add_adapter(parser)
    parser.set_defaults(run=_generate, config=None)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic

    parser.add_argument("file", metavar="FILE", help="the text to talk about")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask a running service, with the key in OPENAI_API_KEY, not a model in this process",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions to the model")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0, metavar="N", help="0 is greedy (default)"
    )
    flags.add_settings_flags(parser, flags.CHAT_GROUPS)
    _add_adapter_choice(parser)
    parser.set_defaults(run=_chat, config=None)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic
    from services.cli.eval import add_eval_flags  # noqa: PLC0415 - loads tasks

    add_eval_flags(parser)
    flags.add_settings_flags(parser, flags.EVAL_GROUPS)
    _add_adapter(parser)
    farewell = "stopped; the same command goes on in {0.output}"
    parser.set_defaults(run=_eval, config=None, farewell=farewell)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    from services.cli import flags  # noqa: PLC0415 - loads pydantic
    from services.cli.calibrate import add_calibrate_flags  # noqa: PLC0415 - loads tasks

    add_calibrate_flags(parser)
    flags.add_settings_flags(parser, flags.EVALUATED_GROUPS)
    _add_adapter(parser)
    farewell = "stopped; the same command goes on in {0.folder}"
    parser.set_defaults(run=_calibrate, config=None, farewell=farewell)


def _settings(args: argparse.Namespace) -> "Settings":
    from services.cli import flags  # noqa: PLC0415 - loads pydantic
    from services.common.settings import load_settings  # noqa: PLC0415 - loads pydantic

    return load_settings(flags.settings_from_flags(args), args.config)


def _local_settings(args: argparse.Namespace) -> "Settings":
    """Of a command whose model is in this process."""
    show_downloads()
    return _settings(args)


def _serve(args: argparse.Namespace) -> None:
    settings = _settings(args)
    if args.print_config:
        from services.deploy_config import deploy_config  # noqa: PLC0415 - loads YAML

        print(deploy_config(settings), end="")
        return
    from services.cli.serve import run_service  # noqa: PLC0415 - loads transformers

    configure_logging(settings.log_level, settings.log_format)
    line = _ProgressLine()
    run_service(settings, line.show, lambda served: line.end(_ready_message(served)))


def _decode(args: argparse.Namespace) -> None:
    os.environ.setdefault(_NO_PROGRESS_BARS, "1")
    from services.decode.main import run_decode  # noqa: PLC0415 - loads transformers

    settings = _settings(args)
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(run_decode(settings))


def _fetch(args: argparse.Namespace) -> None:
    from services.cli.fetch import fetch  # noqa: PLC0415 - loads the hub's client

    settings = _settings(args)
    configure_logging(settings.log_level, settings.log_format)
    print(fetch(settings))


def _health(args: argparse.Namespace) -> None:
    from services.cli.health import check  # noqa: PLC0415 - loads gRPC
    from services.common.settings import load_settings  # noqa: PLC0415 - loads pydantic

    check(args.target, load_settings(), args.service)


def _key(args: argparse.Namespace) -> None:
    from services.gateway.access.keys import entry_text, new_key  # noqa: PLC0415 - loads pydantic

    key, entry = new_key(args.name, args.requests_per_minute, args.tokens_per_minute)
    print(entry_text(entry), end="")
    print(f"# the key, shown this once:\n{key}", file=sys.stderr)


def _drain(args: argparse.Namespace) -> None:
    from services.cli.health import drain  # noqa: PLC0415 - loads gRPC
    from services.common.settings import load_settings  # noqa: PLC0415 - loads pydantic

    left = drain(args.target, args.timeout, load_settings())
    print(f"{left} requests are left")


def _generate(args: argparse.Namespace) -> None:
    from services.cli.generate import generate  # noqa: PLC0415 - loads transformers

    generate(args, _local_settings(args))


def _chat(args: argparse.Namespace) -> None:
    from services.cli.chat import chat  # noqa: PLC0415 - loads transformers

    chat(args, _local_settings(args))


def _explain(args: argparse.Namespace) -> None:
    from services.cli.explain import run_explain  # noqa: PLC0415 - loads transformers

    run_explain(args, _local_settings(args))


def _eval(args: argparse.Namespace) -> None:
    from services.cli.eval import run_eval  # noqa: PLC0415 - loads tasks

    run_eval(args, _local_settings(args))


def _calibrate(args: argparse.Namespace) -> None:
    from services.cli.calibrate import run_calibrate  # noqa: PLC0415 - loads tasks

    run_calibrate(args, _local_settings(args))


def _ready_message(settings: "Settings") -> str:
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
