"""A run that is killed and started again goes on as if nothing had happened."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from training import train
from training.batches import Batch, make_batch
from training.curriculum import CURRICULUM
from training.train import Trainer

STEP_TOKENS = 4096


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    basics = dataclasses.replace(CURRICULUM[0], lengths=(64,), shares=(1.0,))
    stages = tuple(dataclasses.replace(basics, max_tokens=n * STEP_TOKENS) for n in (2, 2))
    first = dataclasses.replace(stages[0], name="first")
    monkeypatch.setattr(train, "CURRICULUM", (first, stages[1]))


def _trained(
    folder: Path, tokenizer: PreTrainedTokenizerFast, stages: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    tokenizer.save_pretrained(folder / "tokenizer")
    for stage in stages:
        trainer = Trainer(0, folder, folder / "export")
        trainer.run(stage)
    return {name: p.detach().clone() for name, p in trainer._model.named_parameters()}


@pytest.mark.usefixtures("short_runs")
def test_resumes_where_it_stopped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOG_INTERVAL_STEPS", 1)
    drawn: list[torch.Tensor] = []

    def drawing(*arguments: Any) -> Batch:
        drawn.append((batch := make_batch(*arguments)).tokens)
        return batch

    monkeypatch.setattr(train, "make_batch", drawing)
    _trained(tmp_path / "whole", tokenizer, ("basics",))
    _trained(tmp_path / "parts", tokenizer, ("first", "basics"))
    of_whole, of_parts = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert all(map(torch.equal, of_whole, of_parts))
    whole, parts = (_log(tmp_path / name) for name in ("whole", "parts"))
    assert [line["tokens"] for line in parts] == [STEP_TOKENS * n for n in (1, 2, 3, 4)]
    losses = [line["accuracy"]["loss"] for line in parts]
    # Sums of bf16 differ a little; had it begun anew, the third loss would be the first's.
    assert losses == pytest.approx([line["accuracy"]["loss"] for line in whole], rel=1e-2)
    assert losses[2] < 0.97 * losses[0]
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert {int(of["step"]) for of in state["optimizer"]["state"].values()} == {4}


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("short_runs")
def test_learns_and_says_how_it_goes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOG_INTERVAL_STEPS", 1)
    monkeypatch.setattr(train, "WARMUP_STEPS", 1)
    before = Trainer(0, tmp_path / "fresh", tmp_path / "x")._model.state_dict()
    after = _trained(tmp_path / "run", tokenizer, ("basics",))
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    lines = _log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["accuracy"]["loss"] > 0 for line in lines)
