"""Adapters that Winnow cannot run are refused by one line, with number and limit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models_in_code import save_tiny_model
from tests.winnow import reference
from tests.winnow.adapters.made import linears, save_adapter
from winnow.adapters.description import AdapterDescription, describe_adapter, room_for
from winnow.adapters.ref import variant_fingerprint
from winnow.errors import InvalidSetting, UnusableAdapter

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sizes(tiny_models: dict[str, Path]) -> dict[str, tuple[int, int]]:
    found = linears(reference.load(tiny_models["llama"]))
    return {name: (one.out_features, one.in_features) for name, one in found.items()}


def test_knows_ranks_scales_and_modules(
    tiny_models: dict[str, Path], tmp_path: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    folder = save_adapter(
        *(tmp_path, tiny_models["llama"]),
        rank=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"o_proj": 9},
        alpha_pattern={r"layers\.2\..*\.o_proj": 1},
        targets=("q_proj", "o_proj"),
    )
    found = describe_adapter("mine", folder, sizes)
    assert len(found.modules) == 8
    assert found.rank == 9
    scales = {name.removeprefix("model.layers."): m.scale for name, m in found.modules.items()}
    assert scales["0.self_attn.q_proj"] == 6 / 4**0.5
    assert scales["1.self_attn.o_proj"] == 6 / 9**0.5
    assert scales["2.self_attn.o_proj"] == 1 / 9**0.5


def test_the_digest_changes_with_weights_and_configuration(
    tiny_models: dict[str, Path], tmp_path: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    def digest(name: str, **changes: Any) -> str:
        folder = save_adapter(tmp_path / name, tiny_models["llama"], **changes)
        return describe_adapter(name, folder, sizes).digest

    digests = [digest("one"), digest("other", seed=2), digest("scaled", lora_alpha=9)]
    assert len(set(digests)) == 3
    assert digests[0] == digest("same")
    prints = {variant_fingerprint("model", one) for one in (*digests, None)}
    assert len(prints) == 4
    assert variant_fingerprint("model", None) == "model"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "use_dora is True, that is DoRA; Winnow runs plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; Winnow runs LORA"),
        ({"bias": "all"}, "bias is 'all'; Winnow runs adapters with none"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], that is whole"),
        ({"init_lora_weights": "pissa_niter_4"}, "trains against other base weights"),
        ({"r": 0}, "r is 0; it is a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern of q_proj is '4'; it is a whole number"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\]; it is an object"),
        ({"lora_alpha": None}, "lora_alpha is None; it is a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; it is a finite number"),
        ({"alpha_pattern": {"q_proj": 1e400}}, "alpha_pattern of q_proj is inf; it is a finite"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; it is true or false"),
        (
            {"target_modules": "(q"},
            r"target_modules is '\(q'; it is no regular expression: missing",
        ),
        ({"target_modules": 5}, "target_modules is 5; it is a regular expression or a list"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0'; it is a layer's number or"),
        ({"target_modules": r".*\.[qk]_proj"}, "lacks 8 tensors of the modules .*k_proj A"),
        ({"r": 8}, r"A of .*q_proj is \[4, 64\]; .* rank 8 it is \[8, 64\]"),
        ({"target_modules": ["q_proj", "o_proj"]}, "lacks 8 tensors of the modules .*o_proj A"),
        ({"target_modules": "all-linear"}, "lacks 48 tensors"),
    ],
)
def test_refuses_what_it_does_not_compute(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    sizes: dict[str, tuple[int, int]],
    config: dict[str, Any],
    told: str,
) -> None:
    save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(UnusableAdapter, match=told) as refused:
        describe_adapter("mine", tmp_path, sizes)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({f"{FIRST}.lora_B.weight": None}, r"lacks 1 tensors .*0.self_attn.q_proj B"),
        (
            {f"{FIRST}.lora_A.weight": None, f"{FIRST}.lora_B.weight": None},
            "lacks 2 tensors",
        ),
        (
            {f"{FIRST}.lora_magnitude_vector": torch.ones(64)},
            "has 1 tensors that are no A or B .*lora_magnitude_vector",
        ),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)},
            "has 1 tensors that are no A or B .*lm_head.lora_A.weight; it is of another base model",
        ),
        (
            {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
            "layers.7.self_attn.q_proj",
        ),
        ({f"{FIRST}.lora_A.weight": torch.ones(4, 64).int()}, "is torch.int32; it must be float"),
        (
            {f"{FIRST}.lora_A.default.weight": torch.ones(4, 64)},
            r"has 1 tensors that are no A or B .*q_proj.lora_A.(default.)?weight",
        ),
        (
            {
                "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 300),
                "base_model.model.lm_head.weight": torch.ones(300, 64),
            },
            "has 2 tensors that are no A or B .*such as embeddings, the LM head or experts",
        ),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    sizes: dict[str, tuple[int, int]],
    tensors: dict[str, Any],
    told: str,
) -> None:
    save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",), tensors=tensors)
    with pytest.raises(UnusableAdapter, match=told):
        describe_adapter("mine", tmp_path, sizes)


@pytest.mark.parametrize("body", ["model.language_model.layers", "transformer.h"])
def test_finds_layers_by_other_names(
    tiny_models: dict[str, Path], tmp_path: Path, sizes: dict[str, tuple[int, int]], body: str
) -> None:
    folder = save_adapter(tmp_path, tiny_models["llama"], targets=("q_proj",))
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("model.layers", body): t for name, t in load_file(file).items()}
    assert not any("model.model.layers" in name for name in tensors)
    save_file(tensors, file)
    assert len(describe_adapter("mine", folder, sizes).modules) == 4


def test_refuses_an_adapter_of_a_wider_model(
    tmp_path: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    other = save_tiny_model(tmp_path / "wide", hidden_size=96, num_hidden_layers=2)
    folder = save_adapter(tmp_path / "adapter", other)
    told = r"does not fit the model: B of .*down_proj is \[96, 4\]; with the model's 128 inputs"
    with pytest.raises(UnusableAdapter, match=told):
        describe_adapter("mine", folder, sizes)


def test_refuses_folders_that_hold_no_adapter(
    tiny_models: dict[str, Path], tmp_path: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    def describe(folder: Path) -> AdapterDescription:
        return describe_adapter("mine", folder, sizes)

    with pytest.raises(UnusableAdapter, match=r"folder .*nowhere does not exist"):
        describe(tmp_path / "nowhere")
    with pytest.raises(UnusableAdapter, match=r"has no adapter_config.json"):
        describe(tmp_path)
    folder = save_adapter(tmp_path, tiny_models["llama"])
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UnusableAdapter, match=r"has no adapter_model.safetensors \(other formats"):
        describe(folder)
    (folder / "adapter_model.bin").rename(weights)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnusableAdapter, match=r"adapter_model.safetensors is broken"):
        describe(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UnusableAdapter, match=r"no adapter_model.safetensors \(other formats"):
        describe(folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(UnusableAdapter, match=r"adapter mine in .* cannot be read"):
        describe(folder)


@pytest.mark.parametrize("name", ["", "a b", "a=b", "-a", "a,b"])
def test_refuses_names_that_cannot_be_written(
    tmp_path: Path, sizes: dict[str, tuple[int, int]], name: str
) -> None:
    with pytest.raises(InvalidSetting, match="is no adapter's name"):
        describe_adapter(name, tmp_path, sizes)
    with pytest.raises(InvalidSetting, match="has 129 characters; the limit is 128"):
        describe_adapter("a" * 129, tmp_path, sizes)


def test_room_is_for_the_adapters_that_are_named(
    tiny_models: dict[str, Path], tmp_path: Path, sizes: dict[str, tuple[int, int]]
) -> None:
    folder = save_adapter(tmp_path, tiny_models["llama"], rank=5, rank_pattern={"o_proj": 7})
    named = {"one": folder}
    assert room_for({}) is None
    room = room_for(named)
    assert room is not None
    assert (room.max_adapters, room.max_rank) == (1, 7)
    room = room_for({}, 3)
    assert room is not None
    assert (room.max_adapters, room.max_rank) == (3, 16)
    with pytest.raises(InvalidSetting, match="max_adapters is 1; 2 adapters are named"):
        room_for({"one": folder, "two": folder}, 1)
    with pytest.raises(UnusableAdapter, match="rank 7; the limit is max_adapter_rank 6"):
        describe_adapter("one", folder, sizes, 6)
