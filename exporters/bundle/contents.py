"""Writes the files of a bundle besides its graphs: configuration, tokenizer, report and manifest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.bundle.manifest import GraphEntry, GraphPart, Manifest
from gte_deploy.core.arrays import save_array
from gte_deploy.core.errors import BundleError
from gte_deploy.core.files import read_json_object
from gte_deploy.core.spec import Engine
from gte_deploy.exporters.bundle.card import REPORT, write_card
from gte_deploy.exporters.bundle.hub_files import write_hub_files
from gte_deploy.exporters.bundle.writer import seal
from gte_deploy.exporters.job import GRAPH_PATHS, Built, Job, part_path
from gte_deploy.exporters.verification.report import build_report, versions_of
from gte_deploy.exporters.verification.report_page import ReportPage
from gte_deploy.exporters.verification.results import ParityReport
from gte_deploy.models.sparse_modules import read_query_weights

if TYPE_CHECKING:
    from gte_deploy.exporters.graph.build import Graph


def write_model_files(job: Job) -> None:
    """Write the configuration and tokenizer files, which all libraries read."""
    write_hub_files(job.folder, job.checkpoint)
    sparse = job.spec.sparse
    if sparse is not None and sparse.query_weights is not None:
        token_id = job.tokenizer.known_or_unknown_id
        weights = read_query_weights(job.checkpoint.files, job.checkpoint.places.sparse, job.spec.vocab_size, token_id)
        assert weights is not None  # the spec names them
        save_array(job.folder / sparse.query_weights, weights)


def write_report(job: Job, built: Built, parity: ParityReport, *, source: Mapping[str, str]) -> Manifest:
    """Write the report for people and for programs, and the model card, and seal the bundle.

    Args:
        job: the export; its folder holds all other files already.
        built: the graphs and the engine.
        parity: their comparison with PyTorch and with the checkpoint's own library.
        source: the origin of the weights.

    Returns:
        The manifest, as read back by the runtime's own reader.
    """
    entries: dict[Engine, GraphEntry] = {
        engine: GraphEntry(
            path=built.path(engine),
            opset=graph.opset,
            inputs=graph.inputs,
            outputs=graph.outputs,
            fusions=graph.fusions,
            computes=parity.verified(engine),
            emulated=parity.verified(engine, emulated=True),
            parts=tuple(
                _described(part_path(engine, name), part) for name, part in built.parts.get(engine, {}).items()
            ),
            all_logits=_described(GRAPH_PATHS[engine], built.all_logits[engine])
            if engine in built.all_logits
            else None,
        )
        for engine, graph in built.graphs.items()
    }
    report = build_report(parity, built, spec=job.spec, source=source, graphs=entries, timings_s=job.steps.seconds)
    _write_json(job.folder / REPORT, report)
    described = Manifest(
        spec=job.spec,
        precision=parity.precision,
        graphs=entries if built.keeps_graphs else {},
        files={},
        versions=versions_of(parity, built),
        source=source,
        target=built.made_for,
        plan=built.plan,
        missed_bounds=tuple(parity.failures()),
        calibration=built.calibration,
    )
    mask_token = job.tokenizer.mask_token
    config = read_json_object(job.folder / "config.json", error=BundleError, advice="Export the bundle again.")
    page = ReportPage(parity, report, described, str(config.get("model_type")), mask_token).render()
    (job.folder / "report.html").write_text(page, encoding="utf-8")
    write_card(job.folder, described, parity.to_json(), checkpoint=job.checkpoint.folder, mask_token=mask_token)
    return seal(job.folder, described)


def _described(path: str, graph: "Graph") -> GraphPart:
    return GraphPart(path, graph.inputs, graph.outputs)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
