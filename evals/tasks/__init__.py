"""All evaluation tasks. To add one: write its class next to the others, add it to `make_tasks`.

Where a benchmark uses third-party text as haystack or documents, generated text replaces it and the
task's name says so (`_prose`, `_facts`); the originals can be read from a folder
(evals/datasets.py).
"""

from pathlib import Path

from evals.datasets import original_tasks
from evals.tasks.base import Task
from evals.tasks.counting import COUNTING_TASKS
from evals.tasks.infinitebench import INFINITEBENCH_TASKS
from evals.tasks.needles import NEEDLE_TASKS, DepthTask
from evals.tasks.questions import FACTS_TASKS
from evals.tasks.variables import CHAIN_TASKS, VARIABLE_TASKS, ZERO_SHOT_TASKS

__all__ = ["make_tasks"]


def make_tasks(num_depths: int, data_dir: Path | None) -> list[Task]:
    """All tasks; with RULER's and InfiniteBench's original datasets if `data_dir` is given.

    num_depths: number of needle depths in `niah`.
    """
    niah = DepthTask(num_depths)
    if data_dir is not None:
        return [*original_tasks(data_dir), niah, *CHAIN_TASKS, *ZERO_SHOT_TASKS]
    ruler = (*NEEDLE_TASKS, *VARIABLE_TASKS, *COUNTING_TASKS, *FACTS_TASKS)
    return [*ruler, *INFINITEBENCH_TASKS, niah, *CHAIN_TASKS, *ZERO_SHOT_TASKS]
