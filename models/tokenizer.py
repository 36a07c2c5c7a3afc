"""Reads a checkpoint's tokenizer files with transformers' AutoTokenizer, and saves the result as one tokenizer.json.

A dozen fields of four files decide the ids of a text, and each version of transformers has its own rules for them. So
AutoTokenizer itself reads the files, without remote code, and its result is saved: the tokenizer.json of a bundle
alone decides the ids, in every library that reads it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, normalizers

from gte_deploy.core.errors import CheckpointError, ConfigError, MissingDependencyError
from gte_deploy.core.files import write_text
from gte_deploy.core.tokenizer_rules import check_rules
from gte_deploy.models.reading import without_warnings_of_types
from gte_deploy.models.weight_files import refuse_irregular, refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments that sentence_bert_config.json may pass to AutoTokenizer. Others load code, other files or another class.
_ARGUMENTS = frozenset(
    {
        "model_max_length",
        "padding_side",
        "truncation_side",
        "do_lower_case",
        "strip_accents",
        "tokenize_chinese_chars",
        "clean_up_tokenization_spaces",
        "add_prefix_space",
        "use_fast",
        *(f"{name}_token" for name in ("pad", "unk", "cls", "sep", "mask", "bos", "eos")),
    }
)
# The files from which AutoTokenizer makes a vocabulary.
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
_SENTENCEPIECE_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
# transformers' own stand-in for "no limit" is 1e30.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class ResolvedTokenizer:
    """The tokenizer that AutoTokenizer built from a checkpoint's files.

    Args:
        theirs: transformers' tokenizer; it must not be changed.
        backend: the tokenizer of the tokenizers library, which gives the ids.
        lowercases: whether sentence-transformers' Lowercase step was put before the normalizer.
    """

    theirs: PreTrainedTokenizerBase
    backend: Tokenizer
    lowercases: bool

    @property
    def pad_token_id(self) -> int:
        """Id that fills short rows."""
        token_id = self.theirs.pad_token_id
        assert isinstance(token_id, int)  # transformers' annotation also allows the types of other special tokens
        return token_id

    @property
    def max_length(self) -> int | None:
        """Tokens that the tokenizer's files allow, special tokens included; None for no limit."""
        limit = self.theirs.model_max_length
        return None if limit is None or limit >= _NO_LIMIT else int(limit)

    @property
    def gives_token_types(self) -> bool:
        """Whether the model takes `token_type_ids`."""
        return "token_type_ids" in self.theirs.model_input_names

    @property
    def unweighted_ids(self) -> tuple[int, ...]:
        """Ids to which a token-weights head gives no weight, in rising order: cls, sep or eos, pad and unk.

        The rule is gte-multilingual-base's own (`_process_token_weights` of its scripts/gte_embedding.py).
        """
        ids = (getattr(self.theirs, f"{name}_token_id") for name in ("cls", "sep", "eos", "pad", "unk"))
        return tuple(sorted({int(token_id) for token_id in ids if token_id is not None}))

    def parts(self) -> dict[str, Any]:
        """Arguments of the runtime's `gte_deploy.text.tokenization.TextTokenizer`."""
        return {
            "tokenizer": Tokenizer.from_str(self.backend.to_str()),
            "pad_token": str(self.theirs.pad_token),
            "mask_token": None if self.theirs.mask_token is None else str(self.theirs.mask_token),
            "clean_up": _cleans_up(self.theirs, self.backend),
            "truncation_side": self.theirs.truncation_side,
        }

    def save(self, folder: Path, *, max_length: int) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json with a limit of `max_length` tokens.

        The saved class is the generic one, which uses tokenizer.json unchanged; others build their own tokenizer.
        """
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        names = {f"{name}_token": getattr(self.theirs, f"{name}_token") for name in _SPECIAL_TOKENS}
        special = {name: str(token) for name, token in names.items() if token is not None}
        others = [str(token) for token in self.theirs.all_special_tokens if str(token) not in special.values()]
        if others:
            special["additional_special_tokens"] = others  # type: ignore[assignment]
        config = {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": list(self.theirs.model_input_names),
            "padding_side": "right",
            "truncation_side": self.theirs.truncation_side,
            "clean_up_tokenization_spaces": _cleans_up(self.theirs, self.backend),
        }
        write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", _json(config))
        # Older readers take special tokens only from this file.
        write_text(folder / "special_tokens_map.json", _json(special))


_SPECIAL_TOKENS = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files; an adapter may leave them to its base model."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def resolve_tokenizer(
    folder: Path, *, arguments: Mapping[str, Any] | None = None, lowercase: bool = False
) -> ResolvedTokenizer:
    """Read the tokenizer of a checkpoint folder; no network, no remote code.

    Args:
        folder: the folder with the tokenizer's files.
        arguments: arguments for AutoTokenizer, as in sentence_bert_config.json.
        lowercase: whether to put a Lowercase step before the normalizer, as sentence-transformers does for
            `do_lower_case`.

    Raises:
        ConfigError: an argument or a field of tokenizer_config.json is not supported.
        CheckpointError: AutoTokenizer cannot read the files, or builds something other than a fast tokenizer.
        MissingDependencyError: the folder has a sentencepiece model alone, and sentencepiece is not installed.
    """
    refuse_irregular(folder)
    _require_sentencepiece(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        refuse_pointer(folder / name)
    if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        # AutoTokenizer would make a tokenizer of the model's type without words: every text would be unknown tokens.
        raise CheckpointError(
            f"{folder} has no file with a vocabulary ({', '.join(_VOCABULARIES)}). Copy the tokenizer's files of the "
            "checkpoint that it was made from."
        )
    if unknown := sorted(set(arguments or {}) - _ARGUMENTS):
        raise ConfigError(
            f"{folder}: sentence_bert_config.json has the tokenizer argument {unknown[0]!r}, which is not "
            f"honoured; known are {', '.join(sorted(_ARGUMENTS))}."
        )
    theirs = _auto_tokenizer(folder, dict(arguments or {}))
    backend = getattr(theirs, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(
            f"{folder}: transformers reads a {type(theirs).__name__}, which runs in Python and has no tokenizer.json. "
            "Convert it with transformers to a fast tokenizer, and save that."
        )
    check_rules(backend)
    if theirs.pad_token is None:
        raise CheckpointError(f"{folder}: no file of the tokenizer names a pad_token. Add it to tokenizer_config.json.")
    if getattr(theirs, "split_special_tokens", False):
        raise ConfigError(f"{folder}: split_special_tokens is true; expected false: special tokens stay whole")
    if lowercase and not _has_lowercase(backend.normalizer):
        backend.normalizer = _lowercase_first(backend.normalizer)
    return ResolvedTokenizer(theirs, backend, lowercase)


def _require_sentencepiece(folder: Path) -> None:
    """Require the packages with which transformers reads a sentencepiece model, where no tokenizer.json stands beside.

    Without them transformers takes the file for another format, and its error says nothing about sentencepiece.
    """
    if (folder / "tokenizer.json").is_file():
        return
    found = next((name for name in _SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if found is None:
        return
    try:
        _import_sentencepiece()
    except Exception as error:  # protobuf's own, where its version does not fit that of sentencepiece
        raise MissingDependencyError(
            "sentencepiece",
            "sentencepiece",
            f"{folder} has {found} and no tokenizer.json, and sentencepiece cannot be imported ({error}). Elsewhere, "
            'this writes a tokenizer.json: python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        ) from error


def _import_sentencepiece() -> None:
    importlib.import_module("sentencepiece.sentencepiece_model_pb2")


def _auto_tokenizer(folder: Path, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with without_warnings_of_types():
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **arguments
            )
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # many libraries; the tokenizers library raises plain Exception, or panics
        raise CheckpointError(
            f"{folder}: transformers' AutoTokenizer cannot read the tokenizer ({type(error).__name__}: {error}). "
            "A checkpoint has a tokenizer.json, or a vocab.txt with a tokenizer_config.json that names its class."
        ) from error


def _has_lowercase(normalizer: Any) -> bool:
    return any(isinstance(step, normalizers.Lowercase) for step in _steps(normalizer))


def _lowercase_first(normalizer: Any) -> Any:
    return normalizers.Sequence([normalizers.Lowercase(), *_steps(normalizer)])


def _steps(normalizer: Any) -> list[Any]:
    if isinstance(normalizer, normalizers.Sequence):
        return [normalizer[i] for i in range(len(normalizer))]
    return [] if normalizer is None else [normalizer]


def _cleans_up(theirs: PreTrainedTokenizerBase, backend: Tokenizer) -> bool:
    # transformers ignores the setting for a BPE tokenizer, whose texts it would damage.
    return bool(theirs.clean_up_tokenization_spaces) and type(backend.model).__name__ != "BPE"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
