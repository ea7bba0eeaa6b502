"""`winnow calibrate`: pruning settings for a model, written to its winnow.json."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from evals import plan as plans
from evals.calibrate.candidates import MAX_WINDOW
from evals.calibrate.prompts import read_prompts
from evals.calibrate.request import LEAST_PROMPTS, Found, Request
from evals.calibrate.run import calibrate
from evals.calibrate.target import Target, parse_share
from evals.pictures import can_draw
from evals.records import write_json
from evals.tasks import make_tasks
from evals.tasks.base import Task
from services.cli.local_model import open_local_model
from services.common.settings import Settings
from winnow.defaults import SETTINGS_FILE, override, scaled_defaults
from winnow.errors import InvalidSetting

if TYPE_CHECKING:
    from evals.local_model import LocalModel
    from winnow.model_files import ModelDescription

_TASKS = "niah_single_1,niah_single_2_prose,niah_multikey_1_prose,passkey,number_string,qa_1_facts"
_LEAST_SAMPLES = 2


def add_calibrate_flags(parser: argparse.ArgumentParser) -> None:
    """What is to be reached, on which prompts, and where the settings go."""
    wanted = parser.add_argument_group("What is wanted")
    target = wanted.add_mutually_exclusive_group()
    target.add_argument(
        "--keep",
        metavar="SHARE",
        help="the least prefill that keeps so much of the unpruned score (default: 97%%)",
    )
    target.add_argument(
        "--prefill", metavar="SHARE", help="the best score at so much of prefill at most"
    )
    wanted.add_argument(
        "--kv",
        metavar="SHARE",
        default="25%",
        help="KV entries that each head keeps of a prompt, as a share or a number (default: 25%%)",
    )
    prompts = parser.add_argument_group("On which prompts")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="your own, JSON Lines: prompt, and answers of which one must appear; without "
        "answers, agreement with the unpruned model counts",
    )
    prompts.add_argument(
        "--tasks", metavar="LIST", default=_TASKS, help=f"of `winnow eval` (default: {_TASKS})"
    )
    prompts.add_argument(
        "--length", metavar="N", default="2k", help="tokens of a task's prompt (default: 2k)"
    )
    prompts.add_argument(
        "--samples",
        type=int,
        default=6,
        metavar="N",
        help="per task, to search on; as many more are held out (default: 6)",
    )
    prompts.add_argument(
        "--max-tokens", type=int, default=32, metavar="N", help="of an answer to --prompts"
    )
    prompts.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    prompts.add_argument("--chat", action="store_true", help="use the model's chat template")
    run = parser.add_argument_group("How")
    run.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"where the settings go (default: {SETTINGS_FILE} in the model folder)",
    )
    run.add_argument(
        "--run",
        type=Path,
        dest="folder",
        default=Path("winnow-calibrate"),
        metavar="DIR",
        help="answers and the picture; a run that was stopped there goes on "
        "(default: winnow-calibrate)",
    )
    run.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="answers at a time (default: 16)"
    )


def run_calibrate(args: argparse.Namespace, settings: Settings) -> None:
    """Raises WinnowError for what cannot be calibrated; nothing is written to the model then."""
    from winnow.model_files import describe_model  # noqa: PLC0415 - loads transformers

    description = describe_model(
        settings.model_source, device=settings.device, **settings.load_options
    )
    output = _output(args, description)
    model = _model(args, settings, description)
    request = _request(args, description, model)
    found = calibrate(request, model, args.folder, Console(stderr=True))
    from evals.calibrate.report import draw, print_found  # noqa: PLC0415 - after the cheap checks

    console = Console()
    print_found(found, console)
    pictures = [draw(found, args.folder)] if can_draw() else []
    if not found.reached:
        raise InvalidSetting(
            f"on held-out prompts the settings found keep {found.chosen.kept}, not "
            f"{request.target.keep:.1%}; nothing was written (--samples, --keep)"
        )
    _write(output, found, description)
    written = ", ".join(map(str, [output, *pictures]))
    console.print(f"\nwritten: {written}", highlight=False, soft_wrap=True)


def _request(
    args: argparse.Namespace, description: "ModelDescription", model: "LocalModel"
) -> Request:
    tasks, length, num_samples = _prompts(args, model)
    keep = None if args.prefill else parse_share("keep", args.keep or "97%")
    prefill = parse_share("prefill", args.prefill) if args.prefill else None
    return Request(
        tasks=tasks,
        length=length,
        kv=int(args.kv) if args.kv.isdecimal() else parse_share("kv", args.kv),
        target=Target(keep, prefill),
        num_samples=num_samples,
        seed=args.seed,
        chat=args.chat,
        shape=description.shape,
    )


def _prompts(args: argparse.Namespace, model: "LocalModel") -> tuple[tuple[Task, ...], int, int]:
    """The tasks, the length of their prompts at most, and how many of each to search on."""
    if args.samples < _LEAST_SAMPLES:
        raise InvalidSetting(
            f"--samples is {args.samples}; it must be at least {_LEAST_SAMPLES}", param="samples"
        )
    if args.prompts is None:
        tasks = plans.choose_tasks(args.tasks, make_tasks(1, None))
        (length, *more) = plans.parse_lengths(args.length)
        if more:
            raise InvalidSetting(f"--length {args.length!r} is more than one length")
        return tasks, length, args.samples
    task = read_prompts(args.prompts, args.max_tokens, args.seed)
    num_prompts = len(task.prompts)
    if num_prompts < LEAST_PROMPTS:
        raise InvalidSetting(
            f"--prompts {args.prompts} has {num_prompts:,} prompts; it must have at least "
            f"{LEAST_PROMPTS}: half are searched on, half held out",
            param="prompts",
        )
    longest = max(model.count(prompt.text) for prompt in task.prompts) + model.frame_tokens
    length = min(longest + args.max_tokens, model.max_positions)
    return (task,), length, num_prompts // 2


def _model(
    args: argparse.Namespace, settings: Settings, description: "ModelDescription"
) -> "LocalModel":
    # Over the model's own settings, which this command may have written before.
    pruning = asdict(scaled_defaults(description.shape)) | settings.pruning
    return open_local_model(args, settings, pruning, record_window=MAX_WINDOW)


def _output(args: argparse.Namespace, description: "ModelDescription") -> Path:
    """Where the settings go.  Raises InvalidSetting if nothing can be written there."""
    output: Path = args.output or description.folder / SETTINGS_FILE
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise InvalidSetting(f"-o {output} cannot be written", param="output")
    return output


def _write(output: Path, found: Found, description: "ModelDescription") -> None:
    """Writes the settings over those of the file, whose other settings stay."""
    known = json.loads(output.read_text()) if output.exists() else {}
    merged = known | found.settings
    shape = description.shape
    override(scaled_defaults(shape), merged, shape).require_fits(shape)
    write_json(output, merged)
