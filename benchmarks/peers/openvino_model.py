"""OpenVINO's side of benchmarks/beside.py: times steps and prompts that standard input asks for.

Run by a Python that has openvino and optimum-intel:  openvino_model.py MODEL FOLDER PROPERTIES.
MODEL: a checkpoint, which is exported to FOLDER the first time.  PROPERTIES: of its CPU plugin, as
JSON.  A line is `prefill TOKENS` or `step COUNT`, of steps after what there is; the answer is a
line of JSON, the seconds of each. Logits are computed of the last token only, as in OpenVINO's own
pipelines.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13
from optimum.exporters.openvino import main_export


def exported(checkpoint: str, folder: Path) -> Path:
    path = folder / "openvino_model.xml"
    if not path.exists():
        main_export(
            checkpoint, folder, task="text-generation-with-past", library_name="transformers"
        )
    return path


def with_last_logits_only(model: Any) -> Any:  # noqa: ANN401
    node = model.output("logits").node
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = opset13.gather(node.input_value(0), opset13.constant([-1]), opset13.constant(1))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


class Sequence:
    """One sequence of random tokens."""

    def __init__(self, path: Path, properties: dict[str, Any]) -> None:
        core = ov.Core()
        model = with_last_logits_only(core.read_model(path))
        self._names = {name for one in model.inputs for name in one.names}
        self._request = core.compile_model(model, "CPU", properties).create_infer_request()
        self._length = 0

    def restart(self) -> None:
        self._request.reset_state()
        self._length = 0

    def feed(self, num_tokens: int) -> float:
        """Seconds to compute the next tokens, and the most likely one after them."""
        end = self._length + num_tokens
        inputs = {
            "input_ids": np.arange(self._length, end)[None] % 1000,
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self._length, end)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        start = time.perf_counter()
        logits = self._request.infer({name: inputs[name] for name in self._names})
        logits["logits"].argmax()
        self._length = end
        return time.perf_counter() - start


def main() -> None:
    checkpoint, folder, properties = sys.argv[1:]
    sequence = Sequence(exported(checkpoint, Path(folder)), json.loads(properties))
    print(json.dumps(ov.__version__), flush=True)
    for line in sys.stdin:
        command, count = line.split()
        if command == "step":
            seconds = [sequence.feed(1) for _ in range(int(count))]
        else:
            sequence.restart()
            seconds = [sequence.feed(int(count))]
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
