"""Where settings come from, which one wins, and how bad ones are refused."""

import pickle
import traceback
from pathlib import Path

import pytest

from services.common.settings import EMBEDDED_MODEL, Settings
from services.common.settings_sources import load_settings
from winnow.errors import InvalidSetting


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "winnow.yaml"
    path.write_text(
        "port: 1\nhost: 10.0.0.1\nmax_n: 3\npruning: {kv_budget: 100, threshold: 0.5}\n"
    )
    return path


def test_flags_win_over_variables_over_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PORT", "2")
    monkeypatch.setenv("WINNOW_HOST", "10.0.0.2")
    settings = load_settings({"port": "3"}, file)
    assert (settings.port, settings.host, settings.max_n) == (3, "10.0.0.2", 3)


def test_pruning_settings_of_all_sources_are_joined(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINNOW_PRUNING", '{"threshold": 0.6, "min_layer": 2}')
    settings = load_settings({"pruning": {"min_layer": 3}}, file)
    assert settings.pruning == {"kv_budget": 100, "threshold": 0.6, "min_layer": 3}


def test_variables_of_the_chat_template_of_all_sources_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "winnow.yaml"
    file.write_text("chat_template_kwargs: {enable_thinking: true, style: [a]}\n")
    monkeypatch.setenv("WINNOW_CHAT_TEMPLATE_KWARGS", '{"date": "today"}')
    settings = load_settings({"chat_template_kwargs": {"enable_thinking": False}}, file)
    expected = {"enable_thinking": False, "style": ["a"], "date": "today"}
    assert settings.chat_template_kwargs == expected


def test_a_folder_of_a_generation_config_becomes_absolute_and_a_word_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("auto", "none", "vllm", "own"):
        (tmp_path / name).mkdir()
        settings = load_settings({"generation_config": name})
        assert settings.generation_config == (str(tmp_path / "own") if name == "own" else name)


def test_variable_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_CONFIG", str(file))
    assert load_settings().port == 1


def test_null_unsets_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_GRPC_PORT", "null")
    assert load_settings().grpc_port is None


def test_sizes_may_have_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_KV_MEMORY_BYTES", "2GiB")
    assert load_settings().kv_memory_bytes == 2 << 30


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"prefix_cache_bytes": -1},
            "setting prefix_cache_bytes is -1: could not parse",
        ),
        (
            {"prefix_cache_device": "disk"},
            "setting prefix_cache_device is 'disk': .* 'device' or 'host'",
        ),
    ],
)
def test_a_prefix_cache_is_some_memory_somewhere(given: dict[str, object], complaint: str) -> None:
    assert load_settings({"prefix_cache_bytes": "4GiB"}).prefix_cache_bytes == 4 << 30
    with pytest.raises(InvalidSetting, match=complaint):
        load_settings(given)


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ({}, (0, 0)),
        ({"tensor_parallel": 2}, (0, 0)),
        ({"device": "cuda"}, (1, 1)),
        ({"device": "cuda", "tensor_parallel": 4}, (4, 4)),
        ({"device": "cuda", "tensor_parallel": 4, "prefill_tensor_parallel": 2}, (2, 4)),
        ({"device": "cuda", "decode_tensor_parallel": 8, "worker_num_gpus": 8}, (8, 8)),
        ({"device": "cuda", "worker_num_gpus": 0.5}, (0.5, 0.5)),
        ({"decode_tensor_parallel": 2, "worker_num_gpus": 0}, (0, 0)),
    ],
)
def test_each_rank_of_a_worker_has_a_gpu(given: dict[str, object], gpus: tuple[int, int]) -> None:
    settings = load_settings(given)
    of_workers = (settings.prefill_ranks, settings.decode_ranks)
    assert tuple(map(settings.gpus_per_worker, of_workers)) == gpus


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"tensor_parallel": 0}, "setting tensor_parallel is 0: .* greater than or equal to 1"),
        (
            {"device": "cuda:0", "decode_tensor_parallel": 2},
            "device is cuda:0; with tensor_parallel 2 it is cuda, of which each process takes",
        ),
        (
            {"device": "cuda", "decode_tensor_parallel": 8, "worker_num_gpus": 3},
            "worker_num_gpus is 3; with tensor_parallel 8 on cuda a worker needs 8, one for each",
        ),
        (
            {"device": "cuda", "prefill_tensor_parallel": 2, "worker_num_gpus": 1.5},
            "worker_num_gpus is 1.5; with tensor_parallel 2 on cuda a worker needs 2",
        ),
    ],
)
def test_ranks_are_some_and_each_takes_its_own_gpu(
    given: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InvalidSetting, match=complaint):
        load_settings(given)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:7"])
def test_another_gpu_than_the_first_is_chosen_by_the_variable(device: str) -> None:
    assert load_settings({"device": "cuda:0"}).device == "cuda:0"
    said = rf"device is {device}; .*CUDA_VISIBLE_DEVICES={device[-1]}"
    with pytest.raises(InvalidSetting, match=said) as refused:
        load_settings({"device": device})
    assert refused.value.param == "device"


def test_default_model_is_the_embedded_one_wherever_the_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings().model == str(EMBEDDED_MODEL)
    assert EMBEDDED_MODEL.parts[-2:] == ("models", "winnow-tiny")


def test_a_relative_model_folder_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"model": "my-model"})
    assert settings.model == str(tmp_path / "my-model")
    assert settings.served_name == "my-model"


@pytest.mark.parametrize("value", ["https://a.b, http://localhost:3000", "https://a.b", "*", ""])
def test_origins_are_one_text_or_a_list(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINNOW_CORS_ALLOWED_ORIGINS", value)
    expected = tuple(value.split(", ")) if value else ()
    assert load_settings().cors_allowed_origins == expected
    assert load_settings({"cors_allowed_origins": list(expected)}).cors_allowed_origins == expected


@pytest.mark.parametrize("silence", ["0", "null"])
def test_comments_in_streams_can_be_switched_off(
    silence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINNOW_SSE_KEEPALIVE_S", silence)
    assert not load_settings().sse_keepalive_s


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"WINNOW_PROT": "1"}, "WINNOW_PROT is not a setting"),
        ({"WINNOW_PORT": "http"}, "setting port is 'http'"),
        ({"WINNOW_PORT": "70000"}, "less than or equal to 65535"),
        ({"WINNOW_PRUNING": "{"}, "environment is malformed"),
        ({"WINNOW_PRUNING": '{"budget": 1}'}, "'budget' is not a pruning setting"),
        ({"WINNOW_CORS_ALLOWED_ORIGINS": "https://a.b/"}, "'https://a.b/' is neither * nor like"),
        ({"WINNOW_CORS_ALLOWED_ORIGINS": "a.b"}, "'a.b' is neither * nor like"),
        ({"WINNOW_CORS_ALLOWED_ORIGINS": "null"}, "cors_allowed_origins is None"),
        ({"WINNOW_MAX_TOKENS_POLICY": "cut"}, "setting max_tokens_policy is 'cut'"),
        ({"WINNOW_SSE_KEEPALIVE_S": "-1"}, "greater than or equal to 0"),
        (
            {"WINNOW_MAX_OPEN_PREFILLS": "0"},
            "setting max_open_prefills is '0': Input should be greater than or equal to 1",
        ),
        (
            {"WINNOW_MAX_OPEN_PREFILLS": "33"},
            "setting max_open_prefills is '33': Input should be less than or equal to 32",
        ),
        ({"WINNOW_NAMESPACE": "a b"}, "setting namespace is 'a b'"),
        ({"WINNOW_CONFIG": "/does/not/exist"}, "/does/not/exist cannot be read"),
    ],
)
def test_refuses_bad_variables_in_one_line(
    variables: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSetting) as raised:
        load_settings()
    assert complaint in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prot: 1", "prot is not a setting"),
        ("- 1", "must map names to values"),
        ("a: [", "is not YAML"),
        ("request_timeout_s: 0", "greater than 0"),
    ],
)
def test_refuses_bad_files_in_one_line(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InvalidSetting) as raised:
        load_settings(config=file)
    assert complaint in raised.value.message
    assert "\n" not in raised.value.message


def test_a_secret_shows_in_neither_text_nor_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_REDIS_URL", "redis://:hunter2@localhost")
    assert "hunter2" not in repr(load_settings())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('port: 1\nredis_url: "rediss://:hunter2@h/0', "line 2, column 34: found unexpected end"),
        ('redis_url: "rediss://:hunter2@h/0" x', "line 1, column 36: expected <block end>"),
        ("redis_url: rediss://:hunter2@h\x00", "is not YAML"),
        ("redis_url: redis://:hunter2@h/0\nredis_ca_file: ca.pem", "redis_ca_file is set"),
        ("redis_url: redis://:hunter2@h/0\nport: x", "setting port is 'x'"),
        ("redis_url: [rediss://:hunter2@h/0]", "setting redis_url: Input should be"),
    ],
)
def test_a_password_beside_a_mistake_is_not_shown(
    text: str, complaint: str, tmp_path: Path
) -> None:
    """Nor by a traceback, as Ray Serve logs one where a replica cannot start."""
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InvalidSetting) as raised:
        load_settings(config=file)
    assert complaint in raised.value.message
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


def test_settings_travel_between_processes() -> None:
    settings = Settings(port=1, redis_url="redis://h", pruning={"kv_budget": 100})
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_workers_share_the_cores_unless_told_otherwise() -> None:
    assert Settings(num_threads=3).threads_per_worker(2) == 3
    assert Settings().threads_per_worker(10_000) == 1


def test_a_model_s_name_may_be_too_long_for_a_path() -> None:
    """It is refused where models are, in one line."""
    assert Settings(model="a" * 5000).model == "a" * 5000


@pytest.mark.parametrize(
    ("given", "source", "name"),
    [
        ({"model": "o/n"}, "o/n", "n"),
        ({"model": "o/n", "revision": "v1"}, "o/n@v1", "n"),
        ({"model": "o/n@v1"}, "o/n@v1", "n"),
        ({"model": "o/n-GGUF:Q8_0", "revision": "v1"}, "o/n-GGUF:Q8_0@v1", "n-GGUF"),
        ({"model": "o/n/m.Q8_0.gguf"}, "o/n/m.Q8_0.gguf", "m.Q8_0"),
        ({"model": "o/n@v1", "model_name": "mine"}, "o/n@v1", "mine"),
    ],
)
def test_a_hub_model_has_a_revision_and_a_name(
    given: dict[str, str], source: str, name: str
) -> None:
    settings = load_settings(given)
    assert settings.model_source == source
    assert settings.served_name == name


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"revision": "v1"}, "revision is set, but model .* is none of a hub"),
        ({"model": "o/n@v2", "revision": "v1"}, "revision is v1, but model o/n@v2 names v2"),
        ({"model": "o/n@"}, "is no name of a hub's model: that is org/name"),
        ({"model": "o/n", "revision": "a b"}, "setting revision is 'a b'"),
    ],
)
def test_a_revision_that_names_nothing_is_refused(given: dict[str, str], reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason):
        load_settings(given)


def test_adapters_are_named_by_flags_variables_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {"one": tmp_path / "a", "two": tmp_path / "b=c"}
    pairs = [f"{name}={folder}" for name, folder in expected.items()]
    assert load_settings({"adapters": pairs}).adapters == expected
    file = tmp_path / "winnow.yaml"
    file.write_text(f"adapters: {{one: {tmp_path}/a, two: {tmp_path}/b=c}}\n")
    assert load_settings(config=file).adapters == expected
    monkeypatch.setenv("WINNOW_ADAPTERS", " ".join(pairs))
    assert load_settings().adapters == expected
    monkeypatch.chdir(tmp_path)
    assert load_settings({"adapters": ["one=a"]}).adapters == {"one": tmp_path / "a"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"adapters": ["one"]}, "'one' is not NAME=FOLDER"),
        ({"adapters": {"one": ""}}, "one has no folder"),
        ({"adapters": ["one=a", "one=b"]}, "a name is there twice"),
        ({"adapters": ["a b=c"]}, "'a b' is no adapter's name"),
        ({"adapters": ["tiny=a"], "model_name": "tiny"}, "adapter tiny has a name of the model"),
        ({"adapters": ["x=a"], "model_aliases": "x"}, "adapter x has a name of the model"),
        ({"adapters": ["x=a", "y=b"], "max_adapters": "1"}, "max_adapters is 1; adapters names 2"),
        ({"max_adapter_rank": "0"}, "max_adapter_rank is '0'"),
    ],
)
def test_adapters_that_cannot_be_had_are_refused(flags: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidSetting, match=told):
        load_settings(flags)
