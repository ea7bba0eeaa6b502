"""`winnow eval --turns`: several questions about one document, as users and agents ask them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from evals.local_model import LocalModel
from evals.pictures import can_draw
from evals.records import write_json
from evals.run import require_lengths
from evals.turns.answering import KEPT, SCRATCH, STORE, Answering, Way
from evals.turns.conversation import METRIC, TASK, conversation
from evals.turns.summary import Place, TurnMeans, TurnRecord, summarize
from evals.turns.table import print_means
from evals.variants import UNPRUNED, Variant
from winnow.errors import InvalidSetting
from winnow.methods import method_class

RESULT_FILE = "turns.json"


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """`num_samples` conversations of `num_turns` turns at every length, in every way.

    lengths: limits on prompt tokens.
    """

    variants: tuple[Variant, ...]
    lengths: tuple[int, ...]
    num_turns: int
    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in (("turns", self.num_turns), ("samples", self.num_samples)):
            if value < 1:
                raise InvalidSetting(f"--{name} is {value}; it must be at least 1", param=name)
        for variant in self.variants:
            if method_class(variant.spec.method).runs_twice:
                raise InvalidSetting(
                    f"--turns: {variant.spec.method} computes the kept tokens anew, at other "
                    "positions, so later questions cannot follow them",
                    param="methods",
                )

    def ways(self) -> list[Way]:
        """The unpruned model from scratch and with the store; pruned with it, and kept."""
        reuses = {True: (SCRATCH, STORE), False: (STORE, KEPT)}
        return [
            Way(variant, reuse)
            for variant in self.variants
            for reuse in reuses[variant.spec.method == UNPRUNED]
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "methods": [str(variant) for variant in self.variants],
            "lengths": list(self.lengths),
            "turns": self.num_turns,
            "samples": self.num_samples,
            "seed": self.seed,
        }


def evaluate_turns(
    plan: TurnPlan,
    model: LocalModel,
    folder: Path,
    *,
    progress: Console,
    result: Console,
) -> None:
    """Answer all conversations, then write and print the results.  model: with a prefix store.

    Raises WinnowError, before anything is written, if something requested cannot run.
    """
    require_lengths(plan.lengths, model)
    pruned = [way for way in plan.ways() if way.reuse == KEPT]
    if pruned and model.decoder.shape.has_states:
        raise InvalidSetting(
            f"--turns: the model has layers with a state, from which the first question cannot be "
            f"taken away: {pruned[0].variant} has no later turns; --methods full has",
            param="methods",
        )
    model.require_runs(plan.variants, max(plan.lengths) - TASK.max_new_tokens, TASK.max_new_tokens)
    assert model.prefix_store is not None
    answering = Answering(model, model.prefix_store)
    total = plan.num_samples * len(plan.lengths) * len(plan.ways()) * plan.num_turns
    records = list(
        track(_records(plan, model, answering), "answers", total=total, console=progress)
    )
    means = summarize(records)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "settings": plan.to_json() | model.identity(),
        "means": [asdict(one) for one in means],
        "answers": [asdict(record) for record in records],
    }
    write_json(folder / RESULT_FILE, content)
    print_means(means, result)
    files = ", ".join(file.name for file in [folder / RESULT_FILE, *_draw(means, folder)])
    result.print(f"\n{folder}: {files}", highlight=False, soft_wrap=True)


def _records(plan: TurnPlan, model: LocalModel, answering: Answering) -> Iterator[TurnRecord]:
    for index in range(plan.num_samples):
        for length in plan.lengths:
            room = min(length, model.max_positions - TASK.max_new_tokens) - model.frame_tokens
            turns = conversation(index, plan.seed, room, plan.num_turns, model.count)
            for way in plan.ways():
                answers = answering.answers(turns, way)
                for turn, (example, answer) in enumerate(zip(turns, answers, strict=True), 1):
                    yield TurnRecord(
                        place=Place(length, str(way)),
                        index=index,
                        turn=turn,
                        answer=answer.text,
                        reference=example.answers[0],
                        score=METRIC(answer.text, example.answers),
                        num_prompt_tokens=answer.num_prompt_tokens,
                        computed_share=answer.computed_share,
                        ttft_s=answer.ttft_s,
                    )


def _draw(means: Sequence[TurnMeans], folder: Path) -> list[Path]:
    """A picture per length; none without matplotlib."""
    if not can_draw():
        return []
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    from evals.pictures import style  # noqa: PLC0415 - needs matplotlib
    from evals.turns.picture import by_turn  # noqa: PLC0415 - needs matplotlib

    written = []
    with mpl.rc_context(style.LOOK):
        for length in dict.fromkeys(one.place.length for one in means):
            written.append(folder / f"turns_{length}.png")
            by_turn([one for one in means if one.place.length == length]).savefig(written[-1])
    return written
