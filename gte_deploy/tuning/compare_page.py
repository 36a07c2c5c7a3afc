"""The page of `gte-deploy compare --html`, in the style of a bundle's report."""

from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.pages import bars, definitions, element, items, page, page_section, rows, table
from gte_deploy.tuning.compare import ComparisonResult, measure_rows, side_rows, text_of


def render_comparison(result: ComparisonResult) -> str:
    """Return one page without other files: the agreement and the speed first, then every text."""
    names = [str(side.manifest.source.get("name")) for side in (result.a, result.b)]
    lead = f"A is {result.a.bundle}, and B is {result.b.bundle}; compared on {len(result.texts)} texts."
    times = [
        (f"{name}, {side.engine}", side.spread.median, f"{side.spread.median * 1000:,.1f} ms", False)
        for name, side in (("A", result.a), ("B", result.b))
    ]
    sizes = [
        (f"{name}, {side.manifest.precision}", float(side.size), f"{side.size / 1e6:,.1f} MB", False)
        for name, side in (("A", result.a), ("B", result.b))
    ]
    texts = [
        [number + 1, text_of(result.texts[number]), *result.found.answers[number], f"{result.found.texts[number]:.4f}"]
        for number in result.worst()
    ]
    caption = f"Median time for {len(result.texts)} texts, in milliseconds: called in turn, after a call that warms up"
    return page(
        f"{names[0]} and {names[1]} side by side" if names[0] != names[1] else f"{names[0]}: two bundles side by side",
        element("p", lead, class_="lead"),
        page_section(
            "Agreement",
            table(
                "1 or 100 % is equal; a difference of scores is 0 then",
                ["measure", "value"],
                rows(measure_rows(result)),
            ),
            items(result.notes),
        ),
        page_section(
            "Speed and size",
            element("p", result.speed()),
            bars(caption, ["bundle", "time", "median"], times),
            bars("Size on disk, in megabytes (10⁶ bytes)", ["bundle", "size", "value"], sizes),
        ),
        page_section(
            "The two bundles",
            table("What each is, and how it ran here", ["", "A", "B"], rows(side_rows(result)), class_="fit"),
        ),
        page_section(
            "Every text",
            table("The least agreement first", ["number", "text", "A", "B", "agreement"], rows(texts), class_="texts"),
        ),
        page_section(
            "Where it was measured",
            definitions({"cpu": cpu_model(), "threads": result.num_threads, "date": result.date, **engine_versions()}),
        ),
    )
