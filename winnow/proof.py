"""Smoke test of a loaded model: the engines prefill one prompt and run one decode step."""

from dataclasses import replace

import torch

from winnow.completion import generation_spec, prefill_into
from winnow.decoder import DecoderModel
from winnow.engine.decode import DecodeEngine
from winnow.engine.kv_pool import KVPoolConfig
from winnow.errors import UnusableModel, WinnowError
from winnow.folder_errors import as_unusable
from winnow.kv import ModelShape
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams

_PROMPT_TOKENS = 16
_PAGE_SIZE = 16
_PAGES_PER_HEAD = 4


def require_runs(model: DecoderModel) -> None:
    """Raise UnusableModel unless the model completes a short, pruned prompt with finite logits."""
    path = model.description.path
    with as_unusable(f"model {path} was loaded, but cannot be run"):
        try:
            _answer(model)
        except WinnowError as error:
            raise UnusableModel(f"model {path} cannot be run: {error}") from error


def _answer(model: DecoderModel) -> None:
    """Generate two tokens: the first comes from prefill, the second from a decode step."""
    num_tokens = min(_PROMPT_TOKENS, model.max_positions - 1)
    token_ids = [idx % model.vocab_size for idx in range(num_tokens)]
    pruning = _pruning(model.shape)
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    engine = DecodeEngine(model, pool_config=_small_pool(model), max_batch_size=1)
    spec = generation_spec("proof", model, token_ids, pruning, sampling)
    reservation = engine.reserve(spec)
    result = prefill_into(reservation, model, token_ids, pruning)
    engine.start(reservation, result.final_hidden, result.report.next_position)
    while engine.stats().running_sequences:
        for output in engine.step():
            if output.error is not None:
                raise output.error


def _pruning(shape: ModelShape) -> PruningSettings:
    """Selects at half depth, if there is a full layer to select after."""
    small = PruningSettings(window_size=2, kernel_size=3, select_tokens=8, kv_budget=8)
    if not shape.full_layers:
        return replace(small, method="full")
    middle = shape.nearest_full((shape.num_layers - 1) // 2)
    return replace(small, method="fastkv", fixed_layer=middle)


def _small_pool(model: DecoderModel) -> KVPoolConfig:
    shape = model.shape
    num_pages = 1 + shape.total_kv_heads * _PAGES_PER_HEAD
    page_bytes = _PAGE_SIZE * (shape.kv_bytes(1) + torch.int32.itemsize)
    return KVPoolConfig(num_pages * page_bytes + 2 * shape.state_bytes, _PAGE_SIZE)
