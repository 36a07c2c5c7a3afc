"""The page at `/` of a server, as a test sees it in a browser."""

from __future__ import annotations

import dataclasses

from playwright.sync_api import Locator, Page, Request, expect


@dataclasses.dataclass
class View:
    """The page in a browser, and what happened in it.

    Args:
        page: the browser's page.
        address: that of the server.
        requests: every request of the page.
        faults: errors of its scripts, and what its policy forbids.
    """

    page: Page
    address: str
    requests: list[Request] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)

    def open(self, fragment: str = "") -> View:
        """Open the page, and wait for the models."""
        self.page.goto(f"{self.address}{fragment}")
        expect(self.page.get_by_role("tabpanel")).to_be_visible()
        return self

    def panel(self, tool: str) -> Locator:
        """The panel of a tool, when its answer or its error is there."""
        panel = self.page.locator(f"#panel-{tool}")
        expect(panel.locator(".summary:not(:empty), .failure:not([hidden])").first).to_be_attached()
        expect(panel).not_to_have_attribute("aria-busy", "true")
        return panel

    def choose(self, tool: str) -> Locator:
        """Choose a tool by its tab, and return its panel as `panel` does."""
        self.page.locator(f"#tab-{tool}").click()
        return self.panel(tool)

    def run(self, tool: str, **values: str | bool) -> Locator:
        """Fill a tool's form, run it, and return its panel when the answer to this is there."""
        panel = self.choose(tool)
        for name, value in values.items():
            field = panel.locator(f"[name={name}]")
            if isinstance(value, bool):
                field.set_checked(value)
            elif field.evaluate("control => control.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
        # What stood there before is no answer to this.
        panel.evaluate("panel => panel.querySelectorAll('.summary, .answer').forEach((old) => old.replaceChildren())")
        panel.get_by_role("button", name="Run").click()
        return self.panel(tool)

    def shown_tools(self) -> list[str]:
        """The names on the tabs that can be seen: a hidden one has no role."""
        return [tab.inner_text() for tab in self.page.get_by_role("tab").all()]


def rows_of(panel: Locator) -> list[list[tuple[str, float]]]:
    """The names and numbers of each table of bars; percentages as parts of 1."""
    tables = []
    for table in panel.locator("table.bars").all():
        names = table.locator("tbody th").all_inner_texts()
        scores = [_number(text) for text in table.locator("tbody td.score").all_inner_texts()]
        tables.append(list(zip(names, scores, strict=True)))
    return tables


def _number(text: str) -> float:
    return float(text.removesuffix(" %")) / 100 if text.endswith("%") else float(text)
