"""Which backend reads the pages."""

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from winnow.attention import GatherBackend, PagedEntries, decode_backend
from winnow.layers import FULL


def pool(device: str) -> Any:
    keys, values = torch.zeros(2, 4, 16, 64)
    pages = PagedEntries(keys, values, torch.zeros(4, 16, dtype=torch.int32))
    shape = SimpleNamespace(dtype=torch.float32, layers=(FULL,))
    return SimpleNamespace(device=torch.device(device), page_size=16, paged=pages, shape=shape)


def test_a_cpu_gathers_pages(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(decode_backend(pool("cpu"), 4), GatherBackend)
    assert not caplog.records


def test_where_the_kernel_cannot_run_pages_are_gathered_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "winnow.kernels.gpu.attention", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(decode_backend(pool("cuda"), 4), GatherBackend)
    (record,) = caplog.records
    assert "decode copies pages, because the attention kernel fails here" in record.getMessage()


def test_the_engines_load_no_kernel_before_a_cuda_device_needs_it() -> None:
    imports = "import sys, winnow.local, winnow.engine.decode"
    code = f"{imports}; sys.exit('winnow.kernels.gpu' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
