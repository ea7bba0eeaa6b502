"""Commands that are given a model folder that cannot be used: the last line says why, soon."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import NanoChatConfig

from tests.e2e.winnow_process import FREE_PORTS, winnow
from tests.services.gateway.service import running_redis
from tests.winnow.checkpoints import SIZES, save

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"
SERVE_S = 180  # most of it Ray's start and end, on a machine that does other work too


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[DOWN_PROJ]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def break_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": 1}')


def lose_a_number(folder: Path) -> None:
    """Found out by the workers alone, from what the loaded model computes."""
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN_PROJ][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def become_another_family(folder: Path) -> None:
    save(folder, NanoChatConfig(**SIZES))


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (quantize, "is quantized by awq, for which gptqmodel is not installed"),
        (lose_a_tensor, f"in no file: 1 ({DOWN_PROJ})"),
        (break_the_tokenizer, "has no usable tokenizer"),
        (become_another_family, "Winnow cannot run nanochat: it runs its embeddings"),
        (lose_a_number, "cannot start: model "),
    ],
)
def test_serve_says_why_it_cannot_in_its_last_line(
    folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(folder)
    started_s = time.monotonic()
    done = winnow("serve", "--model", str(folder), *FREE_PORTS)
    assert time.monotonic() - started_s < SERVE_S
    assert done.returncode == 2
    *before, last = done.stderr.splitlines()
    assert last.startswith("winnow: ")
    assert reason in last
    assert len(before) < 10
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "the quick"),
        ("explain", "--prompt", "the quick"),
        ("eval", "--tasks", "passkey", "--length", "256"),
        ("decode",),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("spoil", [quantize, lose_a_tensor])
def test_other_commands_do_likewise(
    folder: Path,
    tmp_path: Path,
    redis_url: str,
    command: tuple[str, ...],
    spoil: Callable[[Path], None],
) -> None:
    spoil(folder)
    variables = {"WINNOW_REDIS_URL": redis_url} if command == ("decode",) else {}
    done = winnow(*command, "--model", str(folder), cwd=tmp_path, **variables)
    assert done.returncode == 2
    assert str(folder) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
