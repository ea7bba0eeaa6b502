"""Which files of a repository are fetched."""

import json
from pathlib import Path

import pytest

from winnow.errors import UnusableModel
from winnow.hub.choice import is_gguf_model, small_files, weights
from winnow.hub.reference import parse

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
QUANTS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q8_0.gguf", "m-f16.gguf"]
PARTS = [f"BF16/m-BF16-0000{number}-of-00002.gguf" for number in (1, 2)]
PROJECTOR = "mmproj-f16.gguf"


def chosen(model: str, names: list[str], folder: Path = Path("/nowhere")) -> list[str]:
    parsed = parse(model)
    assert parsed is not None
    return weights(parsed, names, folder)


def with_index(folder: Path, shards: list[str]) -> Path:
    weight_map = {f"tensor{idx}": shard for idx, shard in enumerate(shards)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_weights_that_are_there_twice_are_fetched_once(tmp_path: Path) -> None:
    others = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"]
    assert chosen("o/n", [*others, "model.safetensors", "config.json"]) == ["model.safetensors"]
    names = [*others, *SHARDS, INDEX]
    assert chosen("o/n", names, with_index(tmp_path, SHARDS)) == SHARDS


def test_a_missing_shard_is_named_with_the_count(tmp_path: Path) -> None:
    folder = with_index(tmp_path, SHARDS)
    with pytest.raises(UnusableModel, match=f"'{SHARDS[1]}': 1 of its 3 files are not there"):
        chosen("o/n", [SHARDS[0], SHARDS[2], INDEX], folder)


def test_configuration_and_tokenizer_come_along() -> None:
    wanted = ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", INDEX]
    wanted += ["additional_chat_templates/tools.jinja"]
    others = ["consolidated.safetensors.index.json", "model.safetensors.index.fp16.json"]
    others += ["README.md", "onnx/config.json", "original/params.json", "tf_model.h5", *SHARDS]
    model = parse("o/n")
    assert model is not None
    assert small_files(model, [*others, *wanted]) == sorted(wanted)


def test_formats_that_can_run_code_are_refused_by_name() -> None:
    with pytest.raises(UnusableModel, match=r"no \*.gguf file; it has pytorch_model.bin"):
        chosen("o/n", ["config.json", "pytorch_model.bin"])


@pytest.mark.parametrize(
    ("model", "names", "files"),
    [
        ("o/n", ["m-Q8_0.gguf", PROJECTOR, "README.md"], ["m-Q8_0.gguf"]),
        ("o/n", PARTS, PARTS),
        ("o/n", ["config.json", "m-Q8_0.gguf"], ["m-Q8_0.gguf"]),
        ("o/n:Q4_K_M", QUANTS, ["m-Q4_K_M.gguf"]),
        ("o/n:q8_0", [*QUANTS, *PARTS], ["m-Q8_0.gguf"]),
        ("o/n:BF16", [*QUANTS, *PARTS], PARTS),
        ("o/n:f16", [*QUANTS, PROJECTOR], ["m-f16.gguf"]),
        ("o/n/m-Q4_K_S.gguf", QUANTS, ["m-Q4_K_S.gguf"]),
        ("o/n/BF16/m-BF16-00001-of-00002.gguf", [*QUANTS, *PARTS], PARTS),
        ("o/n:Q8_0", ["config.json", "model.safetensors", *QUANTS], ["m-Q8_0.gguf"]),
        ("o/n:Q8_0", ["mtp-m-Q8_0.gguf", "m-Q8_0.gguf"], ["m-Q8_0.gguf"]),
        ("o/n:Q8_0", ["m-UD-Q8_0.gguf", "m-Q8_0-f16.gguf", "m-Q8_0.gguf"], ["m-Q8_0.gguf"]),
        ("o/n:UD-Q8_0", ["m-UD-Q8_0.gguf", "m-Q8_0.gguf"], ["m-UD-Q8_0.gguf"]),
        ("o/n:Q8_0", ["Q8_0/model.gguf", "Q4_0/model.gguf"], ["Q8_0/model.gguf"]),
    ],
)
def test_gguf_models_are_chosen_by_name(model: str, names: list[str], files: list[str]) -> None:
    assert chosen(model, names) == files


@pytest.mark.parametrize(
    ("model", "names", "reason"),
    [
        ("o/n", QUANTS, "has 4 GGUF models; there are m-Q4_K_M.gguf, m-Q4_K_S.gguf"),
        ("o/n:Q4_K", QUANTS, "has no GGUF file of Q4_K; there are m-Q4_K_M.gguf"),
        ("o/n:Q2_K", ["model.safetensors"], "has no GGUF file of Q2_K"),
        ("o/n/x.gguf", QUANTS, "has no GGUF file of x.gguf; there are"),
        ("o/n:BF16", PARTS[:1], f"1 of 2 files are missing: {PARTS[1]}"),
        ("o/n:Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "has 2 GGUF models of Q8_0"),
    ],
)
def test_unclear_gguf_models_are_refused(model: str, names: list[str], reason: str) -> None:
    with pytest.raises(UnusableModel, match=reason):
        chosen(model, names)


def test_safetensors_go_before_gguf() -> None:
    model = parse("o/n")
    assert model is not None
    assert not is_gguf_model(model, ["model.safetensors", *QUANTS])
    assert is_gguf_model(model, ["config.json", *QUANTS])
