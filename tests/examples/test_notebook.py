"""The notebook runs from top to bottom, and shows what it says."""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.winnow_process import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NOTEBOOK = ROOT / "examples" / "selection_by_layer.ipynb"


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines that its cells wrote to standard output."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    written = [output.text for output in outputs if output.get("name") == "stdout"]
    return "".join(written).splitlines()


def read() -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(NOTEBOOK, 4)  # type: ignore[no-untyped-call]
    return notebook


def test_the_notebook_selects_later_for_harder_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")]))
    stored, notebook = read(), read()
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    *about, first, second, third = printed(notebook)
    assert about == printed(stored)[:-3] != []
    found = re.findall(r": layer (\d+), \d\d% computed", f"{first}\n{second}\n{third}")
    assert len(found) == 3
    layers = [int(layer) for layer in found]
    assert layers == sorted(layers)  # the harder the later; which exactly depends on the processor
    figures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "data" in o]
    assert "image/png" in figures[-1].data
