"""The options of `gte-export verify-published`."""

from dataclasses import dataclass
from pathlib import Path

from gte_deploy.core.options import option

VERIFY_PUBLISHED = "verify-published"
"""The name of the command."""


@dataclass(frozen=True)
class PublishedOptions:
    """How published checkpoints are verified.

    Args:
        results: folder of the results. The work folder in it holds one bundle at a time.
        target: of the export: "cpu", "cuda" or "openvino"; None for "cpu".
        precision: of the export. The values of others are judged in FP32 alone; else they are only listed.
        cache_dir: folder for downloads; None for the Hugging Face cache.
        remove_downloads: download into the work folder, and remove each checkpoint when its result is written.
        force: verify again what has a result already.
    """

    results: Path = option(
        Path("published-results"), "folder of the results, one JSON file for each model", metavar="DIR", parse=Path
    )
    target: str | None = option(None, "target of the export (default: cpu)", choices=("cpu", "cuda", "openvino"))
    precision: str | None = option(
        None,
        "precision of the export (default: fp32 on CPUs, the only one in which recorded values are judged)",
        metavar="PRECISION",
    )
    cache_dir: str | None = option(None, "folder for downloads (default: the Hugging Face cache)", metavar="DIR")
    remove_downloads: bool = option(
        False, "download into the folder of the results, and remove each checkpoint after its result is written"
    )
    force: bool = option(False, "verify again what has a result")
