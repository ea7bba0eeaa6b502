"""`winnow explain`: writes an HTML page about one prompt."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from services.cli.generate import load_winnow, read_prompt, token_ids_of
from services.common.settings import Settings
from services.playground.page import report_page
from services.playground.report import report
from winnow.errors import InvalidSetting
from winnow.explain import explain
from winnow.sampling_params import SamplingParams


def run_explain(args: argparse.Namespace, settings: Settings) -> None:
    """Write the page to --output, atomically.

    Raises WinnowError if the model, prompt or output path cannot be used.
    """
    prompt = read_prompt(args)
    _require_folder(args.output)
    winnow = load_winnow(settings, adapter=args.adapter)
    token_ids = token_ids_of(winnow, prompt, chat=args.chat)
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=0)
    explanation = explain(winnow, token_ids, sampling, args.adapter)
    page = report_page(report(explanation, args.adapter or settings.served_name))
    _write(args.output, page)
    sys.stdout.write(f"{args.output}\n")


def _require_folder(output: Path) -> None:
    folder = output.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidSetting(f"--output {output}: the folder {folder} is missing or not writable")
    if output.is_dir():
        raise InvalidSetting(f"--output {output} is a folder; a file is needed")


def _write(output: Path, page: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=output.parent, delete=False
        ) as partial:
            partial.write(page)
        Path(partial.name).chmod(0o644)
        Path(partial.name).replace(output)
    except OSError as error:
        raise InvalidSetting(f"--output {output} cannot be written: {error.strerror}") from error
