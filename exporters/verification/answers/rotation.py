"""Compares the rotation frequencies of RoPE with those of transformers or of the family's formulas."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy.exporters.verification.answers.source_view import rotation_frequencies
from gte_deploy.exporters.verification.answers.subject import Findings, Subject
from gte_deploy.models.families import family_of_fields


def compare_rotation(subject: Subject, findings: Findings) -> None:
    """Compare RoPE as this package reads it from config.json with a second reading of the same file.

    The second reading is by transformers for the native layout. For the original layout, which transformers does not
    read, it follows the formulas of the family's paper. A model without rotary positions has nothing to compare.
    """
    source = subject.files
    if not source.config or family_of_fields(source.config, source.model).positions != "rotary":
        return
    from transformers import AutoConfig

    from gte_deploy.models.checkpoint import rotary_module
    from gte_deploy.models.config import read_config

    if source.is_original:
        expected = {"": (rotation_frequencies(source.config), 1.0)}
    else:
        config: Any = AutoConfig.from_pretrained(source.model, local_files_only=True, trust_remote_code=False)
        expected = _rotations(rotary_module(config))
    found = _rotations(rotary_module(read_config(source.model)))
    if found.keys() != expected.keys():
        findings.fail("rotation", f"RoPE of the layers {sorted(found)} here, expected {sorted(expected)}")
    for kind in found.keys() & expected.keys():
        (ours, scaling), (wanted, scale) = found[kind], expected[kind]
        findings.count("rotation frequencies", len(wanted))
        if ours.shape != wanted.shape or not np.allclose(ours, wanted, rtol=1e-5, atol=0):
            where = f"rotation frequencies of config.json{f', {kind}' if kind else ''}"
            findings.fail("rotation", f"{where}: {ours[:4].tolist()}… here, expected {wanted[:4].tolist()}…")
        if scaling != scale:
            findings.fail("rotation", f"RoPE scales attention by {scaling} here, expected {scale}")


def _rotations(rotary: Any) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Kind of layer -> its frequencies [d/2] and the factor of its scores; one kind, "", where all layers are alike."""
    kinds = {f"{kind}_": kind for kind in getattr(rotary, "layer_types", None) or ()} or {"": ""}
    return {
        kind: (getattr(rotary, f"{prefix}inv_freq").double().numpy(), getattr(rotary, f"{prefix}attention_scaling"))
        for prefix, kind in kinds.items()
    }
