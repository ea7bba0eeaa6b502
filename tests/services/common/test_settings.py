"""Where settings come from, which one wins, and how bad ones are refused."""

import pickle
import traceback
from pathlib import Path

import pytest

from services.common.settings import EMBEDDED_MODEL, Settings, load_settings
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
