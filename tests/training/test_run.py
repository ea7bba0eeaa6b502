"""A run that is killed and started again goes on as if nothing had happened."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from training import train
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


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Mean distance of two models' weights."""
    assert one.keys() == other.keys()
    return sum(float((one[name] - other[name]).abs().mean()) for name in one) / len(one)


@pytest.mark.usefixtures("short_runs")
def test_resumes_where_it_stopped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = _trained(tmp_path / "whole", tokenizer, ("basics",))
    again = _trained(tmp_path / "again", tokenizer, ("basics",))  # bf16 sums differ a little
    half = _trained(tmp_path / "parts", tokenizer, ("first",))
    parts = _trained(tmp_path / "parts", tokenizer, ("basics",))
    noise = _distance(whole, again)
    assert _distance(whole, parts) <= 2 * noise + 1e-8
    assert _distance(whole, half) > 5 * noise
    state = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["tokens"] == 4 * STEP_TOKENS


@pytest.mark.usefixtures("short_runs")
def test_learns_and_says_how_it_goes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOG_INTERVAL_STEPS", 1)
    monkeypatch.setattr(train, "WARMUP_STEPS", 1)
    before = Trainer(0, tmp_path / "fresh", tmp_path / "x")._model.state_dict()
    after = _trained(tmp_path / "run", tokenizer, ("basics",))
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["accuracy"]["loss"] > 0 for line in lines)
