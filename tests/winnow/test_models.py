import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AfmoeConfig,
    CohereConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    NanoChatConfig,
    OlmoConfig,
    PreTrainedConfig,
)

from tests.models_in_code import save_tiny_model
from tests.winnow import reference
from tests.winnow.checkpoints import SIZES, save
from tests.winnow.drive import UNPRUNED, prefill_all, prompt
from winnow.attention import AttentionOptions, causal_attention
from winnow.errors import UnusableModel
from winnow.model_files import describe_model
from winnow.models import load_model

SCALED = (
    GraniteConfig(**SIZES, embedding_multiplier=12.0, logits_scaling=8.0),
    HyperCLOVAXConfig(**SIZES, embedding_multiplier=12.0, logits_scaling=0.125),
    CohereConfig(**SIZES, logit_scale=0.25),
    AfmoeConfig(
        **SIZES | {"num_hidden_layers": 1},
        mup_enabled=True,
        layer_types=["full_attention"],
        head_dim=16,
    ),
)


def test_describes_a_model_without_its_weights(tiny_models: dict[str, Path]) -> None:
    description = describe_model(tiny_models["qwen3"])
    shape = description.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 4, 2, 16)
    assert (shape.dtype, description.max_positions) == (torch.float32, 8192)
    assert description.eos_token_ids == {0}
    assert load_model(tiny_models["qwen3"]).fingerprint == description.fingerprint


def test_fingerprints_tell_weights_and_dtypes_apart(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    before = describe_model(path).fingerprint
    assert describe_model(path, dtype="bfloat16").fingerprint != before
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert describe_model(path).fingerprint != before


def test_a_family_outside_the_verified_ones_is_checked_and_used(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, OlmoConfig(**SIZES, pad_token_id=0)))
    layers, _ = prefill_all(model, prompt(30), UNPRUNED)
    assert len(layers) == 2


def test_a_family_that_computes_more_between_its_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match="nanochat: it runs its embeddings, layers, norm"):
        load_model(save(tmp_path, NanoChatConfig(**SIZES)))


@pytest.mark.parametrize("config", SCALED, ids=[config.model_type for config in SCALED])
def test_factors_before_the_layers_and_behind_the_head_are_the_familys(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    path, token_ids = save(tmp_path, config), prompt(30)
    model = load_model(path)
    _, result = prefill_all(model, token_ids, UNPRUNED)
    network = reference.load(path, "eager")
    with torch.no_grad():
        expected = network(torch.tensor([token_ids])).logits[0, -1]
    torch.testing.assert_close(model.logits(result.final_hidden[None])[0], expected)


def test_a_family_whose_logits_are_not_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attends_less(
        query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return causal_attention(query, key, value, AttentionOptions(options.scaling / 10))

    monkeypatch.setattr("winnow.models.causal_attention", attends_less)
    with pytest.raises(UnusableModel, match=r"olmo: it computes something .* differ by .* limit"):
        load_model(save(tmp_path, OlmoConfig(**SIZES, pad_token_id=0)))


def test_a_model_that_is_not_layered_as_needed_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(UnusableModel, match="gpt2: it adds positions to its embeddings"):
        load_model(save(tmp_path, config))


def test_a_window_that_spans_the_whole_context_is_no_window(tmp_path: Path) -> None:
    model = load_model(save_tiny_model(tmp_path, "mistral", sliding_window=8192))
    assert all(layer.is_full for layer in model.shape.layers)


def test_rotary_tables_that_change_with_length_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    path = save_tiny_model(tmp_path, "llama", rope_parameters=rope)
    with pytest.raises(UnusableModel, match="dynamic rotary embeddings"):
        load_model(path)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UnusableModel, match=r"has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(
        UnusableModel, match=r"is not in .*, and HF_HUB_OFFLINE forbids to fetch it"
    ):
        load_model("nobody/no-such-model")


@pytest.mark.parametrize("defect", ["truncated", "garbage", "absent", "config", "unknown"])
def test_broken_folders_end_in_one_clear_error(tmp_path: Path, defect: str) -> None:
    path = save_tiny_model(tmp_path)
    weights = path / "model.safetensors"
    if defect == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif defect == "garbage":
        weights.write_bytes(b"\xff" * 100)
    elif defect == "absent":
        weights.unlink()
    elif defect == "config":
        (path / "config.json").write_text("{not json")
    else:
        (path / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    with pytest.raises(UnusableModel) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert ("no-such-family" if defect == "unknown" else str(tmp_path)) in str(caught.value)


def test_a_folders_own_code_is_never_run(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    trace = tmp_path / "it-ran"
    (folder / "modeling.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    config |= {"auto_map": names, "model_type": "theirs"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnusableModel):
        load_model(folder)
    assert not trace.exists()


def test_weights_that_can_run_code_are_not_read(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(UnusableModel, match=r"no \*.safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["x.bin", "../x.safetensors", "/etc/passwd"])
def test_an_index_cannot_name_weights_that_can_run_code(
    tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "x.safetensors").touch()
    (folder / "x.bin").touch()
    with pytest.raises(UnusableModel, match=re.escape(f"names {name!r}")):
        load_model(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no JSON", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_cannot_be_read_is_named(
    tiny_models: dict[str, Path], tmp_path: Path, text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["llama"], folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnusableModel, match=r"index\.json"):
        load_model(folder)
