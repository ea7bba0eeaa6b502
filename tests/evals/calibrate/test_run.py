"""Whole calibrations of tiny random checkpoints, on prompts whose unpruned answer counts."""

import json
from pathlib import Path

import pytest

from evals.calibrate.report import PICTURE
from evals.records import SAMPLES_FILE
from services.cli.main import main
from tests.winnow.shapes import shape_of
from winnow.defaults import override, scaled_defaults

NUM_PROMPTS = 8


def write_prompts(file: Path, count: int = NUM_PROMPTS, repeats: int = 6) -> Path:
    rows = [
        {"prompt": f"fox number {n} jumps over {n * 7} lazy dogs. " * repeats} for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def calibrate(model: Path, folder: Path, *flags: str) -> int:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    usual = ["--prompts", str(prompts), "--max-tokens", "4", "--num-threads", "1"]
    where = ["-o", str(folder / "winnow.json"), "--run", str(folder / "run")]
    return main(["calibrate", "--model", str(model), "--prefill", "95%", *usual, *where, *flags])


@pytest.fixture(scope="module")
def finished(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a calibration leaves."""
    folder = tmp_path_factory.mktemp("calibrate")
    assert calibrate(tiny_models["llama"], folder) == 0
    return folder


def test_the_settings_are_those_that_a_model_folder_takes(finished: Path) -> None:
    found = json.loads((finished / "winnow.json").read_text())
    settings = override(scaled_defaults(shape_of(4)), found)
    settings.require_fits(shape_of(4))
    assert {"window_size", "kernel_size", "select_tokens", "kv_budget"} <= found.keys()
    assert settings.method in {"asl", "fastkv"}
    assert (finished / "run" / PICTURE).stat().st_size > 0


def test_held_out_prompts_had_no_say(finished: Path) -> None:
    lines = (finished / "run" / SAMPLES_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    searched = {r["method"] for r in records if r["index"] < NUM_PROMPTS // 2}
    held_out = {r["method"] for r in records if r["index"] >= NUM_PROMPTS // 2}
    assert {r["index"] for r in records} == set(range(NUM_PROMPTS))
    assert len(searched) > 12
    assert len(held_out) <= 6
    assert "full" in held_out


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    finished: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "run").mkdir()
    for name in ("settings.json", SAMPLES_FILE):
        content = (finished / "run" / name).read_bytes()
        part = content[: len(content) // 3] if name == SAMPLES_FILE else content  # a torn line
        (tmp_path / "run" / name).write_bytes(part)
    assert calibrate(tiny_models["llama"], tmp_path) == 0
    assert (tmp_path / "winnow.json").read_text() == (finished / "winnow.json").read_text()
    kept = (finished / "run" / SAMPLES_FILE).read_bytes()
    whole = kept[: len(kept) // 3].rfind(b"\n")
    assert (tmp_path / "run" / SAMPLES_FILE).read_bytes()[:whole] == kept[:whole]


def test_a_finished_run_serves_another_target_without_an_answer_more_to_search(
    finished: Path, tiny_models: dict[str, Path]
) -> None:
    before = (finished / "run" / SAMPLES_FILE).read_text().count("\n")
    flags = ("--prefill", "75%", "-o", str(finished / "other.json"))
    usual = ["--prompts", str(finished / "prompts.jsonl"), "--max-tokens", "4"]
    model = ["--model", str(tiny_models["llama"]), "--num-threads", "1"]
    assert main(["calibrate", *model, *usual, *flags, "--run", str(finished / "run")]) == 0
    after = (finished / "run" / SAMPLES_FILE).read_text().count("\n")
    assert after - before <= 3 * NUM_PROMPTS  # finalists and held-out rows of the new choice


def test_other_settings_of_the_file_stay(finished: Path, tiny_models: dict[str, Path]) -> None:
    output = finished / "kept.json"
    output.write_text('{"decode_budget": 4096}')
    assert calibrate(tiny_models["llama"], finished, "-o", str(output)) == 0
    found = json.loads(output.read_text())
    assert found["decode_budget"] == 4096
    assert found["method"] in {"asl", "fastkv"}


def test_other_prompts_are_another_run(
    finished: Path,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_prompts(tmp_path / "prompts.jsonl", repeats=5)
    run = ("--run", str(finished / "run"))
    assert calibrate(tiny_models["llama"], tmp_path, *run) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a run with other settings" in last
    assert len(last) < 400  # not the prompts themselves
    assert not (tmp_path / "winnow.json").exists()


CASES = {
    "too few prompts": (7, 6, [], "has 7 prompts; it must have at least 8"),
    "prompts shorter than the budget": (8, 1, ["--kv", "500"], "it must have more than kv_budget"),
    "a budget within the window": (8, 6, ["--kv", "1%"], "must be above the narrowest window, 8"),
    "a target that nothing reaches": (8, 6, ["--prefill", "2%"], "no setting computes 2.0% of"),
    "a share that is none": (8, 6, ["--kv", "0%"], "--kv '0%' is not a share"),
    "samples": (8, 6, ["--samples", "1"], "--samples is 1; it must be at least 2"),
    "a folder that is none": (8, 6, ["-o", "/nowhere/winnow.json"], "cannot be written"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_in_one_line_and_nothing_is_written(
    case: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, repeats, flags, message = CASES[case]
    prompts = write_prompts(tmp_path / "prompts.jsonl", count, repeats)
    asked = ["--prompts", str(prompts), "--max-tokens", "4", "--num-threads", "1"]
    where = ["-o", str(tmp_path / "winnow.json"), "--run", str(tmp_path / "run")]
    model = ["--model", str(tiny_models["llama"])]
    assert main(["calibrate", *model, *asked, *where, *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("winnow: ")
    assert message in last
    assert not (tmp_path / "winnow.json").exists()


def test_a_model_that_cannot_answer_its_tasks_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--tasks", "passkey", "--length", "768", "--samples", "2", "--num-threads", "1"]
    where = ["-o", str(tmp_path / "winnow.json"), "--run", str(tmp_path / "run")]
    assert main(["calibrate", "--model", str(tiny_models["llama"]), *asked, *where]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unpruned, the model scores 0% at its best task; it must reach 25%" in last
    assert not (tmp_path / "winnow.json").exists()


def test_prompts_may_differ_in_length(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "a quick dog. " * (10 + 2 * n)} for n in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert calibrate(tiny_models["llama"], tmp_path, "--kv", "40") == 0
    lines = (tmp_path / "run" / SAMPLES_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    selecting = [r for r in records if r["method"].startswith(("asl:", "fastkv:"))]
    assert {
        r["no_selection_reason"] for r in selecting if "latest_layer=null" not in r["method"]
    } == {None}
    assert json.loads((tmp_path / "winnow.json").read_text())["kv_budget"] == 40
