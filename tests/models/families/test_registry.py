import importlib
import subprocess
import sys

import pytest
import transformers

from gte_deploy.core.errors import ConfigError
from gte_deploy.exporters.graph.fusion import MERGED_PASSES, PASSES
from gte_deploy.exporters.graph.fusion.flash import FLASH
from gte_deploy.exporters.graph.fusion.up_gate import UP_GATE
from gte_deploy.exporters.targets.tensorrt.padding_free import PADDING_FREE_ATTENTION
from gte_deploy.exporters.targets.tensorrt.qkv import JOINED_QKV
from gte_deploy.models.families import FAMILIES, family_of, family_of_type

KNOWN_PASSES = {each.name for each in (*PASSES, *MERGED_PASSES, FLASH, UP_GATE, JOINED_QKV, PADDING_FREE_ATTENTION)}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_line_finds_its_family(model_type):
    family = family_of_type(model_type)
    assert model_type in family.model_types
    assert all(FAMILIES[name] == FAMILIES[model_type] for name in family.model_types)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_its_classes_are_those_of_its_module(model_type):
    family = family_of_type(model_type)
    module = importlib.import_module(family.module)
    for task, name in family.classes.items():
        assert family.model_class(task) is getattr(module, name)
        assert issubclass(family.model_class(task), transformers.PreTrainedModel)
        assert family.architectures[name] == task
    assert family.heads.keys() <= family.classes.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_its_sites_name_passes(model_type):
    family = family_of_type(model_type)
    (config_class,) = {family.model_class(task).config_class for task in family.classes}
    assert family.sites(config_class()).keys() <= KNOWN_PASSES


@pytest.mark.parametrize("model_type", ["distilbert", "GTE", "", None, 3, ["gte"]])
def test_another_model_type_is_refused(model_type):
    with pytest.raises(ConfigError, match="model_type is .*; expected one of"):
        family_of_type(model_type)


def test_the_config_of_another_family_is_refused():
    with pytest.raises(ConfigError, match="DistilBertConfig: model_type is 'distilbert'"):
        family_of(transformers.DistilBertConfig())


def test_finding_a_family_loads_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from gte_deploy.models.families import FAMILIES, family_of_type\n"
        "assert 'gte_deploy.models.families.gte' not in sys.modules\n"
        "assert [family_of_type(name) for name in FAMILIES]\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
