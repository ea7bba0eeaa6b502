"""What a calibration is asked for, and what it gives."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evals.calibrate.measured import Result
from evals.calibrate.prompts import PromptsTask
from evals.calibrate.target import Target
from evals.tasks.base import Task

if TYPE_CHECKING:
    from winnow.kv import ModelShape  # loads torch

LEAST_PROMPTS = 8  # half are searched on, half held out


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be calibrated.

    length: prompt tokens at most.  kv: share of them that each KV head keeps, or their number.
    num_samples: prompts per task to search on; as many others are held out.
    shape: of the model.
    """

    tasks: tuple[Task, ...]
    length: int
    kv: float | int
    target: Target
    num_samples: int
    seed: int
    chat: bool
    shape: "ModelShape"

    def to_json(self) -> dict[str, Any]:
        """What a run in the same folder must have in common; the target may be another."""
        digests = [task.digest() for task in self.tasks if isinstance(task, PromptsTask)]
        return {
            "command": "calibrate",
            "tasks": [task.name for task in self.tasks],
            "length": self.length,
            "samples": self.num_samples,
            "seed": self.seed,
            "chat": self.chat,
            "prompts": digests,
        }


@dataclass(frozen=True, slots=True)
class Found:
    """settings: of PruningSettings.  table: on held-out prompts.  curve: fixed layers, searched.

    searched: the chosen settings' result on the prompts of the search.
    cross_validated: share kept when each fold is answered by what the others would have chosen.
    left_out: the unpruned score of the tasks that the model does not answer.
    """

    settings: dict[str, Any]
    chosen: Result
    searched: Result
    table: tuple[Result, ...]
    curve: tuple[Result, ...]
    reached: bool
    cross_validated: float | None = None
    left_out: dict[str, float] = field(default_factory=dict)
