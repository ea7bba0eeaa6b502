"""Observes a prompt's prefill for the scores of its tokens, and how far each of them goes."""

import numpy as np
import torch
from torch import Tensor

from winnow.kv import ModelShape
from winnow.methods.base import Cut, LayerView
from winnow.pruning_settings import PruningSettings
from winnow.selection import token_scores
from winnow.token_scores import TokenScores


class ScoreWatch:
    """A `Watch` of a PrefillRun. The host waits for the device only in `result`."""

    def __init__(self, settings: PruningSettings, num_tokens: int, shape: ModelShape) -> None:
        self._settings = settings
        self._num_tokens = num_tokens
        self._last_layer = shape.num_layers - 1
        self._last_full = max(shape.full_layers, default=None)
        self._layer_idx: int | None = None
        self._scores: Tensor | None = None  # [n], on the device
        self._last_layers: Tensor | None = None  # [N], on the device; None before the first cut
        self._going_on: Tensor | None = None  # indices of the tokens that go on

    def __call__(self, view: LayerView, cut: Cut | None) -> None:
        is_first_cut = cut is not None and self._last_layers is None
        is_end = self._last_layers is None and view.layer_idx == self._last_full
        if (is_first_cut or is_end) and self._num_tokens > self._settings.window_size:
            self._layer_idx = view.layer_idx
            mass = view.window_mass
            total = mass.shape[0] * self._settings.window_size
            self._scores = token_scores(mass, self._settings) / total
        if cut is not None:
            self._drop(view.layer_idx, cut.kept)

    def _drop(self, layer_idx: int, kept: Tensor) -> None:
        """Note that of the tokens that went on so far only those at `kept` go on."""
        if self._last_layers is None or self._going_on is None:
            every = torch.arange(self._num_tokens, device=kept.device)
            self._last_layers = torch.full_like(every, self._last_layer, dtype=torch.int16)
            self._going_on = every
        self._last_layers.index_fill_(0, self._going_on, layer_idx)
        self._going_on = self._going_on[kept]
        self._last_layers.index_fill_(0, self._going_on, self._last_layer)

    def result(self) -> TokenScores:
        """Of a finished run."""
        scores, last_layers = self._scores, self._last_layers
        return TokenScores(
            self._layer_idx,
            np.empty(0, np.float32) if scores is None else scores.cpu().numpy(),
            np.full(self._num_tokens, self._last_layer, np.int16)
            if last_layers is None
            else last_layers.cpu().numpy(),
        )
