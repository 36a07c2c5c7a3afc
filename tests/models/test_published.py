"""The table of published checkpoints: ids, families, and a source for every fact."""

import dataclasses
import re

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.models.families import FAMILIES, family_of_type
from gte_deploy.models.presets import PRESETS
from gte_deploy.models.published import PUBLISHED, Published, published
from gte_deploy.training.evaluation.published_glue import SYSTEMS

FACTS = [field.name for field in dataclasses.fields(Published) if field.name not in ("id", "family", "task", "note")]


@pytest.mark.parametrize("entry", PUBLISHED.values(), ids=lambda entry: entry.id)
def test_an_entry_is_one_that_a_family_reads_and_has_sources(entry):
    assert entry.family in FAMILIES and family_of_type(entry.family)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.id)
    assert entry.revision is None or re.fullmatch(r"[0-9a-f]{40}", entry.revision), "only a commit never changes"
    facts = [name for name in FACTS if name not in ("layout", "sources") and getattr(entry, name)]
    assert not facts or entry.sources or entry.note, f"no source for {facts}"
    if entry.dtype and entry.parameters_millions and entry.weights_mib:
        size = entry.weights_mib * 2**20 / (entry.parameters_millions * 1e6)
        assert round(size) == {"float16": 2, "float32": 4}[entry.dtype]


def test_every_preset_and_every_system_of_the_glue_table_is_listed():
    assert {fields["hub_id"] for fields in PRESETS.values()} - {None} <= set(PUBLISHED)
    for system in SYSTEMS.values():
        if system.checkpoint is not None:
            entry = published(system.checkpoint)
            assert entry.pinned == system.checkpoint and entry.parameters_millions == system.parameters_millions


def test_a_checkpoint_is_known_by_its_id_and_by_the_last_part():
    entry = published("BAAI/bge-small-en-v1.5")
    assert published("bge-small-en-v1.5") is entry and entry.pinned == f"{entry.id}@{entry.revision}"
    assert published("bge-small-en-v1.5@main") == dataclasses.replace(entry, revision="main")
    assert published("gte-base-en-v1.5").id == "Alibaba-NLP/gte-base-en-v1.5"
    with pytest.raises(InputError, match="'bge-smal-en-v1.5' is none of .* lists; did you mean bge-small-en-v1.5"):
        published("bge-smal-en-v1.5")
