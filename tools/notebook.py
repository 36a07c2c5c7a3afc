"""Run a script with cells (`# %%`), and write it as a notebook with what each cell printed.

    python tools/notebook.py examples/notebooks/fine_tune.py    # writes fine_tune.ipynb beside it

Editors show such a script as cells, too, and git shows its changes; a forge shows the notebook. Change the script.
"""

import argparse
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any


def cells(script: str) -> list[tuple[str, str]]:
    """Return the kind ("markdown" or "code") and the text of each cell of a script."""
    parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    found = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        markdown = "[markdown]" in mark
        text = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if markdown else text
        found.append(("markdown" if markdown else "code", text.strip("\n")))
    return found


def printed_by(codes: list[str]) -> list[str]:
    """Run the cells with code in one namespace, and return what each printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for code in codes:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "cell", "exec"), namespace)
        outputs.append(printed.getvalue())
    return outputs


def notebook(found: list[tuple[str, str]], outputs: list[str]) -> dict[str, Any]:
    """Return a notebook of nbformat 4.5; `outputs` has a text for each cell with code."""
    remaining = iter(outputs)
    made = []
    for number, (kind, text) in enumerate(found, 1):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            stream = next(remaining).splitlines(keepends=True)
            output = {"name": "stdout", "output_type": "stream", "text": stream}
            cell |= {"execution_count": None, "outputs": [output] if stream else []}
        made.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    """Run the script of the command line, and write the notebook beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    script = parser.parse_args().script
    found = cells(script.read_text(encoding="utf-8"))
    outputs = printed_by([text for kind, text in found if kind == "code"])
    text = json.dumps(notebook(found, outputs), indent=1, ensure_ascii=False)
    script.with_suffix(".ipynb").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
