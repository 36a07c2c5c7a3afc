"""A flag that is neither true nor false is refused: for Python, "false" is true."""

import inspect

import numpy as np
import pytest

import gte_deploy
from gte_deploy import InputError, Model
from gte_deploy.bulk.options import BulkOptions
from gte_deploy.core.options import check_flags
from gte_deploy.tasks.interface import TextInterface

TEXT = "the [MASK] is old"
# Method -> the model that has it (the checkpoint, and the task that it is loaded for), and its texts.
METHODS = {
    "encode": ("embed", "auto", (TEXT,)),
    "encode_multi_vector": ("embed", "auto", (TEXT,)),
    "encode_sparse": ("fill-mask", "sparse", (TEXT,)),
    "fill_mask": ("fill-mask", "auto", (TEXT,)),
    "predict": ("classify", "auto", (TEXT,)),
    "tokenize": ("embed", "auto", (TEXT,)),
}
WITHOUT_EFFECT = {"save_to_cpu"}
WRONG = ["false", "", b"1", 2, 0.0, [True], {}, np.zeros(2, bool)]


def flags_of(method):
    parameters = inspect.signature(getattr(Model, method)).parameters
    return {name for name, each in parameters.items() if str(each.annotation).startswith(("bool", "<class 'bool"))}


CALLS = [(method, flag) for method in METHODS for flag in sorted(flags_of(method) - WITHOUT_EFFECT)]


@pytest.fixture(scope="module")
def models(word_checkpoints):
    loaded = {
        (name, task): gte_deploy.load(word_checkpoints[name], backend="torch", num_threads=1, task=task)
        for name, task, _ in METHODS.values()
    }
    yield loaded
    for model in loaded.values():
        model.close()


@pytest.fixture
def call(models):
    def call(method, **options):
        name, task, inputs = METHODS[method]
        return getattr(models[name, task], method)(*inputs, **options)

    return call


def test_the_flags_are_found():
    assert len(CALLS) > 20 and ("encode", "truncation") in CALLS and ("predict", "apply_softmax") in CALLS
    assert set(METHODS) - {"tokenize"} <= set(vars(TextInterface))


@pytest.mark.parametrize(("method", "flag"), CALLS)
def test_what_is_no_flag_is_refused_by_name(call, method, flag):
    for value in WRONG:
        with pytest.raises(InputError, match=rf"^{flag} is .*; expected True or False$"):
            call(method, **{flag: value})


@pytest.mark.parametrize("value", [True, 1, np.True_, False, 0, np.False_])
def test_truth_values_are_taken(call, value):
    np.testing.assert_array_equal(
        call("encode", normalize_embeddings=value), call("encode", normalize_embeddings=bool(value))
    )
    assert call("fill_mask", truncation=value) == call("fill_mask")


def test_options_of_python_functions_are_checked(word_checkpoints):
    with pytest.raises(InputError, match="compile is 'no'; expected True or False"):
        gte_deploy.load(word_checkpoints["embed"], backend="torch", compile="no")
    with pytest.raises(InputError, match="restart is 'false'; expected True or False"):
        BulkOptions(restart="false")
    check_flags(one=None, two=True)
