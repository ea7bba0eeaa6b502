"""Every task, in one place. To add one: write its class beside the others, add it to `make_tasks`.

Where a benchmark's haystack or documents are someone else's text, generated text stands in and the
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
    """All tasks; RULER's and InfiniteBench's own datasets from `data_dir` if one is given.

    num_depths: places of the needle in `niah`.
    """
    niah = DepthTask(num_depths)
    if data_dir is not None:
        return [*original_tasks(data_dir), niah, *CHAIN_TASKS, *ZERO_SHOT_TASKS]
    ruler = (*NEEDLE_TASKS, *VARIABLE_TASKS, *COUNTING_TASKS, *FACTS_TASKS)
    return [*ruler, *INFINITEBENCH_TASKS, niah, *CHAIN_TASKS, *ZERO_SHOT_TASKS]
