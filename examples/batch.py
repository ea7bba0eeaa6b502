"""Many questions on one document: prefilled one after the other, decoded together.

Run it with `python examples/batch.py`.

Each question is at the end of its own prompt, so each one has its own selection: what is kept of
the document depends on what is asked.
"""

import re
from pathlib import Path

from winnow import BatchJob, SamplingParams, Winnow

FACTS = {"quick-fox": "48219", "lazy-dog": "90357", "calm-river": "61804"}
SAMPLING = SamplingParams(max_tokens=8, temperature=0)


def document() -> str:
    """About 1,000 tokens of prose, with the facts spread over it."""
    prose = Path(__file__).with_name("long_prompt.txt").read_text()
    sentences = re.findall(r"[A-Z][^.]*\.", prose)[:45]
    for idx, (key, number) in enumerate(FACTS.items(), start=1):
        sentences.insert(11 * idx, f"One of the special magic numbers for {key} is: {number}.")
    return " ".join(sentences)


def main() -> None:
    winnow = Winnow.load(max_batch_size=len(FACTS))
    text = document()
    keys = list(FACTS)
    prompts = [
        f"{text}\nQuestion: What is the special magic number for {key}?\nAnswer:" for key in keys
    ]
    jobs = [
        BatchJob(winnow.tokenizer.encode(p), winnow.pruning, SAMPLING, ("\n",)) for p in prompts
    ]
    for result in winnow.generate_many(jobs):
        report = result.completion.report
        print(
            f"{keys[result.job_idx]}: {result.completion.text.strip()} "
            f"(layer {report.selection_layer}, {report.num_selected_tokens:,} of "
            f"{report.num_prompt_tokens:,} tokens)"
        )


if __name__ == "__main__":
    main()
