"""Training recipes: the stages and settings of a run, read from YAML into frozen dataclasses.

An unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from gte_deploy.core.cpus import cpu_flags
from gte_deploy.core.errors import ConfigError, InputError, MissingDependencyError
from gte_deploy.core.options import natural
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.sampling import Chunking, Resampling
from gte_deploy.training.options import RECIPE_SUFFIX, Sharding, shipped_recipes

T = TypeVar("T")

# These fields change how a step is computed, but its result only by rounding. A resumed run may change them.
EXECUTION_FIELDS = frozenset(
    {
        "tokens_per_micro_batch",
        "dtype",
        "gradient_checkpointing",
        "compile",
        "flash_attention",
        "sharding",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "deterministic",
        "alarms.window",
        "alarms.loss",
        "alarms.gradient_norm",
        "alarms.action",
        "eval_data",
        "evaluate_every",
        "evaluate_tokens",
    }
)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Settings of AdamW. The defaults are the published values (mGTE, arXiv 2407.19669).

    Args:
        weight_decay: decoupled from the learning rate, as in Composer's DecoupledAdamW. At the peak of the schedule a
            step multiplies a weight by 1 - weight_decay; the schedule scales the decay as it scales the learning rate.
        betas: AdamW's beta1 and beta2.
        eps: AdamW's epsilon.
        clip_norm: gradients are clipped to this norm; null does not clip.

    Raises:
        ConfigError: a value is out of its range.
    """

    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps > 0, "eps", self.eps, "more than 0")
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "more than 0, or null")


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """When a step counts as a spike: its loss or gradient norm is far above the median of the steps before it.

    Args:
        window: steps of the stage to compare with, at most; the first 20 raise no alarm.
        loss: deviations above the median at which a loss is a spike; null raises none. A deviation is estimated from
            the median absolute deviation, and is at least 1 % of the median.
        gradient_norm: as `loss`, for the gradient norm; there a deviation is at least 10 % of the median.
        action: "warn" logs a spike; "stop" also ends the run, without a new checkpoint.

    Raises:
        ConfigError: a value is out of its range.
    """

    window: int = 100
    loss: float | None = 10.0
    gradient_norm: float | None = 20.0
    action: Literal["warn", "stop"] = "warn"

    def __post_init__(self) -> None:
        _require(self.window >= 20, "window", self.window, "20 or more steps")
        for name in ("loss", "gradient_norm"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "more than 0, or null")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pretraining.

    Args:
        name: the stage's name in checkpoints and logs.
        max_length: tokens of a sequence, at most.
        rope_theta: the RoPE base; "keep" takes that of the model from which the run starts, with its scaling.
        steps: optimizer steps.
        batch_size: sequences of a step, over all ranks.
        learning_rate: the peak of the schedule.
        schedule: the fall of the learning rate after the warm-up, see `training/optim.py`.
        warmup_ratio: share of the steps in which the learning rate rises.
        decay_ratio: share of the steps in which wsd and one_minus_sqrt fall; linear does not read it.
        optimizer: settings of AdamW.
        masking: settings of the masking.
        resampling: rule that drops short chunks; the default keeps every chunk.
        language_exponent: language i gets the share q ∝ p^exponent of the stage's tokens, where p is its share of the
            corpus's tokens; null does not weight them.
        source_weights: the share of each language, or other source, of the corpus by its name (see `Chunking`).
        skip_steps: ranges [first, last] of steps, numbered from 1 as in the log, whose batches are not trained on.

    Raises:
        ConfigError: a value is out of its range.
    """

    name: str
    max_length: int
    rope_theta: float | Literal["keep"]
    steps: int
    batch_size: int
    learning_rate: float
    schedule: Literal["linear", "wsd", "one_minus_sqrt"] = "linear"
    warmup_ratio: float = 0.06
    decay_ratio: float = 0.1
    optimizer: Optimizer = field(default_factory=Optimizer)
    masking: Masking = field(default_factory=Masking)
    resampling: Resampling = field(default_factory=Resampling)
    language_exponent: float | None = None
    source_weights: Mapping[str, float] | None = None
    skip_steps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "name", self.name, "a name without slashes")
        theta = self.rope_theta
        _require(theta == "keep" or theta > 0, "rope_theta", theta, "more than 0, or keep")
        _require(self.steps >= 1, "steps", self.steps, "1 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more sequences")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "in [0, 1)")
        _require(0 < self.decay_ratio <= 1 - self.warmup_ratio, "decay_ratio", self.decay_ratio, "in (0, 1 - warm-up]")
        skipped = all(1 <= first <= last for first, last in self.skip_steps)
        _require(skipped, "skip_steps", self.skip_steps, "ranges [first, last], from 1, with first <= last")
        try:
            _ = self.chunking
        except InputError as error:
            raise ConfigError(str(error)) from error

    @property
    def chunking(self) -> Chunking:
        """How the stage makes its samples of a corpus."""
        return Chunking(self.max_length, self.resampling, self.language_exponent, self.source_weights)

    def skips(self, step: int) -> bool:
        """Whether the batch of a step, numbered from 1, is not trained on."""
        return any(first <= step <= last for first, last in self.skip_steps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The recipe of a whole run.

    Args:
        name: the name of the run.
        model: the name of a preset (the run starts from random weights), or a folder or hub id `owner/name` in either
            layout (the run starts from its weights, if it has weights).
        pretrained: the run starts from the weights of the model; for a preset from those of its checkpoint on the hub,
            or of the built-in model. A model without weights is then an error.
        stages: the stages in order; each starts from the weights of the stage before, with a new optimizer.
        shuffle_shards: samples are shuffled among so many shards of each language at a time, so that a step needs only
            these; null shuffles all of them. For corpora that do not lie on this machine.
        seed: seed of the first weights, the order of samples, the masks and the dropout.
        tokens_per_micro_batch: tokens that one rank sends through the model at once; at least the longest `max_length`.
        dtype: "bfloat16" computes in bfloat16 autocast over float32 weights; "auto" does so where it is faster, on a
            GPU and on a CPU with AMX (see `settled_execution`).
        gradient_checkpointing: keep only the layers' inputs, and compute the rest again in the backward pass.
        compile: compile each layer with torch.compile; micro-batches are padded to one static shape. "auto" compiles
            on a GPU.
        flash_attention: kernel of attention on a GPU: "default" is torch's own FlashAttention-2, "FA3" FlashAttention-3
            of the package flash-attn-3 on Hopper, "auto" takes it where it can run.
        sharding: "ddp" holds the whole model on each rank, "fsdp" shards weights and optimizer (FSDP2).
        checkpoint_every: steps between checkpoints; the end of a stage always has one.
        keep_checkpoints: number of newest checkpoints to keep, besides those at the ends of stages.
        log_every: steps between progress lines and between flushes of the log, which has a line for every step.
        alarms: when a step counts as a spike, and what happens then.
        deterministic: on CUDA, compute only with operations whose result is the same each time, bit for bit; that is
            slower, and an operation that has no such form is an error. On a CPU this changes nothing.
        eval_data: folder of a corpus of held-out text, on which the model is evaluated before the first step and at the
            end of each stage; null does not evaluate. `gte-train run --eval-data` sets it.
        evaluate_every: steps between further evaluations; null for none.
        evaluate_tokens: tokens that an evaluation reads of each source (language) of `eval_data`, at most.

    Raises:
        ConfigError: a value is out of its range.
    """

    name: str
    model: str
    stages: tuple[Stage, ...]
    pretrained: bool = False
    shuffle_shards: int | None = None
    seed: int = 0
    tokens_per_micro_batch: int = 32768
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool | Literal["auto"] = "auto"
    flash_attention: Literal["auto", "default", "FA3"] = "auto"
    sharding: Sharding = "ddp"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    alarms: Alarms = field(default_factory=Alarms)
    deterministic: bool = False
    eval_data: str | None = None
    evaluate_every: int | None = None
    evaluate_tokens: int = 100_000

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        _require(bool(names), "stages", names, "at least one")
        _require(len(set(names)) == len(names), "stages", names, "names that differ")
        width = self.shuffle_shards
        _require(width is None or width >= 1, "shuffle_shards", width, "1 or more shards, or null")
        every = self.evaluate_every
        _require(every is None or every >= 1, "evaluate_every", every, "1 or more, or null")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        longest = max(stage.max_length for stage in self.stages)
        budget = self.tokens_per_micro_batch
        _require(budget >= longest, "tokens_per_micro_batch", budget, f"at least the longest max_length, {longest}")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")


def load_recipe(source: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or one of `shipped_recipes()`.
        overrides: changes such as "stages.0.steps=10"; the value is read as YAML.

    Raises:
        ConfigError: there is no such recipe, it is not YAML, or a key or value is wrong; the message names its path.
        MissingDependencyError: PyYAML is not installed.
    """
    return load_recipe_as(Recipe, source, overrides=overrides)


def load_recipe_as(kind: type[T], source: str | Path, *, overrides: Sequence[str] = (), folder: str = "") -> T:
    """Read a recipe into a frozen dataclass.

    Args:
        kind: the dataclass; its fields have the types that `Recipe` and `Stage` use.
        source: path of a YAML file, or one of `shipped_recipes(folder)`.
        overrides: changes such as "stages.0.steps=10"; the value is read as YAML.
        folder: the folder of the shipped recipes inside that of all recipes.

    Raises:
        ConfigError: there is no such recipe, it is not YAML, or a key or value is wrong; the message names its path.
        MissingDependencyError: PyYAML is not installed.
    """
    raw = _parse_yaml(_read(source, folder), str(source))
    for override in overrides:
        _apply_override(raw, override)
    try:
        return _build(kind, raw, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with changes such as "stages.0.steps=10"; the value is read as YAML.

    Raises:
        ConfigError: a key or value is wrong.
    """
    raw = recipe_to_dict(recipe)
    for override in overrides:
        _apply_override(raw, override)
    return recipe_from_dict(raw)


def recipe_from_dict(raw: object) -> Recipe:
    """Build a recipe from plain mappings and lists, as YAML or JSON give them.

    Raises:
        ConfigError: a key is unknown or missing, or a value is wrong; the message names its path.
    """
    return _build(Recipe, raw, "")


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Return a recipe's dataclass as plain mappings and lists, which `recipe_from_dict` reads."""
    return _plain(dataclasses.asdict(recipe))


def dump_recipe(recipe: Any) -> str:
    """Return the recipe as YAML, with every field."""
    return _yaml().safe_dump(recipe_to_dict(recipe), sort_keys=False)


def settled_execution(recipe: Recipe, *, on_gpu: bool) -> Recipe:
    """Return the recipe with the decisions that "auto" leaves to the machine.

    A CPU with AMX computes in bfloat16 1.4 to 2.4 times as fast as in float32 (tiny and base size, measured); others
    gain less, or lose. torch.compile needs Triton on a GPU, and pays little on a CPU.
    """
    dtype, compiles = recipe.dtype, recipe.compile
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu or "amx_bf16" in cpu_flags() else "float32"
    if compiles == "auto":
        compiles = on_gpu and importlib.util.find_spec("triton") is not None
    return dataclasses.replace(recipe, dtype=dtype, compile=compiles)


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the paths at which two recipes differ and which a resumed run may not change.

    Both recipes come from `recipe_to_dict`. `EXECUTION_FIELDS` may differ.
    """
    return [path for path in _differences(old, new, "") if path not in EXECUTION_FIELDS]


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [path]
    return [difference for key, a, b in pairs for difference in _differences(a, b, f"{path}.{key}".lstrip("."))]


def _read(source: str | Path, folder: str) -> str:
    path = Path(source)
    if str(source) in shipped_recipes(folder) and not path.is_file():
        recipes = resources.files("gte_deploy.training") / "recipes" / folder
        return (recipes / f"{source}{RECIPE_SUFFIX}").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(shipped_recipes(folder))
        raise ConfigError(f"{source}: not a readable file ({error}), nor a shipped recipe ({names})") from error


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("yaml", "train") from error
    return yaml


def _parse_yaml(text: str, where: str) -> Any:
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of 5,000 digits
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


def _apply_override(raw: Any, override: str) -> None:
    """Set one value in the nested mappings and lists `raw`. The last key may be new: `_build` checks it."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} is not KEY.KEY=VALUE, as in stages.0.steps=10")
    node = raw
    for depth, key in enumerate(keys):
        place: Any = key
        if isinstance(node, list):
            place = natural(key)
            if place is None or place >= len(node):
                raise ConfigError(f"override {override!r}: {key!r} is not an index below {len(node)}")
        elif not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} has no fields")
        if depth == len(keys) - 1:
            node[place] = _parse_yaml(text, f"override {override!r}")
        else:
            node = node[place] if isinstance(node, list) else node.setdefault(place, {})


def _build(cls: type[T], raw: object, path: str) -> T:
    """Build a dataclass from a mapping, recursively by the type hints of its fields."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path or 'the recipe'} is {raw!r}; expected keys and values")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown key {_join(path, key)!r}; {hint}")
    required = dataclasses.MISSING
    for name, f in known.items():
        if name not in raw and f.default is required and f.default_factory is required:
            raise ConfigError(f"missing key {_join(path, name)!r}")
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_join(path, str(error))) from error
    except ValueError as error:  # an InputError of Masking or Resampling
        raise ConfigError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str, *words: str) -> Any:
    """Convert `value` to the type `hint`, one of the few types that recipes hold; an error also names `words`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        words = tuple(word for a in arguments if typing.get_origin(a) is Literal for word in typing.get_args(a))
        if value in words:
            return value
        plain = next(a for a in arguments if a is not type(None) and typing.get_origin(a) is not Literal)
        return _convert(plain, value, path, *words)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is Literal:
        return _checked(value in arguments, value, path, f"one of {', '.join(map(str, arguments))}")
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; expected keys and values")
        return {str(key): _convert(arguments[1], item, _join(path, key)) for key, item in value.items()}
    if hint is float:
        return _convert_float(value, path, *words)
    kinds = {int: "a whole number", str: "a text", bool: "true or false"}
    return _checked(type(value) is hint, value, path, kinds[hint])


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path} is {value!r}; expected a list")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise ConfigError(f"{path} has {len(value)} items; expected {len(arguments)}")
    return tuple(_convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(value))


def _convert_float(value: Any, path: str, *words: str) -> float:
    # YAML 1.1 reads 2e-4, which has no dot, as a string.
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    expected = "".join(f", or {word}" for word in words)
    return _checked(abs(number) < float("inf"), number, path, f"a finite number{expected} (received {value!r})")


def _checked(condition: bool, value: Any, path: str, expected: str) -> Any:
    _require(condition, path, value, expected)
    return value


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _plain(value: Any) -> Any:
    """Turn tuples into lists, so that a dumped recipe equals one that was read from YAML or JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
