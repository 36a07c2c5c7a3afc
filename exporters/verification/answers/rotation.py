"""Compares the rotation frequencies of RoPE with those of transformers or of the family's formulas."""

from typing import Any

import numpy as np

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
        wanted, scale = rotation_frequencies(source.config), 1.0
    else:
        config: Any = AutoConfig.from_pretrained(source.model, local_files_only=True, trust_remote_code=False)
        rotary = rotary_module(config)
        wanted, scale = rotary.inv_freq.double().numpy(), rotary.attention_scaling
    rotary = rotary_module(read_config(source.model))
    found = rotary.inv_freq.double().numpy()
    findings.count("rotation frequencies", len(wanted))
    if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-5, atol=0):
        findings.fail(
            "rotation",
            f"rotation frequencies of config.json: {found[:4].tolist()}… here, expected {wanted[:4].tolist()}…",
        )
    if rotary.attention_scaling != scale:
        findings.fail("rotation", f"RoPE scales attention by {rotary.attention_scaling} here, expected {scale}")
