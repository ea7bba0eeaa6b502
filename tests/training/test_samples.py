"""What is learned from is right: answers follow from their contexts, looks are where they say."""

import random
import re

import pytest
from transformers import PreTrainedTokenizerFast

from evals.tasks import make_tasks
from training import examples
from training.batches import collate, draw_positions
from training.circuits import FETCHING_HEAD, FOLLOWING_HEAD, READING_HEAD
from training.curriculum import CURRICULUM, make_sample
from training.examples import SHARES, example_sample, with_lookalikes
from training.samples import Sample, SampleMaker
from training.tokenizer import MAX_POSITIONS

TASKS = {task.name: task for task in make_tasks(num_depths=10, data_dir=None)}


def _drawn(
    monkeypatch: pytest.MonkeyPatch, maker: SampleMaker, name: str, length: int, seed: int
) -> Sample:
    monkeypatch.setattr(examples, "SHARES", {name: 1.0})
    return example_sample(random.Random(seed), maker, length)


def _answer(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    tokens = [t for t, a in zip(sample.tokens, sample.answers, strict=True) if a == 0]
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize("stage", CURRICULUM, ids=lambda stage: stage.name)
def test_sequences_fit_and_their_columns_agree(stage: object, maker: SampleMaker) -> None:
    rng = random.Random(3)
    for length in stage.lengths:  # type: ignore[attr-defined]
        for _ in range(4):
            sample = make_sample(rng, maker, stage, length)  # type: ignore[arg-type]
            assert 0 < len(sample.tokens) <= length
            assert len(sample.tokens) == len(sample.weights) == len(sample.answers)
            assert {a for a in sample.answers if a >= 0} == set(range(len(sample.kinds)))
            assert len(sample.hops) == len(sample.kinds) > 0
            for look in sample.looks:
                assert 0 <= look.target <= look.place < len(sample.tokens) - 1


@pytest.mark.parametrize("name", SHARES)
def test_an_examples_answer_scores_in_full(
    name: str,
    maker: SampleMaker,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = TASKS[name]
    monkeypatch.setattr(examples, "with_lookalikes", lambda rng, example: example)
    for seed in range(4):
        sample = _drawn(monkeypatch, maker, name, 1024, seed)
        # The same example again, from the same draws.
        rng = random.Random(seed)
        rng.choices([name])
        asked = (rng.getrandbits(48), examples.TRAINING_SEED, 1024 - examples.ANSWER_ROOM)
        example = task.example(*asked, maker.count)
        assert example.context in tokenizer.decode(sample.tokens)
        answer = _answer(tokenizer, sample).split("<|end")[0]
        assert task.metric(answer, example.answers) == 1.0
        assert maker.count(answer) <= task.max_new_tokens


def test_training_and_evaluation_share_no_example(maker: SampleMaker) -> None:
    assert examples.TRAINING_SEED < 0
    task = TASKS["vt_zero_shot"]
    drawn = {task.example(i, examples.TRAINING_SEED, 512, maker.count).prompt() for i in range(20)}
    assert not drawn & {task.example(i, 0, 512, maker.count).prompt() for i in range(20)}


@pytest.mark.parametrize("name", ["niah_multikey_2", "kv_retrieval", "niah_multiquery_prose"])
def test_looks_go_from_the_questions_key_to_its_value(
    name: str,
    maker: SampleMaker,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(6):
        sample = _drawn(monkeypatch, maker, name, 768, seed)
        found = [look for look in sample.looks if look.head == READING_HEAD]
        assert all(sample.tokens[look.target] == sample.tokens[look.place + 1] for look in found)
        reads = {look.place: look for look in found if look.repetition == 1}
        assert all(look.repetition == 0 for look in found if look.place not in reads)
        fetches = {look.place: look for look in sample.looks if look.head == FETCHING_HEAD}
        assert reads.keys() == fetches.keys()
        firsts = [place for place in reads if place - 1 not in reads]
        assert len(firsts) == (4 if "multiquery" in name else 1) < len(reads)
        for place in firsts:
            read, fetch = reads[place], fetches[place]
            before = (
                str(tokenizer.decode(sample.tokens[: read.target])).strip().rstrip('"').rstrip()
            )
            key = re.split(r'[\s"]', re.sub(r'( is|"):$', "", before))[-1]
            asked = str(tokenizer.decode(sample.tokens[fetch.target - 30 : fetch.target + 3]))
            assert key[-8:] in asked
            assert (fetch.repetition, read.repetition) == (0, 1)


def test_looks_follow_a_chain_link_by_link_to_its_value(
    maker: SampleMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(8):
        sample = _drawn(monkeypatch, maker, "chain_shuffled_4", 768, seed)
        text = str(tokenizer.decode(sample.tokens))
        (name,) = re.findall(r"value of VAR (\w+)", text)
        looks = list(sample.looks)
        if "<|user|>" in text:  # no beginning of the answer repeats the variable
            fetched = looks.pop(0)
            assert fetched.head == FETCHING_HEAD
            asked = tokenizer.decode(sample.tokens[fetched.target - 6 : fetched.target + 1])
            assert asked == f"VAR {name}"
        assert [look.repetition for look in sample.looks] == list(range(len(sample.looks)))
        *followed, read = looks
        assert len(followed) == 3
        for look in followed:
            assert look.head == FOLLOWING_HEAD
            (previous,) = re.findall(rf"VAR {name} = VAR (\w+)", text)
            link = str(tokenizer.decode(sample.tokens[look.target - 14 : look.target + 1]))
            assert link.endswith(f"{name} = VAR {previous}")
            name = previous
        assert read.head == READING_HEAD
        value = _answer(tokenizer, sample).strip()[:5]
        assert f"VAR {name} = {value}" in text
        assert tokenizer.decode(sample.tokens[read.target : read.target + 5]) == value


def test_the_name_assigned_last_is_looked_at(
    maker: SampleMaker, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        sample = _drawn(monkeypatch, maker, "vt_zero_shot", 768, seed)
        name = _answer(tokenizer, sample).split()[0]
        targets = [look.target for look in sample.looks]
        assert tokenizer.decode([sample.tokens[target] for target in targets]) == name
        *_, last = re.findall(
            r"VAR (\w+) = VAR", str(tokenizer.decode(sample.tokens[: targets[-1] + 4]))
        )
        assert last == name
        assert sample.answers[sample.looks[0].place + 1] == 0 > sample.answers[targets[0]]
        assert {look.head for look in sample.looks} == {READING_HEAD}


def test_positions_ascend_within_the_models_reach() -> None:
    rng = random.Random(0)
    for _ in range(50):
        positions = draw_positions(rng, [10, 20, 30], 256)
        assert len(positions) == 256
        assert positions == sorted(set(positions))
        assert 0 <= positions[0] <= positions[-1] < MAX_POSITIONS


def test_a_batch_pads_and_numbers_its_answers() -> None:
    first, second = Sample(), Sample()
    for sample, answer in ((first, [7, 8]), (second, [9])):
        sample.tokens, sample.weights, sample.answers = [5, 6], [0.0, 0.0], [-1, -1]
        sample.add_answer(answer, "pair")
    batch = collate([first, second], [range(5), range(5)], 5)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 0], [5, 6, 9, 0, 0]]
    assert batch.answers.tolist() == [[-1, -1, 0, 0, -1], [-1, -1, 1, -1, -1]]
    assert batch.kinds == ("pair", "pair")
    assert batch.looks.shape == (0, 5)


def test_lookalikes_share_pieces_with_the_uuids_asked_for(maker: SampleMaker) -> None:
    example = TASKS["kv_retrieval"].example(0, -1, 600, maker.count)
    similar = with_lookalikes(random.Random(0), example)
    (answer,) = example.answers
    assert f'": "{answer}"' in similar.context
    assert len(similar.context) == len(example.context)
    pieces = {answer[i : i + 5] for i in range(len(answer) - 4)}

    def num_shared(context: str) -> int:
        return sum(context.replace(answer, "").count(piece) for piece in pieces)

    assert num_shared(similar.context) > num_shared(example.context)
    needle = TASKS["niah_single_1"].example(0, -1, 600, maker.count)
    assert with_lookalikes(random.Random(0), needle) == needle
