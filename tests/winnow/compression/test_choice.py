"""Which kernels recompression uses."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from winnow.compression.choice import REFERENCE, recompression_kernels

MODULE = "winnow.kernels.gpu.recompression"


def test_a_cpu_uses_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    assert recompression_kernels(torch.empty(1, 16, 64), torch.float32, 4) is REFERENCE
    assert not caplog.records


def test_where_the_kernels_cannot_run_pytorch_is_used_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, dtype = torch.device("cuda"), torch.float32
    keys: Any = SimpleNamespace(device=device, dtype=dtype, shape=(1, 16, 64))
    monkeypatch.setitem(sys.modules, MODULE, None)
    with caplog.at_level(logging.WARNING):
        assert recompression_kernels(keys, dtype, 4) is REFERENCE
    (record,) = caplog.records
    assert "recompression uses PyTorch, because its kernel fails here" in record.getMessage()
