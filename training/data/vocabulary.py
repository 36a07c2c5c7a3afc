"""The vocabulary of a corpus, read from a checkpoint's tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from gte_deploy.core.errors import InputError
from gte_deploy.core.files import read_json_object
from gte_deploy.training.data.corpus import Vocabulary

_SPECIAL_NAMES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}


def read_vocabulary(tokenizer: Path) -> tuple[Vocabulary, Path]:
    """Read the vocabulary of a tokenizer.json, or of that file in a checkpoint folder; return it with the file's path.

    Raises:
        InputError: there is no readable tokenizer, or it has no [CLS], [SEP], [MASK], [PAD] or [UNK] under any name.
    """
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    encoder = read_tokenizer(file)
    ids = encoder.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    declared = _declared_specials(file.parent)
    named = {}
    for role, usual in _SPECIAL_NAMES.items():
        candidates = [declared[role]] if role in declared else usual
        found = [ids[token] for token in candidates if token in ids]
        if not found:
            raise InputError(
                f"{file} has no {role} token (looked for {', '.join(candidates)}): use a tokenizer with it"
            )
        named[f"{role}_id"] = found[0]
    special = {i for i, token in encoder.get_added_tokens_decoder().items() if token.special}
    holes = set(range(size)) - set(ids.values())
    special_ids = tuple(sorted(special | holes | set(named.values())))
    return Vocabulary(size=size, **named, special_ids=special_ids), file


def read_tokenizer(file: Path) -> Tokenizer:
    """Load a tokenizer.json to encode plain text: without truncation, padding or special tokens.

    Raises:
        InputError: the file is missing, or this version of `tokenizers` cannot read it.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing: give a checkpoint folder with a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class for any file it cannot read
        raise InputError(f"{file} is no tokenizer that this version of `tokenizers` can read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
    return tokenizer


def _declared_specials(folder: Path) -> dict[str, str]:
    """Return the special tokens that the tokenizer's configuration names, by role; the later file wins."""
    declared = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json_object(folder / name, error=InputError, advice="Copy the tokenizer again.")
        for role in _SPECIAL_NAMES:
            token = content.get(f"{role}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                declared[role] = text
    return declared
