"""Records as a run would have written them."""

from evals.records import Record


def record(
    method: str, score: float, layer_idx: int | None, *, task: str = "passkey", index: int = 0
) -> Record:
    return Record(
        num_prompt_tokens=4000,
        num_answer_tokens=5,
        selection_layer=layer_idx,
        no_selection_reason=None,
        rho=(),
        computed_share=0.6,
        kv_bytes_full=4,
        kv_bytes_kept=1,
        prefill_s=1.0,
        seconds=1.0,
        task=task,
        length=4096,
        index=index,
        method=method,
        budget=None,
        depth=None,
        answer="",
        references=("1",),
        score=score,
    )
