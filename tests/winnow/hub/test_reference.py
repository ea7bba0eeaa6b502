"""Names of models on the hub."""

import pytest

from winnow.errors import UnusableModel
from winnow.hub.reference import HubModel, parse, short_name


@pytest.mark.parametrize(
    ("text", "model", "name"),
    [
        ("org/name", HubModel("org/name"), "name"),
        ("org/name-1.5_B@v1.0", HubModel("org/name-1.5_B", "v1.0"), "name-1.5_B"),
        ("org/name@refs/pr/3", HubModel("org/name", "refs/pr/3"), "name"),
        ("org/name-GGUF:Q4_K_M", HubModel("org/name-GGUF", quantization="Q4_K_M"), "name-GGUF"),
        ("o/n@dev:Q8_0", HubModel("o/n", "dev", quantization="Q8_0"), "n"),
        ("o/n:Q8_0@dev", HubModel("o/n", "dev", quantization="Q8_0"), "n"),
        ("o/n/sub/m.Q4_0.gguf@dev", HubModel("o/n", "dev", file="sub/m.Q4_0.gguf"), "m.Q4_0"),
    ],
)
def test_names_are_taken_apart(text: str, model: HubModel, name: str) -> None:
    assert parse(text) == model
    assert short_name(text) == name
    assert parse(str(model)) == model


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "../name", "/org/name", "~/name", "a/b/c", "a//b", "a b/c", ""]
)
def test_paths_are_no_models_of_the_hub(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("text", ["o/n@", "o/n:", "o/n@a@b", "o/n:Q4_0:Q8_0", "o/n/m.gguf:Q4_0"])
def test_half_a_name_is_refused(text: str) -> None:
    with pytest.raises(UnusableModel, match=r"org/name, then @revision"):
        parse(text)


@pytest.mark.parametrize(
    ("path", "name"), [("/models/x", "x"), ("/models/m.Q4_0.gguf", "m.Q4_0"), ("x@y", "x@y")]
)
def test_folders_and_files_keep_their_names(path: str, name: str) -> None:
    assert short_name(path) == name
