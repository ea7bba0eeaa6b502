"""Methods on a prompt of some dozens of tokens."""

from tests.winnow.drive import (
    admit,
    assert_empty,
    decode_all,
    ids,
    make_engine,
    spec,
)
from winnow.decoder import DecoderModel
from winnow.engine.prefix.store import PrefixStore
from winnow.pruning_settings import PruningSettings
from winnow.sampling_params import SamplingParams

SMALL = PruningSettings(
    select_tokens=24,
    window_size=8,
    kernel_size=3,
    observed_layers=2,
    min_layer=1,
    threshold=0.9,
    latest_layer=2,
    fixed_layer=1,
    kv_budget=20,
)
NUM_KV_HEADS = 2
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def answer(
    model: DecoderModel,
    token_ids: list[int],
    settings: PruningSettings,
    store: PrefixStore | None = None,
) -> list[int]:
    """The greedy answer, by both engines with the memory that the settings ask for."""
    engine = make_engine(model)
    most = settings.max_prompt_entries(len(token_ids), NUM_KV_HEADS)
    request = spec("r", len(token_ids), GREEDY, max_prompt_entries=most)
    admit(engine, request, token_ids, settings, store)
    tokens = ids(decode_all(engine)["r"])
    assert_empty(engine)
    return tokens
