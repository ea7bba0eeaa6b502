"""Which form of a kernel a device gets."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from winnow.kernels import scatter as reference
from winnow.kernels.choice import scatter_for


def pool(device: str) -> Any:
    part = SimpleNamespace(device=torch.device(device))
    return part, part, part


def test_other_devices_than_gpus_have_pytorchs_form(caplog: pytest.LogCaptureFixture) -> None:
    assert scatter_for(pool("cpu")) is reference.scatter
    assert scatter_for(pool("meta")) is reference.scatter
    assert not caplog.records


def test_where_the_kernel_cannot_run_layers_are_written_in_parts_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "winnow.kernels.gpu.scatter", None)
    with caplog.at_level(logging.WARNING):
        assert scatter_for(pool("cuda")) is reference.scatter
    (record,) = caplog.records
    expected = "arriving layers are written in parts, because the scatter kernel fails here: "
    assert record.getMessage().startswith(expected)
