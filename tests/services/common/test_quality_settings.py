"""The settings of quality in use."""

import pytest

from services.common.settings_sources import load_settings
from winnow.errors import InvalidSetting


def test_nothing_is_sampled_unless_told() -> None:
    assert (load_settings().quality_sample, load_settings().quality_tasks) == (0, ())


@pytest.mark.parametrize("value", ["qa, summary.v2", "qa", ""])
def test_tasks_are_one_text_or_a_list(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_QUALITY_TASKS", value)
    expected = tuple(value.split(", ")) if value else ()
    assert load_settings().quality_tasks == expected
    assert load_settings({"quality_tasks": list(expected)}).quality_tasks == expected


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"quality_sample": 1.5}, "setting quality_sample is 1.5"),
        ({"quality_sample": "-0.1"}, "greater than or equal to 0"),
        ({"quality_tasks": "q a"}, "quality_tasks is 'q a'"),
        ({"quality_tasks": "x" * 65}, "quality_tasks"),
    ],
)
def test_refuses_what_is_out_of_range(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidSetting, match=complaint):
        load_settings(flags)
