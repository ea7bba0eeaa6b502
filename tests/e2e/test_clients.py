"""Programs that others wrote for OpenAI's API and vLLM's, against a served model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from services.common.settings import EMBEDDED_MODEL
from tests.e2e.winnow_process import FREE_PORTS, WinnowServe, environment
from tests.winnow import reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TASKS = Path(__file__).parent / "lm_eval_tasks"
NUM_REQUESTS, NUM_NEW = 4, 8


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    arguments = [*FREE_PORTS, "--dtype", "float32", "--kv-memory-bytes", "256MiB"]
    service = WinnowServe(tmp_path_factory.mktemp("serve"), arguments)
    try:
        yield service.wait_until_ready()
    finally:
        service.kill()


def run(program: str, *arguments: str, cache: Path, folder: Path) -> None:
    """A program of the same environment, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cache)}
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        env=os.environ | offline,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_completes_its_requests(url: str, path: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        "guidellm",
        "run",
        "--disable-console",
        *("--backend", f"kind=openai_http,target={url},request_format={path}"),
        *("--profile", "kind=synchronous"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={EMBEDDED_MODEL}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={NUM_NEW}"),
        *("--output", f"kind=json,path={report}"),
        cache=tmp_path,
        folder=tmp_path,
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert (totals["errored"], totals["incomplete"]) == (0, 0)
    assert 0 < totals["successful"] <= NUM_REQUESTS  # it may not wait for its last one
    tokens = metrics["output_token_count"]["successful"]
    assert tokens["total_sum"] == totals["successful"] * NUM_NEW
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return reference.load(EMBEDDED_MODEL).float()


def log_likelihood(model: PreTrainedModel, tokenizer: Any, context: str, text: str) -> float:
    """Of the text's tokens after the context's, as lm-eval splits them."""
    token_ids = tokenizer.encode(context + text)
    num_before = len(tokenizer.encode(context))
    with torch.no_grad():
        rows = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    pairs = zip(rows[num_before - 1 :], token_ids[num_before:], strict=False)
    return sum(float(row[token_id]) for row, token_id in pairs)


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval asked for and got, a document each."""
    (log,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize(("tokenized", "batch_size"), [(True, 4), (False, 1), (False, 3)])
def test_lm_eval_finds_the_log_likelihoods_of_transformers(
    url: str, model: PreTrainedModel, tmp_path: Path, tokenized: bool, batch_size: int
) -> None:
    served = f"model={EMBEDDED_MODEL.name},base_url={url}/v1/completions"
    ways = f"tokenizer={EMBEDDED_MODEL},tokenized_requests={tokenized},max_retries=1"
    run(
        "lm_eval",
        *("--model", "local-completions", "--model_args", f"{served},{ways}"),
        *("--tasks", "winnow_choices,winnow_texts", "--include_path", str(TASKS)),
        *("--batch_size", str(batch_size), "--log_samples", "--output_path", str(tmp_path / "out")),
        cache=tmp_path,
        folder=TASKS,
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    choices, texts = (samples(tmp_path, task) for task in ("winnow_choices", "winnow_texts"))
    assert (len(choices), len(texts)) == (3, 2)
    for sample in choices:
        asked = [(a["arg_0"], a["arg_1"]) for a in sample["arguments"].values()]
        expected = [log_likelihood(model, tokenizer, context, text) for context, text in asked]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-3)
        assert sample["acc"] == float(expected.index(max(expected)) == sample["doc"]["answer"])
    for sample in texts:
        context = tokenizer.bos_token or tokenizer.eos_token
        expected_sum = log_likelihood(model, tokenizer, context, sample["doc"]["text"])
        assert float(sample["resps"][0][0]) == pytest.approx(expected_sum, abs=1e-3)


CITIES = ("Paris", "Rome", "Oslo")


@pytest.fixture(scope="module")
def agents(url: str) -> dict[str, Any]:
    """What each package's program says, all of them run at once."""
    folder = Path(__file__).parent / "agents"
    running = {
        program.stem: subprocess.Popen(
            [sys.executable, str(program), url],
            env=environment(NO_PROXY="*"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for program in folder.glob("with_*.py")
    }
    said = {}
    for name, process in running.items():
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, f"{name}: {errors}"
        said[name.removeprefix("with_")] = json.loads(output.splitlines()[-1])
    return said


def is_trip(trip: dict[str, Any]) -> bool:
    return trip["city"] in CITIES and isinstance(trip["by_train"], bool)


def test_openai_calls_a_tool_and_parses_answers(agents: dict[str, Any]) -> None:
    said = agents["openai"]
    name, arguments = said["call"]
    assert (name, said["finish_reason"]) == ("weather", "tool_calls")
    assert arguments["city"] in CITIES
    assert "tool_calls.function.arguments.delta" in said["events"]
    assert said["answered"] in ("stop", "length", "tool_calls")
    assert is_trip(said["parsed"]) and is_trip(said["response_parsed"])
    ((kind, called),) = said["response"]
    assert kind == "function_call"
    assert called["city"] in CITIES


def test_langchain_binds_tools_and_has_structured_output(agents: dict[str, Any]) -> None:
    said = agents["langchain"]
    assert said["calls"]
    assert all(name == "weather" and args["city"] in CITIES for name, args in said["calls"])
    assert all(result.endswith(": sunny") for result in said["results"])
    assert is_trip(said["trip"]) and is_trip(said["by_tool"])


def test_litellm_calls_a_tool_whole_and_streamed(agents: dict[str, Any]) -> None:
    said = agents["litellm"]
    for calls in (said["whole"], said["streamed"]):
        assert all(name == "weather" and args["city"] in CITIES for name, args in calls)
    assert said["schema"]["city"] in CITIES


def test_pydantic_ai_gets_its_types(agents: dict[str, Any]) -> None:
    said = agents["pydantic_ai"]
    assert is_trip(said["by_tool"]) and is_trip(said["by_schema"])


def test_anthropic_uses_a_tool(agents: dict[str, Any]) -> None:
    said = agents["anthropic"]
    assert said["stop_reason"] == "tool_use"
    assert all(name == "weather" and used["city"] in CITIES for name, used in said["uses"])
    assert {"message_start", "content_block_start", "message_stop"} <= set(said["events"])
    assert said["answered"] in ("end_turn", "max_tokens", "tool_use")
    assert said["counted"]
