"""The chart of a report: how far each engine is from PyTorch at each length, as dots on a logarithmic axis."""

import math
from collections.abc import Callable, Sequence

from gte_deploy.core.pages import Html, element, escaped, joined
from gte_deploy.exporters.verification.results import EngineParity

# In units of the drawing, which fills the width of a phone at about one pixel each.
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 340, 42, 14, 18, 26, 32
_LOWEST, _HIGHEST = 1e-9, 1e3  # a logarithmic axis has no zero; smaller differences are drawn at its left end
_MOST_TICKS = 7
_SHAPES = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" class="s0">{title}</circle>',
    '<path d="M{x:.1f} {y:.1f}m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z" class="s1">{title}</path>',
    '<path d="M{x:.1f} {y:.1f}m0 -4l4 7h-8z" class="s2">{title}</path>',
)


def difference_chart(engines: Sequence[EngineParity]) -> Html:
    """Draw the largest relative difference of each engine at each length. The tables have the same numbers."""
    engines = engines[: len(_SHAPES)]
    lengths = sorted({result.case.length for engine in engines for result in engine.cases})
    found = [{length: _largest(engine, length) for length in lengths} for engine in engines]
    bounds = [engine.tolerance.max_rel for engine in engines]
    numbers = [value for values in found for value in values.values() if value is not None and math.isfinite(value)]
    low, high = _decades([*numbers, *(bound for bound in bounds if bound is not None)])
    height = _TOP + _ROW * len(lengths) + _BOTTOM

    def across(value: float) -> float:
        share = (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = [_axis(low, high, across, lengths)]
    for number, (engine, values, bound) in enumerate(zip(engines, found, bounds, strict=True)):
        if bound is not None and bound not in bounds[:number]:
            x, color = across(bound), "shared" if bounds.count(bound) > 1 else f"s{number}"
            parts.append(
                Html(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" class="bound {color}">'
                    f"<title>bound {bound:g}</title></line>"
                )
            )
        for row, length in enumerate(lengths):
            if (value := values[length]) is None:
                continue
            y = _TOP + _ROW * (row + (number + 1) / (len(engines) + 1))
            said = escaped(f"{engine.title}, {length:,} tokens: {value:.1e}")
            x = across(value) if math.isfinite(value) else float(_WIDTH - _RIGHT)
            parts.append(Html(_SHAPES[number].format(x=x, y=y, title=f"<title>{said}</title>")))
    drawing = element(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH} {height}",
        role="img",
        aria_label="Largest relative difference from PyTorch by number of tokens; the tables below have the numbers.",
    )
    caption = (
        "Largest difference from PyTorch FP32 at each length, divided by the size of the output (no unit). "
        "A step of the axis is a factor of ten; smaller is better."
        f"{' Dashed lines are bounds.' if any(bound is not None for bound in bounds) else ''}"
    )
    return element("figure", _legend(engines), drawing, element("figcaption", caption))


def _largest(engine: EngineParity, length: int) -> float | None:
    """Return the largest relative difference at a length, NaN if any is; None if the engine did not run it."""
    values = [
        found.max_rel for result in engine.cases if result.case.length == length for found in result.compared().values()
    ]
    if not values:
        return None
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the exponents of ten that enclose the values; at least two decades apart."""
    clamped = [min(max(value, _LOWEST), _HIGHEST) for value in values] or [1e-7]
    low, high = math.floor(math.log10(min(clamped)) - 1e-9), math.ceil(math.log10(max(clamped)) + 1e-9)
    return low, max(high, low + 2)


def _axis(low: int, high: int, across: Callable[[float], float], lengths: Sequence[int]) -> Html:
    bottom = _TOP + _ROW * len(lengths)
    parts = []
    step = math.ceil((high - low + 1) / _MOST_TICKS)
    for exponent in range(low, high + 1):
        x = across(10.0**exponent)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" class="grid"/>')
        if (exponent - low) % step == 0:
            text = "1" if exponent == 0 else f"1e{exponent}"
            parts.append(f'<text x="{x:.1f}" y="{bottom + 12}" text-anchor="middle" class="tick">{text}</text>')
    for row, length in enumerate(lengths):
        y = _TOP + _ROW * row
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + _ROW / 2 + 3.4:.1f}" text-anchor="end" class="length">{length:,}</text>'
        )
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}" class="grid"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 27}" text-anchor="middle">relative difference</text>')
    parts.append(f'<text x="{_LEFT - 6}" y="{_TOP - 6}" text-anchor="end">tokens</text>')
    return Html("".join(parts))


def _legend(engines: Sequence[EngineParity]) -> Html:
    entries = []
    for number, engine in enumerate(engines):
        shape = Html(f'<svg viewBox="0 0 12 12" aria-hidden="true">{_SHAPES[number].format(x=6, y=6, title="")}</svg>')
        bound = engine.tolerance.max_rel
        said = f" {engine.title}" + ("" if bound is None else f", bound {bound:g}")
        entries.append(element("li", shape, said))
    return element("ul", joined(entries), class_="legend")
