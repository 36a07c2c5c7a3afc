"""Recipes of fine-tuning: the shipped ones are read, and what does not fit is refused by its name."""

from dataclasses import fields
from importlib import resources

import pytest
import yaml

from gte_deploy.core.errors import ConfigError
from gte_deploy.training.finetune.options import FINETUNE_RECIPES
from gte_deploy.training.finetune.recipe import LOSSES, FineTuneRecipe, load_finetune_recipe
from gte_deploy.training.options import shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes(FINETUNE_RECIPES))
def test_shipped_recipes_have_their_own_name(name):
    assert load_finetune_recipe(name).name == name


def test_each_kind_has_a_shipped_recipe_of_its_name():
    for kind in LOSSES:
        assert load_finetune_recipe(kind, kind=kind).kind == kind


def test_published_values_are_those_of_the_cards():
    """The READMEs of gte-base-en-v1.5 and gte-large-en-v1.5: length 512, 100k steps, these rates and batches."""
    for name, rate, batch in (("gte-base-en-wsc", 2e-4, 32768), ("gte-large-en-wsc", 5e-5, 28672)):
        recipe = load_finetune_recipe(name)
        assert (recipe.learning_rate, recipe.batch_size, recipe.steps, recipe.max_length) == (rate, batch, 100_000, 512)
        assert recipe.loss.mini_batch_size is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("los.temperature=1", "unknown key 'los'; did you mean 'loss'"),
        ("loss.temperature=0", "loss.temperature is 0.0; expected more than 0"),
        (
            "loss.name=binary_cross_entropy",
            "loss.name is 'binary_cross_entropy'; expected contrastive or cosent for embed",
        ),
        ("loss.directions=[doc_to_doc]", "query_to_doc among them"),
        ("prompts={passage: x}", "names among"),
        ("columns={text: x}", "columns is"),
        ("steps=0", "steps is 0"),
        ("hard_negatives={count: 9, depth: 5}", "hard_negatives.depth is 5; expected at least 9"),
        ("clip_norm=0", "clip_norm is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(override, message):
    with pytest.raises(ConfigError) as refused:
        load_finetune_recipe("embed", overrides=[override])
    assert message in str(refused.value)


def test_a_recipe_of_another_kind_is_refused_with_the_command_for_it():
    with pytest.raises(ConfigError, match="is of kind sparse; expected embed. Run `gte-train sparse sparse`"):
        load_finetune_recipe("sparse", kind="embed")


def test_matryoshka_is_for_embeddings():
    with pytest.raises(ConfigError, match="matryoshka_dims"):
        load_finetune_recipe("sparse", overrides=["loss.matryoshka_dims=[8]"])


def test_yaml_names_are_fields():
    folder = resources.files("gte_deploy.training") / "recipes" / FINETUNE_RECIPES
    known = {field.name for field in fields(FineTuneRecipe)}
    for name in shipped_recipes(FINETUNE_RECIPES):
        assert yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8")).keys() <= known
