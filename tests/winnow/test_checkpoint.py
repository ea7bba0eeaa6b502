"""Checkpoints that are not what their configuration claims, refused before weights are read."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from tests.models_in_code import FAMILIES, save_tiny_model, tiny_config
from tests.winnow import reference
from tests.winnow.checkpoints import EXPERTS, check, save
from winnow import SamplingParams, Winnow
from winnow.errors import UnusableModel
from winnow.model_files import describe_model
from winnow.models import load_model

Tensors = dict[str, Tensor]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny Llama that may be spoilt."""
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def change_config(folder: Path, **changes: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def split(folder: Path, num_first: int = 20) -> tuple[Tensors, Tensors]:
    """Puts the weights into two shards with an index."""
    items = list(load_file(folder / WEIGHTS).items())
    shards = dict(items[:num_first]), dict(items[num_first:])
    (folder / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for name, shard in zip(SHARDS, shards, strict=True):
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_must_be_in_a_file(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    whole = load_file(tiny_models[family] / WEIGHTS)
    folder = Path(shutil.copytree(tiny_models[family], tmp_path / "model"))
    check(folder)
    for name in whole:
        save_file({k: v for k, v in whole.items() if k != name}, folder / WEIGHTS)
        with pytest.raises(UnusableModel) as caught:
            check(folder)
        assert "that are in no file: 1 (" in str(caught.value)
        assert name in str(caught.value)


def test_an_incomplete_checkpoint_is_not_loaded(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(DOWN_PROJ))
    with pytest.raises(UnusableModel, match=rf"in no file: 1 \({DOWN_PROJ}\)"):
        load_model(folder)


def test_only_the_first_names_of_many_are_shown(folder: Path) -> None:
    change_config(folder, num_hidden_layers=6)
    with pytest.raises(UnusableModel, match=r"in no file: 18 \(model\.layers\.4.*, \.\.\.\)$"):
        check(folder)


def test_each_tensor_must_have_a_place(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"v_head.summary.weight": torch.zeros(64)}))
    with pytest.raises(UnusableModel, match=r"no place in the network: 1 \(v_head\.summary"):
        check(folder)


def test_a_configuration_of_fewer_layers_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(UnusableModel, match=r"no place in the network: 9 \(model\.layers\.3\."):
        check(folder)


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].mT.contiguous()}))
    with pytest.raises(UnusableModel, match=rf"{DOWN_PROJ} \[128, 64\] for \[64, 128\]"):
        check(folder)


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({DOWN_PROJ: t[DOWN_PROJ].to(torch.int8)}))
    with pytest.raises(UnusableModel, match=rf"whole numbers.*{DOWN_PROJ} of torch\.int8"):
        check(folder)


def test_rotary_frequencies_of_old_checkpoints_are_left_out(folder: Path) -> None:
    names = [f"model.layers.{idx}.self_attn.rotary_emb.inv_freq" for idx in range(4)]
    change_weights(folder, lambda t: t.update({name: torch.ones(8) for name in names}))
    check(folder)


@pytest.mark.parametrize("stored", ["both", "embeddings", "head"])
def test_tied_parameters_need_be_stored_once(tmp_path: Path, stored: str) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    expected = reference.greedy(reference.load(folder), [1, 2, 3], 5)

    def store(tensors: Tensors) -> None:
        embeddings = tensors.pop("model.embed_tokens.weight")
        if stored != "head":
            tensors["model.embed_tokens.weight"] = embeddings
        if stored != "embeddings":
            tensors["lm_head.weight"] = embeddings.clone()

    winnow = Winnow.load(change_weights(folder, store), method="full")
    sampling = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    assert list(winnow.generate([1, 2, 3], sampling).token_ids) == expected


def test_tied_parameters_need_be_stored_at_all(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    change_weights(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(UnusableModel, match=r"in no file: 2 \(lm_head.*, model\.embed_tokens"):
        check(folder)


def test_untied_parameters_must_both_be_stored(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UnusableModel, match=r"in no file: 1 \(lm_head\.weight\)"):
        check(folder)


@pytest.mark.parametrize(
    "config",
    [MixtralConfig(**EXPERTS), Qwen3MoeConfig(**(EXPERTS | {"head_dim": 16}))],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_that_transformers_fuses_must_all_be_there(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    folder = save(tmp_path / "model", config)
    check(folder)
    expert = next(name for name in load_file(folder / WEIGHTS) if "experts.2." in name)
    change_weights(folder, lambda tensors: tensors.pop(expert))
    with pytest.raises(UnusableModel, match=r"is not what it claims: .*experts"):
        check(folder)


def test_shards_are_read_together(folder: Path) -> None:
    split(folder)
    load_model(folder)


def test_a_shard_that_the_index_omits_is_missed(folder: Path) -> None:
    first, second = split(folder)
    weight_map = dict.fromkeys(first, SHARDS[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnusableModel, match=rf"in no file: {len(second)} "):
        check(folder)


def test_a_shard_that_is_gone_is_named(folder: Path) -> None:
    split(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(UnusableModel, match=f"names '{SHARDS[1]}'"):
        check(folder)


def test_copies_in_other_formats_count_for_nothing(folder: Path) -> None:
    before = describe_model(folder).fingerprint
    index = {"metadata": {}, "weight_map": {"norm": "consolidated-00001-of-00009.safetensors"}}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(next(folder.glob("model*.safetensors")), folder / "consolidated.safetensors")
    assert load_model(folder).fingerprint == before


def test_shards_without_an_index_are_named(folder: Path) -> None:
    split(folder)
    (folder / INDEX).unlink()
    with pytest.raises(UnusableModel, match=rf"no {WEIGHTS} and no {INDEX}.*{SHARDS[0]}"):
        check(folder)


def test_a_tensor_in_two_shards_is_ambiguous(folder: Path) -> None:
    first, second = split(folder)
    name = next(iter(first))
    save_file(second | {name: first[name] + 1}, folder / SHARDS[1])
    with pytest.raises(
        UnusableModel, match=rf"{name} is in two files.*{SHARDS[0]} and {SHARDS[1]}"
    ):
        check(folder)


def test_weights_that_transformers_does_not_load_are_not_looked_at(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    check(folder)


def test_a_link_to_nowhere_is_no_weight_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/nowhere/model.safetensors")
    with pytest.raises(UnusableModel, match="link to one that does not exist"):
        check(folder)


def test_a_number_of_layers_beyond_reason_is_not_built(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**4)
    with pytest.raises(UnusableModel, match=r"39 tensors, but .* 10000 layers"):
        check(folder)
    change_config(folder, num_hidden_layers=10**9)
    with pytest.raises(UnusableModel, match="1,000,000,000 layers; the limit is 10,000"):
        check(folder)


def test_gigabytes_are_not_read_to_find_a_tensor_missing(tmp_path: Path) -> None:
    """The file is as long as its table says, but holds nothing, so reading it would show."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    config = tiny_config("llama", vocab_size=128256, num_hidden_layers=32, **sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    table, end = {}, 0
    for name, tensor in network.state_dict().items():
        if name != DOWN_PROJ:
            start, end = end, end + 2 * tensor.numel()
            shape = list(tensor.shape)
            table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(table).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(tmp_path / WEIGHTS, 8 + len(head) + end)
    started_s = time.monotonic()
    with pytest.raises(UnusableModel, match=rf"in no file: 1 \({DOWN_PROJ}\)"):
        load_model(tmp_path)
    assert end > 14e9
    assert time.monotonic() - started_s < 5
