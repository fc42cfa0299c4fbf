"""The notebook: it runs from top to bottom in a short form, and is committed with the outputs of the long one."""

import json
from pathlib import Path

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def outputs(notebook: dict) -> str:
    return "".join(json.dumps(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")


def test_notebook_runs_and_is_committed_with_the_outputs_of_a_whole_run_in_order(tmp_path: Path, monkeypatch):
    committed, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    whole = outputs(committed)
    assert "step 3,000: loss" in whole and '"error"' not in whole and "stderr" not in whole and " nan" not in whole
    assert whole.count("image/png") >= 15 and "image/jpeg" not in whole and NOTEBOOK.stat().st_size < 500_000
    monkeypatch.setenv("WALKTHROUGH", "short")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the video of section 1 is written there
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    short = outputs(notebook)
    assert "step 10: loss" in short and short.count("image/png") == whole.count("image/png")
