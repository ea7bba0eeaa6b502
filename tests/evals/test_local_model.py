from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from evals.local_model import LocalModel
from evals.model import Instance
from evals.tasks.base import Example
from evals.variants import make_variants, parse_methods
from tests.winnow.adapters.made import save_adapter
from winnow import SamplingParams, Winnow
from winnow.engine.prefix.hashes import BLOCK_TOKENS

CONTEXT = "the quick brown fox jumps over the lazy dog " * 20


def local_model(
    folder: Path,
    prefix_cache_bytes: int,
    adapters: Mapping[str, Path] = MappingProxyType({}),
    record_window: int | None = None,
) -> LocalModel:
    return LocalModel(
        str(folder),
        device="cpu",
        dtype="auto",
        max_model_len=None,
        kv_memory_bytes=16 << 20,
        max_batch_size=2,
        pruning={},
        chat=False,
        prefix_cache_bytes=prefix_cache_bytes,
        adapters=adapters,
        record_window=record_window,
    )


def test_questions_about_one_context_compute_it_once_for_each_variant(
    tiny_models: dict[str, Path],
) -> None:
    instances = [
        Instance(
            Example("fox", index, "", CONTEXT, f"{index} jumps over?", "", ("dog",), 6),
            512,
            variant,
        )
        for index in range(3)
        for variant in make_variants(parse_methods("full,asl"), [64])
    ]
    plain, cached = (local_model(tiny_models["llama"], size) for size in (0, 8 << 20))
    expected = dict(plain.answers(instances))
    found = dict(cached.answers(instances))
    for instance in instances:
        answer, like = found[instance], expected[instance]
        assert answer.text == like.text
        assert answer.selection_layer == like.selection_layer
        saved = like.computed_share - answer.computed_share
        if instance.example.index == 0:
            assert saved == 0, "a variant does not profit from another"
        else:
            assert saved > 0.25 * 2 * BLOCK_TOKENS / like.num_prompt_tokens


@pytest.mark.parametrize("record_window", [None, 16], ids=["eval", "calibrate"])
def test_answers_are_those_of_the_adapter(
    record_window: int | None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model, adapters = tiny_models["llama"], {"law": save_adapter(tmp_path, tiny_models["llama"])}
    (variant,) = make_variants(parse_methods("full"), [64])
    example = Example("fox", 0, "", CONTEXT, "who jumps over?", "", ("dog",), 6)
    instance = Instance(example, 512, variant)
    own, plain = (local_model(model, 0, one, record_window) for one in (adapters, {}))
    winnow = Winnow.load(model, method="full", adapters=adapters)
    expected = [
        winnow.generate(
            own.token_ids(example), SamplingParams(max_tokens=6, temperature=0), adapter=name
        ).text
        for name in ("law", None)
    ]
    found = [answer.text for one in (own, plain) for _, answer in one.answers([instance])]
    assert found == expected
    assert found[0] != found[1]
    ref = winnow.adapter("law").ref
    assert own.identity() == plain.identity() | {"adapters": {"law": ref.digest}}
