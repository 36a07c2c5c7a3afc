"""The options of gte-train are those of the functions behind its commands, with the functions' own choices."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import options_of
from gte_deploy.models.checkpoint import CHECKPOINT_LAYOUTS
from gte_deploy.training.evaluation.glue_tasks import GLUE_TASKS
from gte_deploy.training.export import export_checkpoint
from gte_deploy.training.options import (
    CheckpointExportOptions,
    CheckpointLayout,
    EstimateOptions,
    GlueTask,
    Hardware,
    PrepareOptions,
    ReadOptions,
    RescueOptions,
    RunOptions,
)
from gte_deploy.training.rescue import change_run
from gte_deploy.training.train import train


@pytest.mark.parametrize(
    ("kind", "function"),
    [(RunOptions, train), (RescueOptions, change_run), (CheckpointExportOptions, export_checkpoint)],
)
def test_options_are_the_functions_arguments_with_its_defaults(kind, function):
    parameters = inspect.signature(function).parameters
    for name, (default, _) in options_of(kind).items():
        assert str(parameters[name].default).removeprefix("torch.") == str(default), name


def test_choices_are_those_of_the_modules_that_take_them():
    assert get_args(CheckpointLayout) == CHECKPOINT_LAYOUTS
    assert get_args(GlueTask) == tuple(GLUE_TASKS)


def test_how_documents_are_found_is_part_of_how_a_corpus_is_prepared():
    options = PrepareOptions(text_column="content", document_break="file", skip_bad=True, max_document_bytes=9)
    assert options.reading() == ReadOptions("content", "file", True, 9)
    assert type(options.reading()) is ReadOptions


def test_peak_is_that_of_the_gpus_model_where_none_is_given():
    assert Hardware(gpu="a100").peak == 312e12 and Hardware(gpu="a100", peak_flops=1e12).peak == 1e12
    with pytest.raises(InputError, match="gpu is 'abacus'; expected one of b200,"):
        Hardware(gpu="abacus")


def test_lengths_are_said_once():
    with pytest.raises(InputError, match="give one of them"):
        EstimateOptions(averages=(1.0,), data=Path("corpus"))
