"""`winnow eval`: turns flags into a plan, and opens the model or service to evaluate."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from evals import plan as plans
from evals.model import Model
from evals.tasks import make_tasks
from evals.variants import Variant, make_variants, parse_methods
from services.cli.local_model import open_local_model
from services.common.settings import Settings
from winnow.catalog import METHODS
from winnow.errors import InvalidSetting

_METHODS = "full,snapkv,fastkv,gemfilter,asl"
_TURN_METHODS = "full,asl"
_TASKS = "ruler,infinitebench,niah"
_TURNS_STORE_BYTES = 1 << 30


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for what to evaluate and how; the model's own flags are settings."""
    asked = parser.add_argument_group("What is asked")
    asked.add_argument(
        "--methods",
        metavar="LIST",
        help="methods with options, like full,fastkv:fixed_layer=5,asl:threshold=0.4; known are "
        f"{', '.join(METHODS)} (default: {_METHODS}; with --turns: {_TURN_METHODS})",
    )
    asked.add_argument(
        "--tasks",
        metavar="LIST",
        default=_TASKS,
        help="groups (ruler, infinitebench, niah, chains, zero_shot), tasks, or patterns like "
        f"'chain_*' (default: {_TASKS})",
    )
    asked.add_argument(
        "--length", metavar="LIST", default="2k", help="prompt tokens, like 1k,2048 (default: 2k)"
    )
    asked.add_argument(
        "--budget",
        metavar="LIST",
        default="128,256",
        help="select_tokens and kv_budget of every method but full (default: 128,256)",
    )
    asked.add_argument(
        "--samples", type=int, default=20, metavar="N", help="per task and length (default: 20)"
    )
    asked.add_argument("--seed", type=int, default=0, metavar="N", help="of the tasks (default: 0)")
    asked.add_argument(
        "--depths", type=int, default=11, metavar="N", help="needle depths of niah (default: 11)"
    )
    asked.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="take the benchmarks' own data from there"
    )
    asked.add_argument(
        "--turns",
        type=int,
        metavar="N",
        help="instead of tasks: N questions about one document, from scratch, with the prefix "
        "cache, and with what the first question kept",
    )
    asked.add_argument("--chat", action="store_true", help="use the model's chat template")
    run = parser.add_argument_group("How")
    run.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("winnow-eval"),
        metavar="DIR",
        help="records, summary and pictures; a run that was stopped there goes on "
        "(default: winnow-eval)",
    )
    run.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="answers at a time (default: 16)"
    )
    run.add_argument(
        "--endpoint",
        metavar="URL",
        help="ask a running service instead of a model; its API key, if it wants one, is taken "
        "from OPENAI_API_KEY",
    )


def run_eval(args: argparse.Namespace, settings: Settings) -> None:
    """Run the evaluation.  Raises WinnowError for an invalid request before anything is written."""
    if args.turns is not None:
        _run_turns(args, settings)
        return
    plan = _plan(args)
    if args.batch_size < 1:
        raise InvalidSetting(f"--batch-size is {args.batch_size}; it must be at least 1")
    from evals.run import evaluate  # noqa: PLC0415 - after the cheap checks

    with _model(args, settings) as model:
        evaluate(plan, model, args.output, progress=Console(stderr=True), result=Console())


def _run_turns(args: argparse.Namespace, settings: Settings) -> None:
    for name in ("endpoint", "data_dir"):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise InvalidSetting(f"--turns is for a model in this process, without {flag}")
    from evals.turns.run import TurnPlan, evaluate_turns  # noqa: PLC0415 - loads torch

    plan = TurnPlan(
        variants=_variants(args, _TURN_METHODS),
        lengths=plans.parse_lengths(args.length),
        num_turns=args.turns,
        num_samples=args.samples,
        seed=args.seed,
    )
    store_bytes = settings.prefix_cache_bytes or _TURNS_STORE_BYTES
    with_store = settings.model_copy(update={"prefix_cache_bytes": store_bytes})
    evaluate_turns(
        plan,
        open_local_model(args, with_store, settings.pruning),
        args.output,
        progress=Console(stderr=True),
        result=Console(),
    )


def _variants(args: argparse.Namespace, methods: str) -> tuple[Variant, ...]:
    return make_variants(parse_methods(args.methods or methods), plans.parse_budgets(args.budget))


def _plan(args: argparse.Namespace) -> plans.Plan:
    return plans.Plan(
        tasks=plans.choose_tasks(args.tasks, make_tasks(args.depths, args.data_dir)),
        lengths=plans.parse_lengths(args.length),
        variants=_variants(args, _METHODS),
        num_samples=args.samples,
        seed=args.seed,
        chat=args.chat,
        depths=args.depths,
        data_dir=args.data_dir,
    )


@contextmanager
def _model(args: argparse.Namespace, settings: Settings) -> Iterator[Model]:
    if args.endpoint is None:
        yield open_local_model(args, settings, settings.pruning)
        return
    if args.adapter is not None:
        raise InvalidSetting(
            "--adapter is of a model in this process; with --endpoint name it by --model",
            param="adapter",
        )
    from evals.endpoint import EndpointModel  # noqa: PLC0415 - one of two
    from evals.rest_client import RestClient  # noqa: PLC0415 - one of two

    api_key = os.environ.get("OPENAI_API_KEY")
    with RestClient(args.endpoint, args.batch_size, api_key) as client:
        name = getattr(args, "model", None)
        yield EndpointModel(client, model=name, chat=args.chat, pruning=settings.pruning)
