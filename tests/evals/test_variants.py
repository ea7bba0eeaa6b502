import pytest

from evals.variants import in_lines, make_variants, parse_methods
from winnow.catalog import METHODS
from winnow.errors import InvalidSetting


def test_a_method_has_its_options_and_its_budgets() -> None:
    specs = parse_methods("full, asl:threshold=0.4:latest_layer=null,snapkv:compression=top_p")
    variants = make_variants(specs, (64, 128))
    assert [(v.method, v.budget) for v in variants] == [
        ("full", None),
        ("asl:threshold=0.4:latest_layer=null", 64),
        ("asl:threshold=0.4:latest_layer=null", 128),
        ("snapkv:compression=top_p", 64),
        ("snapkv:compression=top_p", 128),
    ]
    assert variants[0].changes == {"method": "full"}
    assert variants[1].changes == {
        "method": "asl",
        "select_tokens": 64,
        "kv_budget": 64,
        "threshold": 0.4,
        "latest_layer": None,
    }


def test_an_option_wins_over_the_budget() -> None:
    (variant,) = make_variants(parse_methods("asl:select_tokens=512"), (64,))
    assert (variant.changes["select_tokens"], variant.changes["kv_budget"]) == (512, 64)


def test_a_method_that_is_named_twice_runs_once() -> None:
    assert len(parse_methods("asl,snapkv,asl")) == 2


def test_every_method_can_be_asked_for() -> None:
    assert [spec.method for spec in parse_methods(",".join(METHODS))] == list(METHODS)


def test_a_long_method_breaks_before_its_options() -> None:
    assert in_lines("asl:threshold=0.4") == "asl:threshold=0.4"
    text = "snapkv:decode_budget=512:recompression=rkv:redundancy_weight=0.2"
    assert in_lines(text).split("\n") == [
        "snapkv:decode_budget=512",
        ":recompression=rkv",
        ":redundancy_weight=0.2",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("asl,snapvk", "method 'snapvk' is not known; known are full, snapkv"),
        ("asl:tau=0.4", "'asl:tau=0.4': tau is not an option; options are .*threshold"),
        ("asl:threshold", "'asl:threshold': threshold: a pruning setting must be NAME=VALUE"),
        ("asl:method=full", "method is not an option"),
        ("asl:threshold=[", "'\\[' is not a value for threshold"),
        (" , ", "names nothing"),
    ],
)
def test_refuses_a_method_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        parse_methods(text)
