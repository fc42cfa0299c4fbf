"""The notebook: it runs from top to bottom in a short form, and is committed with the outputs of the long one."""

import json
from pathlib import Path

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def outputs(notebook: dict) -> str:
    return "".join(json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")


def test_notebook_runs_from_top_to_bottom_in_its_short_form(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WALKTHROUGH", "short")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # toy videos are rendered there
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    printed = outputs(notebook)
    assert "pre-training: 4 steps" in printed and "pre-trained: 4 steps" in printed
    assert printed.count("image/jpeg") == outputs(nbformat.read(NOTEBOOK, as_version=4)).count("image/jpeg")


def test_notebook_is_committed_with_the_outputs_of_a_whole_run_in_order():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    printed = outputs(notebook)
    assert "pre-training: 800 steps" in printed and '"error"' not in printed and "stderr" not in printed
    assert printed.count("image/jpeg") >= 10 and NOTEBOOK.stat().st_size < 700_000
