"""The arguments of the `winnow` command."""

import argparse
from pathlib import Path
from typing import TypeAlias

from services.cli import commands, flags
from services.cli.calibrate import add_calibrate_flags
from services.cli.eval import add_eval_flags

_SETTINGS_HELP = (
    "Every setting can also be given as a variable (--max-n is WINNOW_MAX_N) or in a YAML file "
    "(max_n: 4). Flags win over variables, variables over the file; unknown ones are refused. "
    "`null` unsets one. Workers find each other through Redis where WINNOW_REDIS_URL is set."
)

_Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def make_parser() -> argparse.ArgumentParser:
    """Its arguments have `run`, the command, and `farewell`, what is said if it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="winnow",
        description="Long-context completions: the prompt is pruned, prefill and decode are apart.",
    )
    parser.set_defaults(farewell="stopped")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(_add_command(subparsers, "serve", "run the service in the foreground"))
    _add_decode(_add_command(subparsers, "decode", "run a decode worker that joins through Redis"))
    _add_fetch(_add_command(subparsers, "fetch", "bring a hub's model to this machine"))
    _add_generate(_add_command(subparsers, "generate", "answer one prompt in this process"))
    _add_chat(_add_command(subparsers, "chat", "talk about a file"))
    _add_explain(_add_command(subparsers, "explain", "show on a page what was kept of one prompt"))
    _add_eval(_add_command(subparsers, "eval", "measure how well pruned prompts are answered"))
    _add_calibrate(_add_command(subparsers, "calibrate", "find pruning settings for a model"))
    health = subparsers.add_parser("health", help="ask whether a gateway or a worker serves")
    health.add_argument("target", help="http://HOST:PORT/ready, or a decode worker's HOST:PORT")
    health.add_argument("--service", default="", help="of a decode worker (default: all)")
    health.set_defaults(run=commands.run_health)
    key = subparsers.add_parser("key", help="make an API key, and its entry for api_keys_file")
    key.add_argument("name", help="of whom it is for")
    key.add_argument("--requests-per-minute", type=int, help="limit (default: none)")
    key.add_argument("--tokens-per-minute", type=int, help="limit (default: none)")
    key.set_defaults(run=commands.run_key)
    drain = subparsers.add_parser(
        "drain", help="let a decode worker move or finish what it runs, and admit no more"
    )
    drain.add_argument("target", help="the worker's HOST:PORT")
    drain.add_argument("--timeout", type=float, default=30, help="seconds (default: 30)")
    drain.set_defaults(run=commands.run_drain)
    return parser


def _add_command(subparsers: _Subparsers, name: str, what: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(
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
    flags.add_settings_flags(parser, flags.SERVE_GROUPS)
    parser.set_defaults(run=commands.run_serve)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_config_flag(parser)
    flags.add_settings_flags(parser, flags.DECODE_GROUPS)
    parser.set_defaults(run=commands.run_decode)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    _add_config_flag(parser)
    flags.add_settings_flags(parser, flags.FETCH_GROUPS)
    farewell = "stopped; the same command goes on where it ended"
    parser.set_defaults(run=commands.run_fetch, farewell=farewell)


def _add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of settings (or WINNOW_CONFIG)"
    )


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read it from a file; - is stdin")
    parser.add_argument("--chat", action="store_true", help="put it into the chat template")
    groups = {name: flags.SERVE_GROUPS[name] for name in ("Model", "Chat")}
    flags.add_settings_flags(parser, groups | {"Memory": ("num_threads", "kv_memory_bytes")})


def _add_adapter(parser: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(run=commands.run_explain, config=None)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_prompt(parser)
    sampling = parser.add_argument_group("Sampling")
    sampling.add_argument("--max-tokens", type=int, default=256, help="(default: 256)")
    sampling.add_argument("--temperature", type=float, default=0, help="0 is greedy (default)")
    sampling.add_argument("--top-p", type=float, default=1, help="(default: 1)")
    sampling.add_argument("--seed", type=int, default=0, help="(default: 0)")
    sampling.add_argument("--stop", action="append", default=[], help="ends the answer; repeatable")
    _add_adapter(parser)
    parser.set_defaults(run=commands.run_generate, config=None)


def _add_chat(parser: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(run=commands.run_chat, config=None)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add_eval_flags(parser)
    flags.add_settings_flags(parser, flags.EVAL_GROUPS)
    _add_adapter(parser)
    farewell = "stopped; the same command goes on in {0.output}"
    parser.set_defaults(run=commands.run_eval, config=None, farewell=farewell)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_calibrate_flags(parser)
    flags.add_settings_flags(parser, flags.EVALUATED_GROUPS)
    _add_adapter(parser)
    farewell = "stopped; the same command goes on in {0.folder}"
    parser.set_defaults(run=commands.run_calibrate, config=None, farewell=farewell)
