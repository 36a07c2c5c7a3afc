import pytest
import torch

from gte_deploy.core.errors import ConfigError
from gte_deploy.models.config import build_config
from gte_deploy.models.families.gte import GTE
from gte_deploy.models.presets import PRESETS, preset


def _count(name: str) -> int:
    with torch.device("meta"):
        model = GTE.model_class(preset(name)["task"])(build_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name, entry in PRESETS.items() if entry["parameters_millions"]])
def test_parameter_count_is_the_published_one(name):
    assert round(_count(name) / 1e6) == PRESETS[name]["parameters_millions"]


def test_the_built_in_model_fits_its_size_limit():
    assert _count("gte-en-mlm-tiny") * 2 < 25_000_000, "float16 weights of at most 25 MB ship in the package"


def test_config_fields_are_known_to_transformers():
    for name in PRESETS:
        known = set(build_config("gte-en-mlm-tiny").to_dict()) | {"num_labels"}
        fields = set(preset(name)) - {"task", "pooling", "prompts", "hub_id", "parameters_millions", "inferred"}
        assert fields <= known, name


def test_a_built_config_does_not_share_state_with_the_table():
    build_config("gte-base-en-v1.5").rope_parameters["rope_theta"] = 1.0
    assert PRESETS["gte-base-en-v1.5"]["rope_parameters"]["rope_theta"] == 1_000_000.0


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no preset 'gte-huge'; there are .*gte-en-mlm-base"):
        preset("gte-huge")
