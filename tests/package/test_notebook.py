"""notebooks/features.ipynb runs from top to bottom, and is committed with pictures that are not too large."""
import os
import shutil

import pytest
from repository import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = ROOT / "notebooks" / "features.ipynb"


def pictures(notebook):
    """How many pictures each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/jpeg" in output.get("data", {}) for output in cell.outputs) for cell in cells]


def test_it_is_committed_with_small_outputs():
    assert sum(pictures(nbformat.read(NOTEBOOK, 4))) == 4 and os.path.getsize(NOTEBOOK) < 400_000


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "notebooks")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(tmp_path / "notebooks" / NOTEBOOK.name, 4)
    expected = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    # raises CellExecutionError with what a cell raised
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    assert pictures(notebook) == expected
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert float(printed.split("J&F ")[1].split()[0]) > 0.6 and "random weights" in printed
