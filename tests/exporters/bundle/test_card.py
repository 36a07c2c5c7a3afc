"""The model card of a bundle: what the hub reads of it, and that its programs run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

import gte_deploy
from factories import add_multi_vector_modules
from family_checkpoints import make_family_checkpoint
from gte_deploy.bundle.manifest import read_manifest
from gte_deploy.exporters.bundle.card import card, own_metadata, write_card
from gte_deploy.exporters.verification.results import ParityReport
from gte_deploy.models import builtin_path
from gte_deploy.tasks import TASKS
from runtime_models import make_word_checkpoint


@pytest.fixture(scope="module")
def bundle(bundle_of, word_checkpoints) -> Path:
    return bundle_of(word_checkpoints["embed"])


def test_the_hub_reads_what_the_bundle_is(bundle):
    found = ModelCard.load(bundle / "README.md")
    assert found.data.library_name == "gte-deploy" and found.data.pipeline_tag == "sentence-similarity"
    assert {"onnx", "sentence-transformers"} <= set(found.data.tags)
    assert found.data.base_model is None, "the name of a folder is no id of the hub"
    manifest = read_manifest(bundle)
    assert "README.md" in manifest.files and manifest.source["sha256"] in found.text
    assert f"At most {manifest.spec.max_length:,} tokens" in found.text
    report = json.loads((bundle / "report.json").read_text())
    for engine in report["parity"]["engines"]:
        row = next(
            line for line in found.text.splitlines() if line.startswith(f"| {engine['engine']} {engine['compute']} | ")
        )
        assert f"{engine['max_abs']:.1e}" in row and f"{engine['cosine_min']:.7f}" in row and "passed" in row


def programs(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


# The programs of a task differ between families by token types, which BERT has, and by the names of special tokens.
SUBJECTS = [
    *(("gte", task) for task in TASKS),
    ("bert", "classify"),
    ("xlm-roberta", "fill-mask"),
    *(pytest.param("bert", task, marks=pytest.mark.slow) for task in ("embed", "multi-vector")),
    pytest.param("roberta", "fill-mask", marks=pytest.mark.slow),
    *(pytest.param("xlm-roberta", task, marks=pytest.mark.slow) for task in ("embed", "classify", "multi-vector")),
]


@pytest.fixture(scope="module")
def subject(bundle_of, word_checkpoints, tmp_path_factory):
    """`subject(family, task)`: a bundle with a card."""

    def made(family: str, task: str) -> Path:
        folder = tmp_path_factory.mktemp("sources") / f"{family}-{task}"
        if task == "multi-vector":
            prefix = "</s>" if family == "xlm-roberta" else "[SEP]"
            if family == "gte":
                make_word_checkpoint(folder, task="embed")
            else:
                make_family_checkpoint(folder, family, "embed")
            settings = {"query_prefix": prefix, "document_prefix": prefix, "query_length": 32, "document_length": 32}
            return bundle_of(add_multi_vector_modules(folder, config={**settings, "skiplist_words": ["."]}))
        if family != "gte":
            return bundle_of(make_family_checkpoint(folder, family, task, labels=("LABEL_0", "LABEL_1")), task=task)
        if task == "sparse":
            return bundle_of(word_checkpoints["fill-mask"], task="sparse", bounds="report")
        if task in ("hybrid", "token-classify"):
            labels = 1 if task == "hybrid" else 3
            source = make_word_checkpoint(folder, task="token-classify", pooling="cls", num_labels=labels)
            return bundle_of(source, task=task, bounds="report")
        return bundle_of(word_checkpoints[task])

    return made


@pytest.mark.parametrize(("family", "task"), SUBJECTS)
def test_its_programs_run(subject, family, task):
    """All in one process, and both engines answer the same. tests/consumers runs those that need other libraries."""
    folder = subject(family, task)
    text = (folder / "README.md").read_text()
    found = [text for text in programs(text) if "sentence_transformers" not in text]
    assert len(found) == 3, "gte_deploy, onnxruntime, openvino"
    assert "register()" not in text or family == "gte"
    answers = "print(json.dumps([shown[0], *(array.tolist() for array in shown[1:])], default=str))"
    code = "\n".join(["import json", "shown = []", *found, answers]).replace("MODEL", str(folder))
    code = code.replace("\nprint(", "\nshown.append(", len(found))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, f"{code}\n{ran.stderr}"
    asked, *arrays = json.loads(ran.stdout)
    assert asked and np.isfinite(arrays[0]).all() and np.size(arrays[0])
    np.testing.assert_allclose(arrays[0], arrays[1], rtol=1e-3, atol=1e-4)
    if task == "multi-vector":
        with gte_deploy.load(folder) as model:
            np.testing.assert_allclose(arrays[0], model.encode_document("The panda is a bear."), rtol=1e-3, atol=1e-4)


def test_licence_and_languages_are_carried_over(bundle, tmp_path):
    source, written = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    written.mkdir()
    header = "license: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage:\n- en\n- de\npipeline_tag: x\n"
    (source / "README.md").write_text(f"---\n{header}---\n# A model\n")
    (source / "LICENSE").write_text("Do what you like.")
    shutil.copy(bundle / "config.json", written)
    parity = ParityReport("fp32", ()).to_json()
    write_card(written, read_manifest(bundle), parity, checkpoint=source, mask_token=None)
    found = ModelCard.load(written / "README.md")
    assert (found.data.license, found.data.license_name, found.data.language) == ("other", "mine", ["en", "de"])
    assert found.data.pipeline_tag == "sentence-similarity" and "Licence: mine (LICENSE)" in found.text
    assert (written / "LICENSE").read_text() == "Do what you like."


def test_a_checkpoint_of_the_hub_is_the_base_model(bundle):
    manifest = read_manifest(bundle)
    source = {"name": "owner/name", "revision": "a" * 40, "sha256": "b" * 64}
    missed = ("onnxruntime fp32: length 8: relative 1.0",)
    changed = dataclasses.replace(manifest, source=source, precision="int8", missed_bounds=missed)
    found = ModelCard(card(changed, ParityReport("int8", ()).to_json(), {"license": "apache-2.0"}))
    assert (found.data.base_model, found.data.base_model_relation) == ("owner/name", "quantized")
    assert "(https://huggingface.co/owner/name)" in found.text and "a" * 40 in found.text
    assert "**This bundle misses its bounds**" in found.text and missed[0] in found.text


@pytest.mark.parametrize("text", ["no header", "---\n{ not: [yaml\n---\n", "---\n- a list\n---\n", "\xff"])
def test_a_card_that_people_wrote_by_hand_is_no_error(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert own_metadata(tmp_path) == {}


def test_the_built_in_model_states_its_licence():
    assert own_metadata(builtin_path())["license"] == "apache-2.0"
    assert own_metadata(builtin_path())["language"] == ["en"]
