"""Builds HTML pages for people: one file, which asks no host for anything, for screens of any width and for paper."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDEST = "74rem"
_STYLE = """
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f7f7, #111615);
  --surface: light-dark(#ffffff, #1a211f);
  --sunken: light-dark(#eef1f0, #232c2a);
  --line: light-dark(#d3dad8, #36423f);
  --text: light-dark(#17211f, #e6ecea);
  --quiet: light-dark(#51605c, #a3b2ae);
  --good: light-dark(#1b6e3c, #7fd6a0);
  --warn: light-dark(#8a5200, #f0b866);
  --bad: light-dark(#9d1c1c, #ffa59c);
  --bad-soft: light-dark(#fdeceb, #3a1d1b);
  --first: light-dark(#1f5fc4, #7fb0ff);
  --second: light-dark(#b34700, #ff9f5a);
  --third: light-dark(#0b6460, #6fd0c4);
}
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: WIDEST; margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p, ul { margin: .5rem 0; }
ul { padding-left: 1.2rem; }
.lead, .note, caption, figcaption, dt { color: var(--quiet); }
.note, figcaption { font-size: .875rem; }
section {
  background: var(--surface); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem clamp(0.75rem, 2vw, 1.25rem); margin: 1rem 0;
}
.verdict { border-left: 6px solid var(--good); }
.verdict h2 { color: var(--good); }
.verdict.partly { border-left-color: var(--warn); }
.verdict.partly h2 { color: var(--warn); }
.verdict.failed { border-left-color: var(--bad); }
.verdict.failed h2 { color: var(--bad); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.5rem; }
.columns > * { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-size: .875rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(44rem, 100vw - 4rem); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-size: .875rem; font-weight: 600; }
tbody th, thead th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 400; }
tbody.group th { font-weight: 600; padding-top: .8rem; }
td small { display: block; color: var(--quiet); }
.scroll + .scroll, .columns > .scroll { margin-top: 1.25rem; }
summary { cursor: pointer; font-weight: 600; }
.texts td, .texts th { text-align: left; font-size: .875rem; min-width: 4rem; }
.texts tr > :first-child { min-width: 0; }
.every td, .every th { white-space: nowrap; font-size: .875rem; }
tr.failed > * { background: var(--bad-soft); }
.fit { min-width: min(100%, 34rem); }
.passed-word { color: var(--good); font-weight: 600; }
.missed-word { color: var(--warn); font-weight: 600; }
.failed-word { color: var(--bad); font-weight: 600; }
.bars { width: 100%; }
.bars td.bar { width: 45%; min-width: 5rem; text-align: left; vertical-align: middle; }
.bars tbody th { overflow-wrap: anywhere; }
.bars th:nth-child(2) { text-align: left; }
.bar span { display: block; height: .8rem; min-width: 2px; background: var(--first); border-radius: 2px; }
.bar span.high { background: var(--second); }
dl { display: grid; grid-template-columns: fit-content(60%) minmax(0, 1fr); gap: .2rem 1rem; margin: 0; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
pre {
  background: var(--sunken); border-radius: 6px; padding: .7rem .8rem; margin: .4rem 0 1rem; overflow-x: auto;
  font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .875em; }
pre code { font-size: inherit; }
figure { margin: 0; max-width: 36rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font: 9.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
svg .grid { stroke: var(--line); stroke-width: .7; }
svg .bound { stroke-width: 1.2; stroke-dasharray: 4 3; }
svg .shared { stroke: var(--quiet); }
.s0 { fill: var(--first); stroke: var(--first); }
.s1 { fill: var(--second); stroke: var(--second); }
.s2 { fill: var(--third); stroke: var(--third); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; font-size: .875rem; }
.legend svg { display: inline-block; width: .8rem; height: .8rem; vertical-align: -.08rem; }
:focus-visible { outline: 3px solid var(--first); outline-offset: 2px; }
@media (max-width: 34rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  th, td { padding: .3rem .3rem; font-size: .875rem; }
  td small { font-size: .75rem; }
  .fit { width: 100%; table-layout: fixed; }
  .fit th, .fit td { font-size: .8rem; padding: .3rem .2rem; overflow-wrap: anywhere; }
  .fit thead th { font-size: .68rem; padding: .3rem .1rem; }
  .fit thead th:first-child { width: 27%; }
  .fit thead th:first-child:nth-last-child(3) { width: 38%; }
  .fit thead th:first-child:nth-last-child(2) { width: 55%; }
}
@media print {
  :root { color-scheme: light; }
  body { background: none; font-size: 10pt; }
  main { max-width: none; padding: 0; }
  section { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .6rem 0; margin: .4rem 0; }
  .verdict { border-left: 6px solid var(--good); padding-left: .8rem; print-color-adjust: exact; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  .every td, .every th { font-size: 7pt; padding: .15rem .25rem; }
  .bar span, tr.failed > * { print-color-adjust: exact; }
  h2, h3, caption { break-after: avoid; }
  tr, figure, pre { break-inside: avoid; }
  .columns:has(> .scroll) { display: block; }
  details::details-content { content-visibility: visible; }
}
""".replace("WIDEST", WIDEST)


class Html(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Return a value as HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def joined(parts: Iterable[object]) -> Html:
    """Return values as HTML, one after the other."""
    return Html("".join(map(escaped, parts)))


def element(name: str, *content: object, **attributes: str) -> Html:
    """Return an element. The attribute `class` is `class_`; `aria_label` is aria-label."""
    found = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{found}>{joined(content)}</{name}>")


def page(title: str, *content: object) -> str:
    """Return a whole page with the title as its heading."""
    head = (
        f"<title>{html.escape(title)}</title>"
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style>"
    )
    body = f"<main><h1>{html.escape(title)}</h1>{joined(content)}</main>"
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>{body}</body>\n</html>\n'


def page_section(title: str, *content: object, class_: str = "") -> Html:
    """Return a section with a heading."""
    return element("section", element("h2", title), *content, **({"class_": class_} if class_ else {}))


def items(lines: Iterable[object]) -> Html:
    """Return a list with a point for each line; nothing without lines."""
    points = [element("li", line) for line in lines]
    return element("ul", *points) if points else Html()


def definitions(facts: Mapping[str, Any]) -> Html:
    """Return a list of names and values."""
    return element("dl", *(joined([element("dt", name), element("dd", value)]) for name, value in facts.items()))


def code(text: str) -> Html:
    """Return a block of code, which the keyboard can scroll."""
    return element("pre", element("code", text), tabindex="0")


def scrolling(label: str, content: object) -> Html:
    """Return content that may be wider than a phone, in a box that scrolls by itself."""
    return element("div", content, class_="scroll", role="region", tabindex="0", aria_label=label)


def table(caption: str, header: Sequence[object], *bodies: Html, class_: str = "") -> Html:
    """Return a table of bodies from `rows`, in a box that scrolls by itself."""
    head = element("thead", element("tr", *(element("th", cell, scope="col") for cell in header)))
    named = {"class_": class_} if class_ else {}
    whole = element("table", element("caption", element("span", caption)), head, *bodies, **named)
    return scrolling(caption, whole)


def rows(cells: Iterable[Sequence[object]], *, title: str | None = None, failed: Sequence[bool] = ()) -> Html:
    """Return the body of a table: rows of cells, whose first cells are headings.

    Args:
        cells: the cells of each row.
        title: a heading of the body over its rows; None for no heading.
        failed: whether each row is to be marked; empty for no row.
    """
    made, width = [], 1
    for number, row in enumerate(cells):
        first, *others = row
        width = len(row)
        marked = {"class_": "failed"} if number < len(failed) and failed[number] else {}
        made.append(
            element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in others), **marked)
        )
    if title is None:
        return element("tbody", *made)
    heading = element("tr", element("th", title, scope="rowgroup", colspan=str(width)))
    return joined([element("tbody", heading, class_="group"), element("tbody", *made)])


def bars(caption: str, header: Sequence[str], lengths: Sequence[tuple[str, float, str, bool]]) -> Html:
    """Return a table with a bar for each row, on a linear scale from 0 to the largest value.

    Args:
        caption: what the bars show, with the unit.
        header: three words: over the names, the bars and the values.
        lengths: the name of each row, its value, the value as text, and whether the bar is set apart.
    """
    largest = max((value for _, value, _, _ in lengths if value > 0), default=1.0)
    made = []
    for name, value, text, apart in lengths:
        width = f"width:{100 * max(0.0, value) / largest:.1f}%"
        span = element("span", style=width, **({"class_": "high"} if apart else {}))
        made.append(
            element("tr", element("th", name, scope="row"), element("td", span, class_="bar"), element("td", text))
        )
    return table(caption, header, element("tbody", *made), class_="bars")
