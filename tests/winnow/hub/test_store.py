"""Models of the hub come into the cache, or one line says why not."""

import errno
import json
import logging
import random
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub import Hub
from winnow.errors import UnusableModel
from winnow.hub import download, store
from winnow.hub.cache import CachedModel
from winnow.hub.reference import parse
from winnow.hub.store import LocalModel, local_model

WEIGHTS = random.Random(1).randbytes(300_000)
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": WEIGHTS}
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = json.dumps({"weight_map": dict(zip("abc", SHARDS, strict=True))}).encode()
SHARDED = {"config.json": b"{}", "model.safetensors.index.json": INDEX}
SHARDED |= {shard: shard.encode() * 1000 for shard in SHARDS}


def fetch(text: str) -> LocalModel:
    model = parse(text)
    assert model is not None
    return local_model(model)


def refusal(text: str) -> str:
    with pytest.raises(UnusableModel) as caught:
        fetch(text)
    reason = str(caught.value)
    assert "\n" not in reason
    return reason


def test_a_model_comes_once(hub: Hub, cache: Path) -> None:
    commit = hub.add("o/n", FILES | {"pytorch_model.bin": b"code"})
    found = fetch("o/n")
    assert found.commit == commit
    assert found.path == cache / "models--o--n" / "snapshots" / commit
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == FILES
    assert sorted(name for name, _ in hub.downloads) == sorted(FILES)
    assert fetch("o/n") == found
    assert len(hub.downloads) == len(FILES)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    old = hub.add("o/n", FILES, "v1")
    new = hub.add("o/n", FILES | {"config.json": b'{"new": 1}'})
    assert fetch("o/n@v1").commit == old
    assert fetch("o/n").commit == new
    assert fetch(f"o/n@{old}").commit == old
    assert hub.started("model.safetensors") == [0]  # of both commits


def test_a_pinned_commit_asks_nobody(hub: Hub) -> None:
    hub.add("o/n", FILES)
    pinned = fetch("o/n").pinned
    asked = hub.num_requests
    assert local_model(pinned).commit == pinned.revision
    assert hub.num_requests == asked


def test_the_log_names_the_commit(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    commit = hub.add("o/n", FILES)
    with caplog.at_level(logging.INFO, "winnow.hub"):
        fetch("o/n@main")
    assert f"model o/n@main is commit {commit}, in " in caplog.text
    assert f"from {hub.url} into " in caplog.text
    assert "fetched 300 kB of 300 kB (100%)" in caplog.text


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    hub.add("o/n", SHARDED | {"consolidated.safetensors": b"x" * 9000})
    names = {path.name for path in fetch("o/n").path.iterdir()}
    assert names == SHARDED.keys()


def test_a_gguf_file_is_found_by_its_quantization(hub: Hub) -> None:
    hub.add("o/n", {"m-Q4_0.gguf": b"4", "m-Q8_0.gguf": b"8", "README.md": b""})
    assert fetch("o/n:Q8_0").path.name == "m-Q8_0.gguf"
    assert fetch("o/n/m-Q4_0.gguf").path.read_bytes() == b"4"
    assert "there are m-Q4_0.gguf, m-Q8_0.gguf" in refusal("o/n")


def test_offline_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("o/n", FILES)
    found = fetch("o/n")
    asked = hub.num_requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("o/n") == found
    assert hub.num_requests == asked


def test_offline_a_missing_model_is_refused_with_the_place(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", SHARDED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reason = f"model o/n@main is not in {cache}, and HF_HUB_OFFLINE forbids to fetch it"
    assert refusal("o/n") == reason
    assert hub.num_requests == 0


def test_offline_a_missing_shard_is_named(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", SHARDED)
    (fetch("o/n").path / SHARDS[2]).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"names '{SHARDS[2]}': 1 of its 3 files are not there" in refusal("o/n")


def test_a_missing_shard_of_the_cache_is_fetched(hub: Hub) -> None:
    hub.add("o/n", SHARDED)
    lost = fetch("o/n").path / SHARDS[2]
    lost.resolve().unlink()
    assert (fetch("o/n").path / SHARDS[2]).read_bytes() == SHARDED[SHARDS[2]]
    assert [hub.started(shard) for shard in SHARDS] == [[0], [0], [0, 0]]


def test_a_hub_that_cannot_be_reached_is_named(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"  # kept, and not listened at
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert refusal("o/n").startswith(
            f"model o/n@main is not in {cache}, and {url} cannot be reached (ConnectError: "
        )


def test_a_hub_that_is_silent_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        assert "cannot be reached (ReadTimeout: " in refusal("o/n")


def test_what_was_fetched_serves_when_the_hub_is_gone(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("o/n", FILES)
    found = fetch("o/n")
    hub.status = 503
    assert fetch("o/n") == found
    assert f"answers 503, Service Unavailable; commit {found.commit} of it is used" in caplog.text


def test_a_name_that_the_hub_cannot_have_is_refused(hub: Hub) -> None:
    assert "org/na--me" in refusal("org/na--me")


def test_an_unknown_revision_is_named(hub: Hub) -> None:
    hub.add("o/n", FILES)
    assert refusal("o/n@v9") == f"model o/n has no revision v9 on {hub.url}"


@pytest.mark.parametrize(
    ("access", "token", "reason"),
    [
        ("gated", None, "model o/n is gated: accept its terms at {url}/o/n and set HF_TOKEN"),
        ("private", None, "there is no folder o/n, and {url} has no such model, or it is private"),
        ("gated", "hf_wrong", "{url} does not accept the token (one is set)"),
        ("private", "hf_wrong", "{url} does not accept the token (one is set)"),
    ],
)
def test_access_is_refused_by_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, access: str, token: str | None, reason: str
) -> None:
    hub.add("o/n", FILES, access=access)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refusal("o/n")
    assert said.startswith(reason.format(url=hub.url))
    assert "wrong" not in said


@pytest.mark.parametrize("access", ["gated", "private"])
def test_the_token_opens(hub: Hub, monkeypatch: pytest.MonkeyPatch, access: str) -> None:
    hub.add("o/n", FILES, access=access)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (fetch("o/n").path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_breaks_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add("o/n", FILES)
    hub.cut_bytes = 100_000
    assert (fetch("o/n").path / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.started("model.safetensors")
    assert first == 0
    assert second >= 100_000


def test_a_download_that_was_ended_is_resumed_by_the_next(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", FILES)
    hub.hang_bytes = 150_000
    monkeypatch.setattr(download, "STALLED_S", 1.5)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    reason = refusal("o/n")
    assert f"no byte came from {hub.url} for 1.5 s; " in reason
    assert "of 300 kB" in reason
    hub.hang_bytes = None
    assert (fetch("o/n").path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.started("model.safetensors")[-1] >= 140_000


def test_damage_is_noticed_and_fetched_anew(hub: Hub, cache: Path) -> None:
    hub.add("o/n", FILES)
    fetch("o/n")
    blob = (cache / "models--o--n/snapshots" / fetch("o/n").commit / "model.safetensors").resolve()
    blob.with_name(f"{blob.name}.partial").write_bytes(b"\0" * 1000)
    blob.unlink()
    assert "model.safetensors of model o/n@main came damaged" in refusal("o/n")
    assert (fetch("o/n").path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_disk_that_is_too_small_is_told_before(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 1000))
    assert refusal("o/n").startswith(
        f"model o/n@main needs 300 kB more in {cache}, whose disk has 1 kB free"
    )
    assert hub.started("model.safetensors") == []


def test_a_disk_that_fills_up_is_named(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("o/n", FILES)
    monkeypatch.setattr(download, "http_get", full)
    assert refusal("o/n").endswith(f"cannot be written into {cache}: No space left on device")


def test_two_at_once_fetch_once(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.add("o/n", SHARDED)
    hub.pace = 40_000
    found: list[LocalModel] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("o/n"))) for _ in range(3)]
    with caplog.at_level(logging.INFO, "winnow.hub"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1
    assert sorted(name for name, _ in hub.downloads) == sorted(SHARDED)
    assert "another process fetches model o/n@main; waiting for it" in caplog.text


def test_a_process_that_is_stuck_is_not_waited_for(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", FILES)
    monkeypatch.setattr(store, "STALLED_S", 0.1)
    model = parse("o/n")
    assert model is not None
    cached = CachedModel(model)
    with cached.turn():
        assert f"if there is none, remove {cached.lock_file}" in refusal("o/n")


def test_whoever_waits_can_end_it(hub: Hub) -> None:
    hub.add("o/n", FILES)
    hub.hang_bytes = 0
    model = parse("o/n")
    assert model is not None
    started_s = time.monotonic()

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        if hub.downloads:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local_model(model, pause=pause)
    assert time.monotonic() - started_s < 10


def test_progress_is_told(hub: Hub) -> None:
    hub.add("o/n", FILES)
    hub.pace = 300_000
    model = parse("o/n")
    assert model is not None
    told: list[tuple[int, int]] = []
    local_model(model, on_progress=lambda *progress: told.append(progress))
    assert told[-1][1] == len(WEIGHTS)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
