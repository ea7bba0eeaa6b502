"""Whole runs of `winnow eval` on tiny random checkpoints."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from evals.records import Record
from services.cli.main import main
from tests.evals.run_records import outcomes, records_in
from tests.models_in_code import save_tiny_model
from winnow import PruningSettings, SamplingParams, Winnow

METHODS = "full,snapkv,asl:threshold=0.9"
TASKS = "passkey,vt,niah"


def run(model: Path, folder: Path, *flags: str) -> list[Record]:
    """The records of `winnow eval`; `flags` win over the usual ones."""
    usual = ["--methods", METHODS, "--tasks", TASKS, "--length", "768,1k", "--budget", "64,128"]
    own = ["--samples", "2", "--model", str(model), "-o", str(folder), "--num-threads", "1"]
    assert main(["eval", *usual, *own, *flags]) == 0
    return records_in(folder)


@pytest.fixture(scope="module")
def finished(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Record]]:
    """A run's folder and records."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    return folder, run(tiny_models["llama"], folder)


def test_every_sample_is_answered_once(finished: tuple[Path, list[Record]]) -> None:
    _, records = finished
    assert len({record.key for record in records}) == len(records) == 3 * 2 * 2 * 5
    assert {r.budget for r in records if r.method == "full"} == {None}
    assert {r.budget for r in records if r.method == "snapkv"} == {64, 128}
    assert all(0.7 * r.length < r.num_prompt_tokens <= r.length for r in records)
    assert all(0 <= r.score <= 1 and r.references and r.seconds >= r.prefill_s for r in records)
    assert {r.depth is not None for r in records if r.task == "niah"} == {True}


def test_figures_are_those_of_the_method(finished: tuple[Path, list[Record]]) -> None:
    _, records = finished
    for record in records:
        kept = record.kv_bytes_kept / record.kv_bytes_full
        if record.method == "full":
            assert (kept, record.computed_share, record.rho) == (1, 1, ())
        else:
            assert kept == pytest.approx((record.budget or 0) / record.num_prompt_tokens)
        if record.method.startswith("asl"):
            assert (record.selection_layer is not None) == (record.computed_share < 1)
            assert record.rho[0] == (1, 1.0)
    assert any(r.selection_layer is not None for r in records)


def test_the_summary_and_the_pictures_lie_beside_the_records(
    finished: tuple[Path, list[Record]],
) -> None:
    folder, records = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"]["tasks"] == sorted(TASKS.split(","), key=summary_order(summary))
    assert len(summary["cells"]) == 3 * 2 * 5
    assert sum(cell["count"] for cell in summary["cells"]) == len(records)
    assert len(summary["overall"]) == 2 * 5
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures >= {"accuracy_vs_budget.png", "selection_layer.png", "rho.png"}
    assert "niah_asl-threshold-0.9_64.png" in pictures


def test_without_matplotlib_all_but_the_pictures_is_there_and_they_can_follow(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = ("--methods", "asl", "--tasks", "niah", "--samples", "1", "--length", "768")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        records = run(tiny_models["llama"], tmp_path / "run", *few)
    assert "matplotlib is missing: pip install 'winnow-serve[eval]'" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").exists()
    assert list(tmp_path.rglob("*.png")) == []
    assert run(tiny_models["llama"], tmp_path / "run", *few) == records
    assert "no pictures" not in capsys.readouterr().out
    assert list(tmp_path.rglob("*.png")) != []


def summary_order(summary: dict[str, Any]) -> Any:
    return [cell["task"] for cell in summary["cells"]].index


def test_an_answer_is_the_one_that_the_library_gives(
    finished: tuple[Path, list[Record]], tiny_models: dict[str, Path]
) -> None:
    from evals.tasks import make_tasks

    _, records = finished
    record = next(r for r in records if r.task == "passkey" and r.method == "snapkv")
    winnow = Winnow.load(tiny_models["llama"], method="snapkv", kv_budget=record.budget)
    (task,) = (task for task in make_tasks(11, None) if task.name == "passkey")

    def count(text: str) -> int:
        return len(winnow.tokenizer.encode(text, add_special_tokens=False))

    example = task.example(record.index, 0, record.length, count)
    sampling = SamplingParams(max_tokens=example.max_new_tokens, temperature=0)
    assert winnow.generate(example.prompt(), sampling).text == record.answer
    assert record.references == example.answers


def test_the_batch_changes_nothing_but_the_seed_everything(
    finished: tuple[Path, list[Record]], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    _, records = finished
    alone = run(tiny_models["llama"], tmp_path / "alone", "--batch-size", "1")
    assert outcomes(alone) == outcomes(records)
    other = run(tiny_models["llama"], tmp_path / "other", "--seed", "1", "--methods", "full")
    for record in other:
        assert record.references != outcomes(records)[record.key][-1]


def test_a_budget_above_the_prompt_length_answers_as_full(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    methods = "full,snapkv,fastkv:fixed_layer=1,gemfilter,asl"
    records = run(tiny_models["llama"], tmp_path / "run", "--methods", methods, "--budget", "2048")
    full = {(r.task, r.length, r.index): r.answer for r in records if r.method == "full"}
    assert len(records) == 5 * len(full)
    assert all(r.answer == full[r.task, r.length, r.index] for r in records)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several safetensors files, as large models are shipped."""
    folder = save_tiny_model(tmp_path_factory.mktemp("sharded"), "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_a_sharded_checkpoint_in_its_own_chat_template(sharded: Path, tmp_path: Path) -> None:
    plain = run(sharded, tmp_path / "plain", "--methods", "full", "--length", "1k")
    chat = run(sharded, tmp_path / "chat", "--methods", "full", "--length", "1k", "--chat")
    assert all(0.7 * r.length < r.num_prompt_tokens <= r.length for r in [*plain, *chat])
    assert all(a.answer != b.answer for a, b in zip(plain, chat, strict=True))
    assert json.loads((tmp_path / "chat" / "settings.json").read_text())["chat"] is True


def test_prompts_leave_room_for_the_answer_at_the_models_last_position(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    records = run(model, tmp_path / "run", "--methods", "full", "--length", "1k")
    assert all(900 < r.num_prompt_tokens + r.num_answer_tokens <= 1024 for r in records)


def test_a_finished_run_is_only_shown_again(
    finished: tuple[Path, list[Record]],
    tiny_models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, records = finished
    before = (folder / "samples.jsonl").read_bytes()
    assert run(tiny_models["llama"], folder) == records
    assert (folder / "samples.jsonl").read_bytes() == before
    assert "1,024 tokens, 2 samples a task" in capsys.readouterr().out


def test_the_models_pruning_is_what_a_method_starts_from(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    records = run(
        tiny_models["llama"],
        tmp_path / "run",
        *("--methods", "asl,asl:compression=none", "--pruning", "threshold=100"),
        *("--length", "768", "--budget", "64"),
    )
    assert PruningSettings().threshold != 100
    for record in records:  # ρ is below 100 wherever it is looked at
        assert record.selection_layer == 1
        assert (record.kv_bytes_kept * 4 < record.kv_bytes_full) == (record.method == "asl")
