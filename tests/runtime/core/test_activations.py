"""The activations against the modules of torch.nn that they stand for."""

import numpy as np
import pytest

from gte_deploy.core.activations import ACTIVATIONS, TORCH_CLASSES, activation_of, default_activation

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("labels", [1, 4])
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_values_are_those_of_torch(name, labels):
    spread = np.array([0, -0.4, 0.5, -0.5, 2.9, -2.9, 6.5, -6.5, 19.9, 20.1, -30, 90, -90, 1e4, -1e4, 1e-6, -1e-6, 1])
    values = np.concatenate([spread, np.random.default_rng(0).normal(size=22) * 3]).astype(np.float32)
    values = values.reshape(-1, labels)
    with np.errstate(all="raise", under="ignore"):
        got = ACTIVATIONS[name](values)
    expected = getattr(torch.nn, TORCH_CLASSES[name])()(torch.from_numpy(values)).numpy()
    assert got.dtype == np.float32 and got.shape == values.shape
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(TORCH_CLASSES.values()))
def test_every_spelling_of_a_class(name):
    own = getattr(torch.nn, name)
    for path in (f"{own.__module__}.{name}", f"torch.nn.{name}", f"torch.nn.modules.{name}"):
        assert activation_of(path) == name.lower()


@pytest.mark.parametrize(
    "path",
    [
        *("Sigmoid", "torch.Sigmoid", "nn.Sigmoid", "", "torch.nn", "torch.nn.Linear", "torch.nn.sigmoid"),
        *("torch.nn.functional.sigmoid", "torch.sigmoid", "torch.nn.modules.linear.Sigmoid"),
        *("torch.nn.modules.activation.Identity", "mine.torch.nn.Sigmoid", "torch.nn.PReLU", "torch.nn.GLU"),
    ],
)
def test_other_paths_are_no_activation(path):
    assert activation_of(path) is None


def test_the_default():
    values = np.array([[-1.0, 2.0]], dtype=np.float32)
    np.testing.assert_allclose(default_activation(None, 1)(values), 1 / (1 + np.exp(-values)), rtol=1e-6)
    np.testing.assert_array_equal(default_activation(None, 2)(values), values)
    np.testing.assert_array_equal(default_activation("relu", 2)(values), [[0, 2]])
