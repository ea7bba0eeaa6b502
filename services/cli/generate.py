"""`winnow generate`: answers one prompt in this process, with the same engines as the service."""

import argparse
import sys
from pathlib import Path

import torch

from services.cli.local_model import adapter_folder
from services.common.settings import Settings
from winnow.completion import CompletionStream
from winnow.errors import InvalidRequest
from winnow.kv import ModelShape
from winnow.local import Winnow
from winnow.sampling_params import SamplingParams


def generate(args: argparse.Namespace, settings: Settings) -> None:
    """Stream the answer to standard output, then a summary to standard error.

    Raises WinnowError if the model or the prompt cannot be used.
    """
    prompt = read_prompt(args)
    winnow = load_winnow(settings, adapter=args.adapter)
    token_ids = token_ids_of(winnow, prompt, chat=args.chat)
    stream = winnow.stream(token_ids, _sampling(args), tuple(args.stop), adapter=args.adapter)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stderr.write(f"winnow: {_summary(stream, winnow.model.shape)}\n")
    if stream.report.rho and stream.report.selection_layer is None:
        sys.stderr.write(f"winnow: {_unpruned(stream, winnow)}\n")


def load_winnow(
    settings: Settings, prefix_cache_bytes: int = 0, adapter: str | None = None
) -> Winnow:
    """Load the model and engines for a command that runs in a single process.

    adapter: the one of the settings' that answers.
    """
    folders = adapter_folder(adapter, settings)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    return Winnow.load(
        settings.model_source,
        device=settings.device,
        kv_dtype=settings.kv_dtype,
        kv_memory_bytes=settings.kv_memory_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        chat_template_kwargs=settings.chat_template_kwargs,
        allow_special_tokens=settings.allow_special_tokens,
        adapters=folders,
        **settings.load_options,
        **settings.pruning,
    )


def read_prompt(args: argparse.Namespace) -> str:
    """The text of --prompt or --prompt-file, without the file's last line break.

    Raises InvalidRequest if it cannot be read.
    """
    return str(args.prompt) if args.prompt is not None else read_text(args.prompt_file)


def read_text(file: str) -> str:
    """The text of a file, or of standard input if it is `-`, without its last line break.

    Raises InvalidRequest if it cannot be read.
    """
    try:
        return _read(file).decode().removesuffix("\n")
    except OSError as error:
        raise InvalidRequest(f"prompt file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"prompt file {file} is not UTF-8: {error}") from error


def _read(file: str) -> bytes:
    return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()


def token_ids_of(winnow: Winnow, prompt: str, *, chat: bool) -> list[int]:
    """Token IDs of a prompt, as plain text or as the user message of a chat."""
    if chat:
        return winnow.tokenizer.render_chat([{"role": "user", "content": prompt}])
    return winnow.tokenizer.encode(prompt)


def _sampling(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )


def _summary(stream: CompletionStream, shape: ModelShape) -> str:
    """One line about what was done to the prompt."""
    report = stream.report
    where = (
        f"no layer selected ({report.no_selection_reason})"
        if report.selection_layer is None
        else f"selected after layer {shape.layer_name(report.selection_layer)}"
    )
    return (
        f"{report.num_prompt_tokens:,} prompt tokens, {where}, "
        f"{report.num_selected_tokens:,} went on; KV {report.kv_bytes_kept / 2**20:.1f} of "
        f"{report.kv_bytes_full / 2**20:.1f} MiB; {len(stream.token_ids):,} tokens generated"
    )


def _unpruned(stream: CompletionStream, winnow: Winnow) -> str:
    """Why a prompt that was long enough was computed whole, and what to do."""
    layer_idx, least = min(stream.report.rho, key=lambda one: one[1])
    return (
        f"the prompt was computed whole: relative rank variance came down to {least:.2g} (layer "
        f"{winnow.model.shape.layer_name(layer_idx)}), not below the threshold, "
        f"{winnow.pruning.threshold:g}; `winnow calibrate` finds settings "
        "for the model, latest_layer a layer that selects in any case"
    )
