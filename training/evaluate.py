"""Exact-answer accuracy of an exported model on fresh samples, through transformers' `generate`.

`python -m training.evaluate --model models/winnow-tiny --length 1024 --samples 100`
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from training.samples import FORMS, SampleMaker
from training.tasks import KINDS, Fact, KeySource, Question, make_fact

NUM_FACTS = 8
TOKENS_PER_PAIR = 18
MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Probe:
    """A prompt of about the length asked for, one question at its end, and its answer."""

    prompt: str
    answer: str


def make_probe(
    rng: random.Random,
    maker: SampleMaker,
    kind: str,
    length: int,
    form_name: str,
    is_varied: bool = True,
) -> Probe:
    """One fresh prompt of at most `length` tokens.

    Needles: at least `NUM_FACTS` with distinct keys.  json: an object fills half of the prompt.
    passkey: one, among needles.  Chains: as many as needles.  The fact asked about is any of them.
    """
    facts = _facts(rng, kind, length)
    question = _question(rng, facts, kind)
    form = FORMS[form_name](rng, is_varied)
    tail = form.first_gap + form.ask(question)
    taken = len(maker.encode(form.opening)) + len(maker.encode(tail))
    context = maker.context(rng, facts, length - taken)
    return Probe(form.opening + context + tail, question.answer)


def _facts(rng: random.Random, kind: str, length: int) -> list[Fact]:
    keys = KeySource(rng)
    num_facts = NUM_FACTS if length >= 512 else max(1, length // 64)
    if kind == "json":
        return [make_fact(kind, rng, keys, num_pairs=max(2, length // 2 // TOKENS_PER_PAIR))]
    others = "needle" if kind == "passkey" else kind
    num_others = num_facts - (kind == "passkey")
    facts = [make_fact(others, rng, keys) for _ in range(num_others)]
    return [*facts, make_fact(kind, rng, keys)] if kind == "passkey" else facts


def _question(rng: random.Random, facts: Sequence[Fact], kind: str) -> Question:
    return rng.choice([q for fact in facts for q in fact.questions if q.kind == kind])


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str) -> str:
    """The greedy completion of `prompt`, up to an end token, without surrounding space."""
    encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**encoded, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[operator]
    new_tokens = output[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


def accuracy(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    kind: str,
    length: int,
    num_samples: int,
    seed: int,
    is_varied: bool,
) -> float:
    """Share of exact answers; every other prompt is raw, the others are chats."""
    maker = SampleMaker(tokenizer)
    forms = sorted(FORMS)
    num_right = 0
    for index in range(num_samples):
        rng = random.Random(f"evaluate-{seed}-{kind}-{length}-{index}")
        probe = make_probe(rng, maker, kind, length, forms[index % len(forms)], is_varied)
        num_right += answer(model, tokenizer, probe.prompt) == probe.answer
    return num_right / num_samples


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=Path("models/winnow-tiny"))
    parser.add_argument("--length", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="the simplest wording only")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    )
    tokenizer = Tokenizer.from_pretrained(arguments.model)
    print("| tokens | " + " | ".join(arguments.kinds) + " |")
    print("|---" * (len(arguments.kinds) + 1) + "|")
    for length in arguments.length:
        row = [
            accuracy(
                model,
                tokenizer,
                kind,
                length,
                arguments.samples,
                arguments.seed,
                not arguments.plain,
            )
            for kind in arguments.kinds
        ]
        print(f"| {length} | " + " | ".join(f"{value:.0%}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
