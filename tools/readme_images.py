"""Draw the chart and the badges of README.md from the results of a benchmark and from pyproject.toml.

    python tools/readme_images.py            # write docs/images/*.svg (make docs)
    python tools/readme_images.py --check    # exit with 1 when one of them is stale

The images are files of this repository: README.md asks no other host for them, and no badge names an index or a service
that does not have this project.
"""

import argparse
import json
import statistics
import sys
import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
RESULT = ROOT / "benchmarks" / "results" / "2026-12-01-inference-amd-epyc-zen4-lists.json"
WORKLOAD = "list-mixed"
# Name of the contestant in the result -> its label. Peers are drawn twice: as they come, and with a batch size that
# somebody chose for this list.
BARS = {
    "sentence-transformers": "sentence-transformers on torch, FP32",
    "sentence-transformers openvino": "sentence-transformers on OpenVINO, FP32",
    "sentence-transformers, batches of 8": "sentence-transformers on torch, FP32, batches of 8",
    "sentence-transformers openvino, batches of 8": "sentence-transformers on OpenVINO, FP32, batches of 8",
    "gte-deploy openvino fp32": "gte-deploy on OpenVINO, FP32",
    "sentence-transformers openvino bf16, batches of 8": "sentence-transformers on OpenVINO, BF16, batches of 8",
    "gte-deploy openvino bf16": "gte-deploy on OpenVINO, BF16",
    "gte-deploy openvino int8": "gte-deploy on OpenVINO, INT8",
}
# (text, quiet text, a peer's bar, our bar)
COLOURS = {
    "light": ("#1f2328", "#59636e", "#afb8c1", "#0969da"),
    "dark": ("#f0f6fc", "#9198a1", "#59636e", "#4493f8"),
}
FONT = "font-family=\"-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif\""
WIDTH, ROW, TOP, BAR, LONGEST = 480, 44, 66, 14, 430


def seconds() -> dict[str, float]:
    """Return the median seconds of each contestant of the chart."""
    measured = json.loads(RESULT.read_text(encoding="utf-8"))["measurements"]
    found = {
        each["contestant"]: statistics.median(each["seconds"])
        for each in measured
        if each["workload"] == WORKLOAD and not each["noise"] and not each["error"]
    }
    return {name: found[name] for name in BARS}


def chart(theme: str) -> str:
    """Draw a bar for each contestant, with its label above it, so that it can be read on a phone."""
    text, quiet, peer, ours = COLOURS[theme]
    times = seconds()
    height = TOP + ROW * len(times) + 30
    told = "; ".join(f"{BARS[name]} {value:.1f} s" for name, value in times.items())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(f"Seconds to embed 128 texts of mixed lengths: {told}")}" {FONT}>',
        f'<text x="0" y="20" font-size="17" font-weight="600" fill="{text}">Seconds to embed 128 texts of mixed '
        "lengths</text>",
        f'<text x="0" y="42" font-size="14" fill="{quiet}">base-size GTE, random weights, 6 to 291 tokens; '
        "less is better</text>",
    ]
    for row, (name, value) in enumerate(times.items()):
        y, colour = TOP + ROW * row, ours if name.startswith("gte-deploy") else peer
        width = LONGEST * value / max(times.values())
        weight = 600 if colour == ours else 400
        lines += [
            f'<text x="0" y="{y + 12}" font-size="14" font-weight="{weight}" fill="{text}">{BARS[name]}</text>',
            f'<rect x="0" y="{y + 18}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{width + 8:.1f}" y="{y + 30}" font-size="14" font-weight="{weight}" fill="{text}">'
            f"{value:.1f}</text>",
        ]
    lines += [
        f'<text x="0" y="{height - 8}" font-size="12" fill="{quiet}">two cores of an AMD EPYC (Zen 4), '
        "2026-12-01, medians of three rounds</text>",
        "</svg>",
    ]
    return "\n".join([*lines, ""])


def badge(label: str, value: str) -> str:
    """Draw a badge that reads on light and dark pages alike."""
    left, right = (8 + round(6.8 * len(word)) + 8 for word in (label, value))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
            f'aria-label="{escape(f"{label}: {value}")}" {FONT} font-size="11">',
            f'<rect width="{left + right}" height="20" rx="3" fill="#0b5cad"/>',
            f'<path d="M3 0h{left - 3}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#444d56"/>',
            f'<g fill="#fff" text-anchor="middle"><text x="{left / 2:g}" y="14">{escape(label)}</text>',
            f'<text x="{left + right / 2:g}" y="14">{escape(value)}</text></g>',
            "</svg>",
            "",
        ]
    )


def images() -> dict[str, str]:
    """Return the name and the content of every image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    minors = sorted(int(name.removeprefix(prefix)) for name in project["classifiers"] if name.startswith(prefix))
    return {
        "chart-light.svg": chart("light"),
        "chart-dark.svg": chart("dark"),
        "badge-python.svg": badge("Python", f"3.{minors[0]} – 3.{minors[-1]}"),
        "badge-license.svg": badge("license", project["license"]),
        "badge-gpu.svg": badge("run on a GPU", "not yet"),
    }


def main() -> int:
    """Write or check the images; return 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 for a stale image")
    check = parser.parse_args().check
    stale = []
    for name, content in images().items():
        file = IMAGES / name
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not check:
                file.write_text(content, encoding="utf-8")
                print(f"wrote {file.relative_to(ROOT)}")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
