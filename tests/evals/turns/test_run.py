"""Whole runs of `winnow eval --turns` on a tiny random checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from evals import local_model
from services.cli.main import main
from tests.models_in_code import save_tiny_model
from tests.winnow.adapters.made import save_adapter
from winnow.engine.prefix.store import PrefixStore

NUM_TURNS, NUM_SAMPLES = 3, 2
WAYS = [
    "full, from scratch",
    "full, prefix store",
    "fastkv:fixed_layer=1 at 128, prefix store",
    "fastkv:fixed_layer=1 at 128, kept from turn 1",
]


def flags(model: Path, folder: Path, *more: str) -> list[str]:
    usual = ["--turns", str(NUM_TURNS), "--samples", str(NUM_SAMPLES), "--length", "1k"]
    own = ["--methods", "full,fastkv:fixed_layer=1", "--budget", "128"]
    where = ["--model", str(model), "-o", str(folder), "--num-threads", "1"]
    return ["eval", *usual, *own, *where, *more]


@pytest.fixture(scope="module")
def found(
    tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("turns") / "run"
    assert main(flags(tiny_models["llama"], folder)) == 0
    return folder, json.loads((folder / "turns.json").read_text())


def answers(found: dict[str, Any], way: str) -> list[dict[str, Any]]:
    return [one for one in found["answers"] if one["place"][1] == way]


def test_every_turn_is_answered_in_every_way(found: tuple[Path, dict[str, Any]]) -> None:
    folder, content = found
    assert list(dict.fromkeys(one["place"][1] for one in content["means"])) == WAYS
    for way in WAYS:
        own = answers(content, way)
        assert [(one["index"], one["turn"]) for one in own] == [
            (index, turn) for index in range(NUM_SAMPLES) for turn in range(1, NUM_TURNS + 1)
        ]
    assert {path.name for path in folder.iterdir()} == {"turns.json", "turns_1024.png"}


def test_answers_with_the_store_are_those_from_scratch(
    found: tuple[Path, dict[str, Any]],
) -> None:
    _, content = found
    scratch, store = (answers(content, way) for way in WAYS[:2])
    assert [one["answer"] for one in store] == [one["answer"] for one in scratch]


def test_an_adapter_answers_every_turn(
    tiny_models: dict[str, Path], found: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, folder = tiny_models["llama"], tmp_path / "run"
    save_adapter(tmp_path / "law", model)
    own = ("--adapters", f"law={tmp_path / 'law'}", "--adapter", "law")
    assert main(flags(model, folder, "--samples", "1", *own)) == 0
    content = json.loads((folder / "turns.json").read_text())
    assert list(content["settings"]["adapters"]) == ["law"]
    by_way = {way: [one["answer"] for one in answers(content, way)] for way in WAYS}
    plain = {way: [one["answer"] for one in answers(found[1], way)][:NUM_TURNS] for way in WAYS}
    assert by_way[WAYS[0]] == by_way[WAYS[1]]
    for way in WAYS:
        assert all(one != other for one, other in zip(by_way[way], plain[way], strict=True)), way


def test_only_the_first_turn_computes_the_document(found: tuple[Path, dict[str, Any]]) -> None:
    _, content = found
    for way in WAYS[1:]:
        own = [one for one in content["means"] if one["place"][1] == way]
        first, *later = (one["computed_share"] for one in own)
        assert all(share < first / 2 for share in later)
    scratch = [one for one in content["means"] if one["place"][1] == WAYS[0]]
    assert [one["computed_share"] for one in scratch] == [1, 1, 1]
    assert all(one["ttft_s"] > 0 for one in content["means"])


def test_prints_a_table_per_figure(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tiny_models["llama"], tmp_path / "run", "--samples", "1")) == 0
    shown = capsys.readouterr().out
    assert "1,024 tokens, 1 conversation\n" in shown
    for words in ("score, %", "layer-tokens computed, %", "time to first token, s", *WAYS[:2]):
        assert words in shown


def test_the_store_is_where_the_settings_say(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Seen(PrefixStore):
        @classmethod
        def within(cls, *args: Any, **settings: Any) -> PrefixStore | None:
            seen.append(settings)
            return super().within(*args, **settings)

    monkeypatch.setattr(local_model, "PrefixStore", Seen)
    more = ("--samples", "1", "--turns", "1", "--prefix-cache-device", "host")
    beside_model = ("--prefix-cache-device-bytes", "2MiB")
    assert main(flags(tiny_models["llama"], tmp_path / "run", *more, *beside_model)) == 0
    (settings,) = seen
    assert settings == {
        "prefix_cache_bytes": 1 << 30,
        "prefix_cache_device": "host",
        "prefix_cache_device_bytes": 2 << 20,
        "kv_dtype": "auto",
    }


def test_refuses_to_keep_what_a_question_left_in_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen3_next")
    assert main(flags(model, tmp_path / "run")) != 0
    assert "the model has layers with a state" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--turns", "0"], "--turns is 0; it must be at least 1"),
        (["--methods", "full,gemfilter"], "--turns: gemfilter computes the kept tokens anew"),
        (["--endpoint", "http://127.0.0.1:1"], "without --endpoint"),
        (["--data-dir", "."], "without --data-dir"),
        (["--prefix-cache-bytes", "1000"], "prefix_cache_bytes is 1,000; one layer of 128"),
        (["--length", "100k"], "--length 102,400: the model has 8,192 positions"),
    ],
)
def test_refuses_what_cannot_run(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    complaint: str,
) -> None:
    assert main(flags(tiny_models["llama"], tmp_path / "run", *more)) != 0
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
