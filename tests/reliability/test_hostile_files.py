"""Checkpoints and tokenizers that somebody made to hurt: each is a typed error that names its place, in little time.

Sizes without end, pipes and devices in place of files, deep nesting, and rules of a tokenizer that never end, panic, or
make megabytes of a letter.
"""

import json
import os
import shutil
import sys
import threading
import time

import pytest

import gte_deploy
from gte_deploy.core.errors import CheckpointError, ConfigError, InputError
from gte_deploy.core.regular import read_regular
from gte_deploy.core.tokenizer_rules import MAX_GROWTH
from gte_deploy.text.tokenization import load_tokenizer
from runtime_models import make_word_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices have no names there")

SECONDS = 10
HUGE = 10**18


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An embedding model with a tokenizer that transformers takes as it is. Read only."""
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    make_word_checkpoint(folder, task="embed")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(original, tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def _in_time():
    """A pipe that somebody waits for gets a writer after a while, so that the test fails and does not hang."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


def change(folder, name, **fields):
    file = folder / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **fields}))


def load(folder):
    return gte_deploy.load(folder, backend="torch", num_threads=1)


def refusal(action, *arguments):
    """The error of an action: one of this package, without a stray one on the way."""
    with pytest.raises(gte_deploy.GteDeployError) as caught:
        action(*arguments)
    return caught.value


SIZES = ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_labels"]
# A model may have a million of these; and null stands for the usual number of labels.
MAY_BE = {*((name, 10**6) for name in ("vocab_size", "intermediate_size", "num_labels")), ("num_labels", None)}
NO_SIZES = [10**6, HUGE, 10**30, -1, 0, True, "12", 12.0, None, [], float("inf")]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SIZES for value in NO_SIZES if value == [] or (name, value) not in MAY_BE],
    ids=repr,
)
def test_sizes(folder, name, value):
    """A size that no model has is refused before anything is made of it."""
    change(folder, "config.json", **{name: value})
    error = refusal(load, folder)
    assert isinstance(error, ConfigError) and f"{folder / 'config.json'}: {name} is " in str(error)
    assert len(str(error)) < 500


@pytest.mark.parametrize("name", ["max_position_embeddings", "type_vocab_size"])
def test_other_sizes(folder, name):
    change(folder, "config.json", **{name: 10**30})
    assert f"{name} is 1000" in str(refusal(load, folder))


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_below_the_special_tokens(folder, limit):
    """The first text was tokenised for ever."""
    change(folder, "sentence_bert_config.json", max_seq_length=limit)
    with pytest.raises(CheckpointError, match=f"the model takes {limit} tokens, and its special tokens .* are 3"):
        with load(folder) as model:
            model.encode("the king", truncation=True)


@pytest.mark.parametrize("prompts", [{"query": 3}, {"query": ["a"]}, [1], "query", 3], ids=repr)
def test_prompts(folder, prompts):
    change(folder, "config_sentence_transformers.json", prompts=prompts)
    assert "prompt" in str(refusal(load, folder))


@pytest.mark.parametrize("default", [[], {}, 3, True], ids=repr)
def test_default_prompts(folder, default):
    change(folder, "config_sentence_transformers.json", prompts={"query": "a"}, default_prompt_name=default)
    assert "default prompt" in str(refusal(load, folder))


READ = [
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "1_Pooling/config.json",
]


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_loop(path):
    path.symlink_to(path)


def make_folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [make_pipe, make_device, make_loop, make_folder])
@pytest.mark.parametrize("name", READ)
def test_what_is_no_file(folder, name, make):
    """A pipe waits for a writer for ever, and a device never ends."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)

    def write_at_last():
        time.sleep(SECONDS)
        with open(folder / name, "wb"):
            pass

    if make is make_pipe:
        threading.Thread(target=write_at_last, daemon=True).start()
    try:
        with load(folder) as model:
            model.encode("the king")
    except gte_deploy.GteDeployError as error:
        assert folder.name in str(error)
    else:
        assert make in (make_loop, make_folder) or name == "1_Pooling/config.json"


@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting(folder, name, opening):
    (folder / name).write_bytes(opening * 200_000)
    refusal(load, folder)


def test_a_file_is_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_regular(file, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(file, 4)
    for make in (make_pipe, make_device):
        make(tmp_path / make.__name__)
        with pytest.raises(OSError, match="pipe, a socket or a device"):
            read_regular(tmp_path / make.__name__, 5)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 5)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 5)


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def nested(depth):
    found = {"type": "Lowercase"}
    for _ in range(depth):
        found = sequence(found)
    return found


RULES = {
    "a megabyte for a letter": ({"normalizer": replace("a", "b" * 1_000_000)}, "may make 1,000,000 characters of one"),
    "a product": ({"normalizer": sequence(*[replace("a", "a" * 9)] * 3)}, "may make 729 characters of one"),
    "a product in layers": (
        {"normalizer": sequence(replace("a", "a" * 9), sequence(*[replace("a", "a" * 9)] * 2))},
        "may make 729 characters of one",
    ),
    "a beginning": ({"normalizer": {"type": "Prepend", "prepend": "b" * 100_000}}, "may make 100,000 characters"),
    "a decoder": ({"decoder": replace("a", "b" * 1_000_000)}, "the decoder of tokenizer.json may make 1,000,000"),
    "many rules": ({"normalizer": sequence(*[{"type": "Lowercase"}] * 1000)}, "has 1,001 rules"),
    "many splits": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 1000}},
        "the pre_tokenizer of tokenizer.json has 1,001 rules",
    ),
    "deep rules": ({"normalizer": nested(60)}, "lies below more than 32 others|cannot be read as a tokenizer"),
}


@pytest.mark.parametrize(("parts", "message"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("read", [load_tokenizer, load], ids=["tokenizer", "checkpoint"])
def test_rules_without_end(folder, read, parts, message):
    change(folder, "tokenizer.json", **parts)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


MODELS = {
    "long words": ({"max_input_chars_per_word": HUGE}, "max_input_chars_per_word of tokenizer.json is 1,000,000,000"),
    "a long prefix": ({"continuing_subword_prefix": "#" * 10_000}, "continuing_subword_prefix .* 10,000 characters"),
}


@pytest.mark.parametrize(("parts", "message"), MODELS.values(), ids=MODELS)
def test_models_without_end(folder, parts, message):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder, "tokenizer.json", model={**model, **parts})
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("read", [load_tokenizer, load], ids=["tokenizer", "checkpoint"])
def test_ids_without_end(folder, read):
    """To copy such a tokenizer, the library would count to the highest id."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["last"] = 4_000_000_000
    change(folder, "tokenizer.json", model=model)
    with pytest.raises(CheckpointError, match="has the id 4,000,000,000, and"):
        read(folder)


def test_rules_as_real_tokenizers_have_them(folder):
    """Those of XLM-RoBERTa and of BERT: the bounds leave room."""
    rules = [replace("``", '"'), {"type": "NFKC"}, replace(" ", "▁"), {"type": "Prepend", "prepend": "▁"}]
    change(folder, "tokenizer.json", normalizer=sequence(*rules, replace("a", "a" * MAX_GROWTH)))
    assert load_tokenizer(folder)


def test_a_template_that_panics(folder, capfd):
    """The library gives up with an exception that is no Exception."""
    processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}], "pair": []}
    change(folder, "tokenizer.json", post_processor={**processor, "special_tokens": {}})
    for read in (load_tokenizer, load):
        with pytest.raises(CheckpointError):
            read(folder)


BACKTRACKING = {
    "pre-tokenizer": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
    "normalizer": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}},
}


@pytest.mark.parametrize("parts", BACKTRACKING.values(), ids=BACKTRACKING)
def test_a_pattern_that_goes_back_and_forth(folder, parts, capfd):
    """Oniguruma counts the steps of a match, and stops; the text gets an error, and the next one its tokens."""
    change(folder, "tokenizer.json", **parts)
    tokenizer = load_tokenizer(folder)
    hard = "a" * 5000 + "b"
    options = {"max_length": 8192, "truncation": True}
    good = tokenizer.encode_texts(["the king"], **options)
    for call in (
        lambda: tokenizer.encode_texts(["the king", hard], **options),
        lambda: tokenizer.encode_texts([hard * 20], max_length=9, truncation=True),
        lambda: tokenizer.encode_places([hard], **options),
        lambda: tokenizer.encode_pairs([("the", hard)], **options),
        lambda: tokenizer.target_ids([hard]),
    ):
        with pytest.raises(
            InputError, match="cannot be tokenised: the rules of tokenizer.json fail on it .*retry-limit"
        ):
            call()
        assert tokenizer.encode_texts(["the king"], **options) == good
