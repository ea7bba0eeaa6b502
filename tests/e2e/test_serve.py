"""The life of `winnow serve`, seen from outside."""

import itertools
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import ItemsView, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from tests.deadlines import SOON_S
from tests.e2e.ray_ports import RAY_CALLS, auth_tokens, code_of, outward_ports
from tests.e2e.winnow_process import FREE_PORTS, WinnowServe, winnow
from tests.processes import of_each
from tests.services.exposed import value
from winnow.local import Winnow
from winnow.sampling_params import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = "the quick brown fox jumps over the lazy dog " * 20
PRUNING = ("--pruning", "select_tokens=128", "--pruning", "kv_budget=64")


@pytest.fixture(scope="module")
def model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def service(
    model: Path, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WinnowServe]:
    arguments = ["--model", str(model), *FREE_PORTS, *PRUNING, "--kv-memory-bytes", "64MiB"]
    service = WinnowServe(tmp_path_factory.mktemp("serve"), arguments, HOME=str(home))
    yield service
    service.kill()


@pytest.fixture(scope="module")
def url(service: WinnowServe) -> str:
    return service.wait_until_ready()


def metric(url: str, name: str, **labels: str) -> float:
    return value(httpx.get(f"{url}/metrics", timeout=SOON_S).text, name, **labels)


def until(condition: str, check: object, timeout_s: float = SOON_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline_s, f"never came: {condition}"
        time.sleep(0.05)


def test_answers_as_one_process_does(url: str, model: Path) -> None:
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    alone = Winnow.load(model, kv_memory_bytes=1 << 26, select_tokens=128, kv_budget=64)
    expected = alone.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0))
    assert response["choices"][0]["text"] == expected.text
    done = response["usage"]["winnow"]
    assert done["selection_layer"] == expected.report.selection_layer
    assert done["kv_bytes_kept"] == expected.report.kv_bytes_kept < done["kv_bytes_full"]


def test_streams_tokens(url: str, model: Path) -> None:
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 5, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]


def test_headers_over_the_limit_are_refused_behind_the_proxy_too(url: str, model: Path) -> None:
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 5}
    headers = {"x-long": "a" * 40_000}
    refused = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    assert refused.status_code == 431
    assert refused.json()["error"]["code"] == "headers_too_large"


def worker_metrics(admin_url: str, role: str) -> str:
    """Where the first process of that role serves its metrics."""
    groups = httpx.get(f"{admin_url}/metrics/targets", timeout=SOON_S).json()
    addresses = [g["targets"][0] for g in groups if g["labels"]["__winnow_role"] == role]
    return f"http://{addresses[0]}"


def test_a_client_that_leaves_cancels_decode_and_prefill(
    service: WinnowServe, url: str, model: Path
) -> None:
    admin_url = service.admin_url()

    def num_cancelled() -> float:
        return metric(admin_url, "winnow_requests_finished_total", reason="cancelled")

    def num_received() -> float:
        return metric(admin_url, "winnow_requests_received_total")

    before, received = num_cancelled(), num_received()
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
    asked = body | {"stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=SOON_S) as response:
        next(response.iter_lines())
    until("cancelled while decoding", lambda: num_cancelled() == before + 1)
    stopped = "winnow_prefill_failures_total"
    prefill = worker_metrics(admin_url, "prefill")
    patience_s = itertools.cycle((0.05, 0.1, 0.2, 0.4, 0.8))  # one of them ends in mid-prefill
    num_left = 0
    while metric(prefill, stopped, reason="cancelled") == 0:
        assert num_left < 60, "prefill was never stopped"
        with pytest.raises(httpx.ReadTimeout):
            long = body | {"prompt": [5] * 4000}
            httpx.post(f"{url}/v1/completions", json=long, timeout=next(patience_s))
        num_left += 1
    # The proxy may have seen a client leave before it passed its request on.
    until("all are cancelled", lambda: num_cancelled() - before == num_received() - received)
    until("nothing runs", lambda: metric(admin_url, "winnow_requests_running") == 0)


def events_of(response: httpx.Response) -> Iterator[str]:
    """A stream's events, without comments."""
    return (line[6:] for line in response.iter_lines() if line.startswith("data: "))


def test_a_request_with_another_one_s_id_neither_ends_nor_sees_it(url: str, model: Path) -> None:
    """Ray Serve takes the id of its requests from a header, so anybody can name one in use."""
    headers = {"x-request-id": "theirs"}
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True}
    ask: dict[str, Any] = {
        "method": "POST",
        "url": f"{url}/v1/completions",
        "headers": headers,
        "timeout": 60,
    }
    with httpx.stream(json=body | {"stream": True}, **ask) as theirs:
        lines = events_of(theirs)
        first = json.loads(next(lines))
        with httpx.stream(json=body | {"stream": True}, **ask) as other:
            begun = json.loads(next(events_of(other)))
        assert begun["id"] != first["id"]  # and it was cancelled by leaving
        events = list(lines)
    assert events.pop() == "[DONE]"
    assert {json.loads(event)["id"] for event in events} == {first["id"]}
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "length"


def test_ray_s_ports_run_nothing_without_the_token(
    service: WinnowServe, url: str, home: Path
) -> None:
    """They are on every address, and what a caller may ask of them is to run code."""
    ports = outward_ports(service.processes())
    not_there = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}
    for call in RAY_CALLS:
        for token in (None, "0" * 64):
            answers = {port: code_of(port, call, token) for port in ports}
            refused = {p for p, code in answers.items() if code is grpc.StatusCode.UNAUTHENTICATED}
            assert refused, call
            assert {answers[port] for port in ports - refused} <= not_there, call
    (token,) = auth_tokens(service.processes())
    assert grpc.StatusCode.OK in {code_of(port, RAY_CALLS[0], token) for port in ports}
    command_lines = of_each(service.processes(), psutil.Process.cmdline)
    assert not any(token in part for line in command_lines for part in line)
    assert [path for path in home.rglob("*") if "token" in path.name] == []


def test_idles_quietly_and_within_its_memory(service: WinnowServe, url: str) -> None:
    def cpu_s() -> dict[psutil.Process, float]:
        return dict(of_each(processes, lambda process: (process, sum(process.cpu_times()[:2]))))

    processes = service.processes()
    assert sum(of_each(processes, lambda process: process.memory_full_info().pss)) < 5e9
    before_s, started_s = cpu_s(), time.monotonic()
    time.sleep(4)
    seconds = time.monotonic() - started_s
    used_s = sum(used_s - before_s[process] for process, used_s in cpu_s().items())
    assert used_s / seconds < 0.3  # of one core


def test_workers_know_no_tensor_noise_on_the_terminal(service: WinnowServe, url: str) -> None:
    text = service.stderr.read_text()
    assert "Traceback" not in text
    assert "Loading weights" not in text
    assert "winnow: starting workers" in text


def test_ctrl_c_drains_and_leaves_no_process_behind(service: WinnowServe, url: str) -> None:
    assert service.press_ctrl_c() == 0
    assert service.left() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert "Traceback" not in service.stderr.read_text()


def test_a_signal_while_it_starts_leaves_no_process_behind(model: Path, tmp_path: Path) -> None:
    service = WinnowServe(tmp_path, ["--model", str(model), *FREE_PORTS])
    until("workers start", lambda: "starting workers" in service.stderr.read_text())
    service.processes()
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(SOON_S) == 0
    assert service.left() == []
    service.kill()


@pytest.mark.parametrize(
    ("number", "moment_s"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 0.5), (signal.SIGINT, 2), (signal.SIGINT, 5)],
)
def test_a_signal_at_any_moment_of_the_start_is_heard(
    number: int, moment_s: float, model: Path, tmp_path: Path
) -> None:
    mark: dict[str, Any] = {"MARK": str(tmp_path)}
    service = WinnowServe(tmp_path, ["--model", str(model), *FREE_PORTS], **mark)
    until("Ray starts", lambda: "starting Ray" in service.stderr.read_text())
    time.sleep(moment_s)
    service.process.send_signal(number)
    assert service.process.wait(SOON_S) == 0
    assert "Traceback" not in service.stderr.read_text()
    until("every process has ended", lambda: not processes_with(mark))
    service.kill()


def processes_with(mark: dict[str, str]) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["environ"]) if mark.items() <= _environment_of(p)]


def _environment_of(process: psutil.Process) -> ItemsView[str, str]:
    return (process.info["environ"] or {}).items()  # none of one that ends just now


def test_a_missing_model_is_one_clear_line() -> None:
    done = winnow("serve", "--model", "/does/not/exist", *FREE_PORTS)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "winnow: model folder /does/not/exist does not exist"
    assert "Traceback" not in done.stderr


def test_broken_weights_are_one_clear_line(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    mark: dict[str, Any] = {"MARK": str(tmp_path)}
    done = winnow("serve", "--model", str(broken), *FREE_PORTS, **mark)
    assert done.returncode == 2
    assert str(broken) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    until("every process has ended", lambda: not processes_with(mark))


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = winnow("serve", "--port", str(port), "--grpc-port", "0", "--admin-port", "0")
    assert done.returncode == 2
    assert (
        done.stderr == f"winnow: port {port} on 127.0.0.1 cannot be used: Address already in use\n"
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "complaint"),
    [
        (("--max-n", "0"), {}, "setting max_n is '0': Input should be greater than or equal to 1"),
        ((), {"WINNOW_MAXN": "3"}, "WINNOW_MAXN is not a setting of Winnow"),
        (("--pruning", "kv_budget"), {}, "kv_budget: a pruning setting must be NAME=VALUE"),
    ],
)
def test_bad_settings_are_one_clear_line(
    arguments: tuple[str, ...], variables: dict[str, Any], complaint: str
) -> None:
    done = winnow("serve", *arguments, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"winnow: {complaint}")
    assert len(done.stderr.splitlines()) == 1


def test_decode_outside_of_ray_asks_for_redis(model: Path) -> None:
    done = winnow("decode", "--model", str(model))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("set WINNOW_REDIS_URL")


def test_generate_answers_without_a_server(model: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    arguments = ("--model", str(model), "--max-tokens", "5", "--kv-memory-bytes", "64MiB")
    done = winnow("generate", "--prompt-file", str(prompt), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "5 tokens generated" in done.stderr
