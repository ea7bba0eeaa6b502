"""One reader of requests for each test module."""

from pathlib import Path

import pytest

from services.common.settings import Settings
from services.gateway.rest.requests import RequestReader
from tests.services.gateway.rest.readers import reader_of


@pytest.fixture(scope="module")
def reader(model_path: Path) -> RequestReader:
    pruning = {"window_size": 8, "observed_layers": 2, "min_layer": 1}
    return reader_of(Settings(model=str(model_path), model_name="tiny", pruning=pruning))
