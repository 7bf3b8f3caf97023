"""Run notebooks where they lie, and keep what they show: python tests/execute.py NOTEBOOK...

Figures are kept as pictures of 256 colours: a third to a fifth of the bytes."""
import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


def smaller(png: str) -> str:
    "A picture as a notebook holds it (PNG, base64) -> the same in 256 colours."
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def execute(path: Path) -> None:
    "Run a notebook in its own folder and save it. Raises CellExecutionError, and leaves the file as it was, where a cell fails."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, store_widget_state=False, resources=dict(metadata=dict(path=path.parent))).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in (data := output.get("data", {})):
                data["image/png"] = smaller(data["image/png"])
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        execute(Path(name).resolve())
