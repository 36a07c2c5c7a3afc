import json

import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.vocabulary import read_vocabulary


def test_vocabulary_comes_from_the_tokenizer(tokenizer):
    vocab, file = read_vocabulary(tokenizer)
    assert (vocab.size, vocab.special_ids) == (256, (0, 1, 2, 3, 4))
    assert (vocab.pad_id, vocab.unk_id, vocab.cls_id, vocab.sep_id, vocab.mask_id) == (0, 1, 2, 3, 4)
    assert read_vocabulary(file) == (vocab, file)


def test_roberta_names_and_holes_are_understood(tmp_path):
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 6, "<mask>": 7}  # no word owns 5
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": name, **flags} for name, i in names.items() if name.startswith("<")]
    model = {"type": "WordLevel", "vocab": names, "unk_token": "<unk>"}
    content = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": {"content": "<mask>"}, "cls_token": "<s>"}')
    vocab, _ = read_vocabulary(tmp_path)
    assert (vocab.size, vocab.cls_id, vocab.mask_id, vocab.sep_id) == (8, 0, 7, 2)
    assert vocab.ordinary_ids.tolist() == [4, 6]


def test_tokenizers_that_cannot_be_used(tmp_path, tokenizer):
    with pytest.raises(InputError, match="is missing"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer that"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "<other>"}')
    with pytest.raises(InputError, match="no mask token .looked for <other>"):
        read_vocabulary(tmp_path)
