"""Makes the model type "gte" known to versions of transformers that are older than the GTE models in it.

optimum-onnx, optimum-intel and others pin such versions. With the model type known, they load the graphs of a bundle:

    import gte_deploy.integrations.transformers

    gte_deploy.integrations.transformers.register()

docs/runtimes.md shows it with each of these libraries.
"""

from __future__ import annotations

from gte_deploy.core.errors import MissingDependencyError

MODEL_TYPE = "gte"


def register() -> None:
    """Register a config class for "gte" with AutoConfig; do nothing if this version of transformers has one.

    The class holds the fields of config.json as they are. It is enough to run an exported graph. A checkpoint on
    PyTorch needs transformers 5.18 or newer.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, PretrainedConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise MissingDependencyError("transformers", "torch") from error
    if MODEL_TYPE in CONFIG_MAPPING:
        return

    class GteConfig(PretrainedConfig):
        model_type = MODEL_TYPE

    AutoConfig.register(MODEL_TYPE, GteConfig)
