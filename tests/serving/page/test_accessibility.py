"""axe-core finds no fault in any view of the page. `python tests/support/javascript.py` installs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from environments import Unavailable
from javascript import installed
from page_view import View

TOOLS = ("fill-mask", "rank", "similarity", "matrix", "sparse", "entities", "classify", "tokens")
TWELVE = "\n".join(f"{'the old river ' * number}is here" for number in range(12))

pytestmark = pytest.mark.consumers


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core."""
    try:
        return (installed() / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    except Unavailable as error:
        pytest.skip(f"axe-core: {error}")


@pytest.fixture(scope="module")
def every_tool(site: Callable[..., str], served: dict[str, Any], builtin: Any) -> str:
    """The address of a server that answers every tool."""
    return site({"builtin": builtin, **served})


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_axe_finds_no_fault(
    axe: str, view: Callable[..., View], every_tool: str, width: int, color_scheme: str
) -> None:
    page = view(every_tool, viewport={"width": width, "height": 800}, color_scheme=color_scheme).open()
    page.page.evaluate(axe)
    faults = []
    for tool in TOOLS:
        panel = page.run(tool, texts=TWELVE) if tool == "matrix" else page.choose(tool)
        panel.get_by_text("Request and answer").click()
        faults += [(tool, *fault) for fault in _faults(page)]
    page.run("fill-mask", text="no mask")
    page.page.evaluate("document.getElementById('token').hidden = false")
    assert faults + _faults(page) == []


def _faults(page: View) -> list[tuple[str, list[str]]]:
    found = page.page.evaluate("axe.run()")
    assert len(found["passes"]) > 20, "axe looked at the page"
    return [(fault["help"], [node["html"] for node in fault["nodes"]]) for fault in found["violations"]]
