"""Recipes: every mistake is named by its path, and the shipped ones hold the published values."""

import dataclasses
import re
from importlib import resources

import numpy as np
import pytest
import yaml

from corpora import write_empty_corpus
from gte_deploy.core.errors import ConfigError
from gte_deploy.training import recipe as recipe_module
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.sampling import survey
from gte_deploy.training.recipe import (
    Optimizer,
    changed_fields,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    settled_execution,
    shipped_recipes,
)

RECIPES = resources.files("gte_deploy.training") / "recipes"
STAGE = {
    "name": "a",
    "max_length": 64,
    "rope_theta": 10000,
    "steps": 10,
    "batch_size": 4,
    "learning_rate": 1e-3,
}


def recipe(**stage) -> dict:
    return {"name": "r", "model": "gte-en-mlm-tiny", "stages": [{**STAGE, **stage}]}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (recipe(stepz=3), r"unknown key 'stages.0.stepz'; did you mean 'steps'\?"),
        (recipe(masking={"probability": 0.3, "keep": 1}), "unknown key 'stages.0.masking.keep'; known are probability"),
        ({**recipe(), "lr": 1}, "unknown key 'lr'; known are name"),
        ({"name": "r", "stages": [STAGE]}, "missing key 'model'"),
        (recipe(steps="many"), "stages.0.steps is 'many'; expected a whole number"),
        (recipe(steps=True), "stages.0.steps is True; expected a whole number"),
        (recipe(steps=0), "stages.0.steps is 0; expected 1 or more"),
        (recipe(learning_rate="fast"), "stages.0.learning_rate is nan; expected a finite number .received 'fast'"),
        (recipe(learning_rate=float("inf")), "stages.0.learning_rate"),
        (recipe(schedule="cosine"), "stages.0.schedule is 'cosine'; expected one of linear, wsd, one_minus_sqrt"),
        (recipe(optimizer={"betas": [0.9]}), "stages.0.optimizer.betas has 1 items; expected 2"),
        (recipe(optimizer={"betas": [0.9, 1.0]}), r"stages.0.optimizer.betas is \(0.9, 1.0\)"),
        (recipe(masking={"probability": 2}), "stages.0.masking: mask probability 2.0 is outside"),
        (recipe(max_length=65536), "tokens_per_micro_batch is 32768; expected at least the longest max_length, 65536"),
        ({**recipe(), "stages": [STAGE, STAGE]}, "stages is .* expected names that differ"),
        ({**recipe(), "stages": []}, "stages is .* expected at least one"),
        ({**recipe(), "dtype": "float16"}, "dtype is 'float16'; expected one of auto, bfloat16, float32"),
        (recipe(rope_theta="same"), "stages.0.rope_theta is nan; expected a finite number, or keep .received 'same'"),
        (recipe(rope_theta=0), "stages.0.rope_theta is 0.0; expected more than 0, or keep"),
        (recipe(source_weights=3), "stages.0.source_weights is 3; expected keys and values"),
        (recipe(source_weights={"a": "b"}), "stages.0.source_weights.a is nan"),
        (recipe(source_weights={"a": -1}), "stages.0.source_weights has -1.0; expected 0 or more"),
        (
            recipe(source_weights={"a": 1}, language_exponent=0.5),
            "language_exponent and source_weights are both",
        ),
        (recipe(max_length=2), "stages.0.max_length 2 leaves no room"),
        (recipe(resampling={"short_threshold": 65}), "stages.0.short_threshold 65 is above max_length 64"),
        ([1, 2], "the recipe is .* expected keys and values"),
    ],
)
def test_a_mistake_is_named(raw, message):
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(raw)


def test_dump_and_read_round_trip():
    made = recipe_from_dict(recipe(language_exponent=0.5, resampling={"short_threshold": 9, "keep_prob": 0.5}))
    assert recipe_from_dict(recipe_to_dict(made)) == made
    assert recipe_from_dict(yaml.safe_load(dump_recipe(made))) == made


def test_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    overrides = ["stages.0.steps=7", "stages.0.learning_rate=3e-5", "stages.0.masking.probability=0.2", "seed=5"]
    made = load_recipe(path, overrides=overrides)
    assert (made.stages[0].steps, made.stages[0].learning_rate, made.seed) == (7, 3e-5, 5)
    assert made.stages[0].masking == Masking(probability=0.2)
    for override, message in [
        ("stages.1.steps=7", "'1' is not an index below 1"),
        ("stages.0.stepz=7", "unknown key 'stages.0.stepz'"),
        ("seed", "is not KEY.KEY=VALUE"),
        ("seed.x=1", "unknown key|has no fields|expected a whole number"),
        (f"stages.{'9' * 5000}.steps=7", "is not an index below 1"),
        (f"seed={'9' * 5000}", "not valid YAML"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_recipe(path, overrides=[override])


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match="nor a shipped recipe .*gte-en-mlm-base"):
        load_recipe("gte-en-mlm-bass")
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_what_a_resumed_run_may_change():
    old = recipe_to_dict(recipe_from_dict(recipe()))
    new = recipe_to_dict(recipe_from_dict({**recipe(), "tokens_per_micro_batch": 64, "compile": True}))
    assert changed_fields(old, new) == []
    new = recipe_to_dict(recipe_from_dict({**recipe(steps=11, masking={"probability": 0.2}), "seed": 1}))
    assert sorted(changed_fields(old, new)) == ["seed", "stages.0.masking.probability", "stages.0.steps"]


# (max_length, rope base, steps, batch, learning rate): the cards' tables.
PUBLISHED = {
    "gte-en-mlm-base": [(2048, 1e4, 70_000, 4096, 5e-4), (8192, 5e5, 20_000, 1024, 5e-5)],
    "gte-en-mlm-large": [
        (512, 1e4, 300_000, 4096, 2e-4),
        (2048, 1e4, 30_000, 4096, 5e-5),
        (8192, 1.6e5, 30_000, 1024, 5e-5),
    ],
    "gte-multilingual-mlm-base": [(2048, 1e4, 250_000, 8192, 2e-4), (8192, 1.6e5, 30_000, 2048, 5e-5)],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_recipes_hold_the_published_values(name):
    made = load_recipe(name)
    assert made.model == made.name == name
    columns = [(s.max_length, s.rope_theta, s.steps, s.batch_size, s.learning_rate) for s in made.stages]
    assert columns == PUBLISHED[name]
    for stage in made.stages:
        assert stage.optimizer == Optimizer(weight_decay=1e-5, betas=(0.9, 0.98), eps=1e-6, clip_norm=None)
        assert stage.masking == Masking(probability=0.3, mask_share=0.8, random_share=0.1)
        assert (stage.schedule, stage.warmup_ratio) == ("linear", 0.06)
        assert stage.language_exponent == (0.5 if "multilingual" in name else None)
    assert made.dtype == "bfloat16"
    # Short texts are dropped after the first stage only, by the same rule in each stage.
    assert [stage.resampling.keep_prob < 1 for stage in made.stages] == [False, *[True] * (len(made.stages) - 1)]


@pytest.mark.parametrize(
    ("on_gpu", "flags", "triton", "decided"),
    [
        (True, (), True, ("bfloat16", True)),
        (True, (), False, ("bfloat16", False)),
        (False, ("avx512_bf16", "amx_bf16"), True, ("bfloat16", False)),
        (False, ("avx512_bf16",), True, ("float32", False)),
    ],
)
def test_auto_is_decided_by_the_machine(on_gpu, flags, triton, decided, monkeypatch):
    monkeypatch.setattr(recipe_module, "cpu_flags", lambda: flags)
    monkeypatch.setattr(recipe_module.importlib.util, "find_spec", lambda name: name if triton else None)
    made = load_recipe("gte-en-mlm-tiny")
    assert (made.dtype, made.compile) == ("auto", "auto")
    found = settled_execution(made, on_gpu=on_gpu)
    assert (found.dtype, found.compile) == decided
    given = dataclasses.replace(made, dtype="float32", compile=False)
    assert settled_execution(given, on_gpu=on_gpu) == given


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_value_of_a_published_recipe_has_its_source(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r"(  )*\s*(?!name|model|stages|- )\w+: ", line)]
    assert len(lines) > 15
    sourced = ("[card]", "[paper]", "[chosen]", "as above")
    assert [line for line in lines if not any(source in line.partition("#")[2] for source in sourced)] == []


# C4's documents in tokens: log-normal, so that a document has 448 tokens on average, as in the audit of C4 (en).
C4_DOCUMENTS, C4_LENGTHS = 365e6, {"mean": 5.5, "sigma": 1.1}


@pytest.fixture(scope="module")
def c4_like(tmp_path_factory):
    lengths = np.random.default_rng(0).lognormal(**C4_LENGTHS, size=400_000).astype(np.int64) + 1
    return TokenCorpus.open(write_empty_corpus(tmp_path_factory.mktemp("c4") / "corpus", lengths))


@pytest.mark.parametrize("name", ["gte-en-mlm-base", "gte-en-mlm-large"])
def test_the_long_stages_are_long_on_text_like_c4(name, c4_like):
    found = {stage.max_length: survey(c4_like, stage.chunking, seed=0) for stage in load_recipe(name).stages}
    stages = {stage.max_length: stage for stage in load_recipe(name).stages}
    means = [found[length].sampled.mean for length in sorted(found)]
    assert means == sorted(means) and found[8192].sampled.mean > 2_400
    assert found[8192].sampled.late > 0.35 > 4 * found[8192].cut.late  # tokens beyond 2,048
    if 512 in found:
        assert found[2048].sampled.mean > 1_000
    # The text is not read over and over for that.
    scale = C4_DOCUMENTS / c4_like.num_documents
    for length, stage in stages.items():
        assert found[length].passes(stage.steps * stage.batch_size) / scale < 3


def test_source_weights_and_a_kept_rope_round_trip():
    made = recipe_from_dict(recipe(source_weights={"domain": 3, "general": 1e-1}, rope_theta="keep"))
    assert made.stages[0].source_weights == {"domain": 3.0, "general": 0.1}
    assert made.stages[0].rope_theta == "keep"
    assert recipe_from_dict(yaml.safe_load(dump_recipe(made))) == made


def test_tiny_recipe_has_the_three_stages():
    assert set(shipped_recipes()) == {*PUBLISHED, "gte-en-mlm-tiny", "domain-adaptation"}
    made = load_recipe("gte-en-mlm-tiny")
    assert [(s.max_length, s.rope_theta) for s in made.stages] == [(512, 1e4), (2048, 1e4), (8192, 1.6e5)]
    assert sum(s.steps * s.batch_size * s.max_length for s in made.stages) < 5e6  # minutes at some 4k tokens/s and up
