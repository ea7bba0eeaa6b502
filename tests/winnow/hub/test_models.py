"""A model of the hub is what the same files are in a folder."""

from pathlib import Path

import pytest

from tests.gguf_in_code import write_gguf
from tests.hub import Hub
from winnow import SamplingParams, Winnow
from winnow.errors import UnusableModel
from winnow.model_files import describe_model

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_answers_as_the_folder_does(hub: Hub, tiny_models: dict[str, Path]) -> None:
    commit = hub.add("o/tiny", files_of(tiny_models["llama"]), "v1")
    hub.add("o/tiny", {"config.json": b"{}", "model.safetensors": b"another"})
    theirs, ours = Winnow.load("o/tiny@v1"), Winnow.load(tiny_models["llama"])
    assert theirs.generate("a b c", GREEDY).token_ids == ours.generate("a b c", GREEDY).token_ids
    assert theirs.model.description.path.name == commit


def test_its_fingerprint_is_that_of_its_files(hub: Hub, tiny_models: dict[str, Path]) -> None:
    files = files_of(tiny_models["llama"])
    hub.add("o/tiny", files)
    hub.add("o/tiny", files | {"README.md": b"another commit"}, "next")
    folder = describe_model(tiny_models["llama"])
    first, second = describe_model("o/tiny"), describe_model("o/tiny@next")
    assert first.path != second.path
    assert first.fingerprint == second.fingerprint == folder.fingerprint


def test_a_gguf_file_is_loaded(hub: Hub, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny-F32.gguf", tiny_models["llama"])
    hub.add("o/tiny-GGUF", {"q/tiny-F32.gguf": file.read_bytes(), "q/tiny-Q8_0.gguf": b"other"})
    found = describe_model("o/tiny-GGUF:f32")
    assert found.path.name == file.name
    assert found.fingerprint == describe_model(file).fingerprint


@pytest.mark.parametrize("model", ["s3://bucket/model", "https://huggingface.co/o/n", "hf://o/n"])
def test_addresses_are_refused_with_what_to_do(model: str) -> None:
    with pytest.raises(UnusableModel, match=r"is an address; .* like org/name"):
        describe_model(model)
