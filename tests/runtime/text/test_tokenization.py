"""TextTokenizer against transformers' tokenizer and the tokenizers library's own truncation."""

import json
import shutil
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gte_deploy.core.errors import CheckpointError, InputError
from gte_deploy.text.inputs import MAX_TEXT_BYTES
from gte_deploy.text.tokenization import load_tokenizer

WORDS = [
    "walking",
    "Paris",
    "unreadable",
    "[MASK]",
    "[SEP]",
    "isn't",
    "中国",
    "e\u0301",
    "(a)",
    "  ",
    "\n",
    "\u200d",
    "x" * 120,
]
texts_of_words = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


@pytest.fixture(scope="module")
def folder(word_checkpoints):
    return word_checkpoints["fill-mask"]


@pytest.fixture(scope="module")
def ours(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(texts_of_words, st.text(st.characters(exclude_categories=["Cs"]), max_size=80)))
def test_ids_are_transformers_ids(ours, theirs, text):
    assert ours.encode_texts([text], max_length=10_000, truncation=False) == [theirs(text)["input_ids"]]


@settings(max_examples=60, deadline=None)
@given(text=texts_of_words, max_length=st.integers(3, 20))
def test_a_cut_text_is_the_beginning_of_the_whole(ours, theirs, text, max_length):
    """Long texts are tokenised from a beginning only; the ids must be those of the whole text, cut."""
    expected = theirs(text, truncation=True, max_length=max_length)["input_ids"]
    assert ours.encode_texts([text], max_length=max_length, truncation=True) == [expected]


@settings(max_examples=60, deadline=None)
@given(first=texts_of_words, second=texts_of_words, max_length=st.integers(5, 30))
@example("walking " * 4, "walking " * 9, 6)  # the second is only looked at in part, and yet the longer one
@example("walking " * 40, "walking " * 50, 6)
@example("walking " * 50, "walking " * 40, 6)
@example("walking " * 40, "walking " * 40, 6)
def test_pairs_are_cut_longest_first(ours, theirs, first, second, max_length):
    expected = theirs([first], [second], truncation="longest_first", max_length=max_length)["input_ids"]
    assert ours.encode_pairs([(first, second)], max_length=max_length, truncation=True) == expected


def test_single_texts_and_pairs_mix(ours, theirs):
    expected = [theirs("the king")["input_ids"], theirs("a", "the queen")["input_ids"]]
    assert ours.encode_pairs([("the king",), ("a", "the queen")], max_length=99, truncation=False) == expected


def test_pairs_that_share_texts(ours, theirs):
    pairs = [("the king", "a"), ("the king", "the king"), ("a", "the king " * 20), ("the king " * 20, "a")]
    options = {"truncation": "longest_first", "max_length": 12}
    expected = [theirs(first, second, **options)["input_ids"] for first, second in pairs]
    assert ours.encode_pairs(pairs, max_length=12, truncation=True) == expected


def test_lengths_at_the_limit(ours):
    text = "the " * 10
    assert len(ours.encode_texts([text], max_length=12, truncation=False)[0]) == 12
    with pytest.raises(InputError, match=r"input 1 has 12 tokens, special tokens included; the limit is 11"):
        ours.encode_texts(["the", text], max_length=11, truncation=False)
    with pytest.raises(InputError, match=r"input 1 has 13 tokens.*limit is 12"):
        ours.encode_pairs([("a",), (text, "")], max_length=12, truncation=False)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("text", ["walking, he said: isn't", "[CLS] a [MASK] [SEP]", "中国 ( b )", ""])
def test_decode_is_transformers_decode(ours, theirs, text, skip):
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_clean_up_asked_for_in_the_config(folder, tmp_path):
    import transformers

    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_up_tokenization_spaces": True}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    ids = theirs("don ' t ! he ' s . ' m")["input_ids"]
    assert load_tokenizer(tmp_path / "copy").decode(ids) == theirs.decode(ids)


def test_stored_truncation_and_padding_are_switched_off(folder, tmp_path, ours):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    file.write_text(json.dumps(stored), encoding="utf-8")
    texts = ["a", "the king and the queen of france"]
    expected = ours.encode_texts(texts, max_length=99, truncation=False)
    assert load_tokenizer(tmp_path / "copy").encode_texts(texts, max_length=99, truncation=False) == expected


def test_threads_with_different_lengths_do_not_disturb_each_other(ours):
    text = "the old king of france and the queen " * 5
    whole = ours.encode_texts([text], max_length=999, truncation=False)[0]
    wrong = []

    def work(max_length):
        for _ in range(50):
            (row,) = ours.encode_texts([text], max_length=max_length, truncation=True)
            if row != [*whole[: max_length - 1], whole[-1]]:
                wrong.append(max_length)

    threads = [threading.Thread(target=work, args=(3 + i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_known_ids(ours):
    known = ours.known_ids(200)
    assert known.sum() == len(json.loads(ours._tokenizer.to_str())["model"]["vocab"])
    assert not known[known.sum() :].any()
    with pytest.raises(CheckpointError, match=r"token id \d+.*vocabulary has 50 rows"):
        ours.known_ids(50)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", '{"version": "1.0"}', "cannot be read"),
        ("tokenizer_config.json", "[[", "not valid JSON"),
        ("tokenizer_config.json", '{"pad_token": "[NOPE]"}', "pad token"),
        ("tokenizer_config.json", '{"pad_token": "[PAD]", "mask_token": "<nope>"}', "mask token"),
    ],
)
def test_a_broken_folder_is_refused(folder, tmp_path, name, content, message):
    shutil.copytree(folder, tmp_path / "copy")
    if content is None:
        (tmp_path / "copy" / name).unlink()
    else:
        (tmp_path / "copy" / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "copy")


def test_special_tokens_may_stand_in_the_map_alone_and_as_objects(folder, tmp_path, ours):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    special = {"pad_token": {"content": "[PAD]", "lstrip": False}, "mask_token": "[MASK]"}
    (tmp_path / "copy" / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = load_tokenizer(tmp_path / "copy")
    assert (loaded.template, loaded.mask_token_id) == (ours.template, ours.mask_token_id)


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """A tokenizer with the pieces of XLM-R's: Unigram, Metaspace, two separators in a pair, a mask that eats spaces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz.,!?中国"]
    pieces = [("\u2581", -4.0), ("\u2581the", -2.0), ("\u2581king", -2.5), ("ing", -3.0), ("\u2581walk", -2.5)]
    tokenizer = Tokenizer(
        models.Unigram([("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *letters], 3)
    )
    tokenizer.normalizer = normalizers.Replace(" {2,}", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    folder = tmp_path_factory.mktemp("unigram")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "<pad>", "mask_token": {"content": "<mask>", "lstrip": True}})
    )
    return tokenizer, load_tokenizer(folder)


unigram_words = ["the", "king", "walking", " <mask>", "<mask>", "</s>", "中国", "?!", "  ", "\n", "z" * 90]


@settings(max_examples=60, deadline=None)
@given(text=texts_of_words, max_length=st.integers(3, 20), stride=st.one_of(st.none(), st.integers(0, 17)))
def test_places_are_those_of_transformers(ours, theirs, text, max_length, stride):
    if stride is not None and stride >= max_length - 2:
        with pytest.raises(InputError, match="stride must be an integer from 0 to"):
            ours.encode_places([text], max_length=max_length, truncation=False, stride=stride)
        return
    windows = {} if stride is None else {"stride": stride, "return_overflowing_tokens": True}
    expected = theirs([text], truncation=True, max_length=max_length, return_offsets_mapping=True, **windows)
    pieces = ours.encode_places([text], max_length=max_length, truncation=stride is None, stride=stride)
    assert [piece.ids for piece in pieces] == expected["input_ids"]
    assert [piece.offsets.tolist() for piece in pieces] == [
        [list(place) for place in places[1:-1]] for places in expected["offset_mapping"]
    ]
    assert all(piece.own_ids == piece.ids[1:-1] and piece.words is None for piece in pieces)


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=9))
def test_words_are_those_of_transformers(ours, theirs, words):
    expected = theirs(words, is_split_into_words=True, return_offsets_mapping=True)
    (piece,) = ours.encode_places([words], max_length=10_000, truncation=False)
    assert piece.ids == expected["input_ids"]
    assert piece.words.tolist() == expected.word_ids()[1:-1]
    assert piece.offsets.tolist() == [list(place) for place in expected["offset_mapping"][1:-1]]


def test_the_unknown_token(ours, theirs, unigram):
    assert ours.unk_token_id == theirs.unk_token_id
    assert unigram[1].unk_token_id == unigram[0].token_to_id("<unk>") == 3


def test_template_of_another_family(unigram):
    template = unigram[1].template
    assert (template.prefix, template.suffix, template.middle, template.pair_suffix) == ((0,), (2,), (2, 2), (2,))


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(unigram_words), max_size=60), max_length=st.integers(3, 20))
def test_texts_of_another_family(unigram, words, max_length):
    tokenizer, ours = unigram
    text = " ".join(words)
    whole = tokenizer.encode(text).ids
    assert ours.encode_texts([text], max_length=10_000, truncation=False) == [whole]
    cut = whole if len(whole) <= max_length else [*whole[: max_length - 1], whole[-1]]
    assert ours.encode_texts([text], max_length=max_length, truncation=True) == [cut]
    assert ours.decode(whole, skip_special_tokens=True) == tokenizer.decode(whole)
    pair = tokenizer.encode(text, "the king").ids
    assert ours.encode_pairs([(text, "the king")], max_length=10_000, truncation=False) == [pair]


@pytest.fixture
def reads_only_200_characters(monkeypatch):
    monkeypatch.setattr("gte_deploy.text.tokenization.MAX_TOKENIZED_CHARS", 200)


GAPS = {"gap": "the" + " " * 300, "word": "x" * 300, "marks": "a" + "\u0301" * 300}


@pytest.mark.usefixtures("reads_only_200_characters")
@pytest.mark.parametrize("text", GAPS.values(), ids=GAPS)
@pytest.mark.parametrize("truncation", [True, False])
def test_a_text_without_an_end_is_refused(ours, text, truncation):
    """As many characters as the limit are read, of however long a text; a shorter text is answered whole."""
    message = (
        r"input 7 has 30\d characters, of which at most 200 are read to find its first 8 tokens; those have [01]\."
    )
    options = {"max_length": 10, "truncation": truncation}
    with pytest.raises(InputError, match=message):
        ours.encode_texts(["a", text], [3, 7], **options)
    with pytest.raises(InputError, match=message):
        ours.encode_places(["a", text], [3, 7], **options)
    with pytest.raises(InputError, match=message.replace("8 tokens", "10 tokens")):
        ours.encode_pairs([("a", "the"), ("a", text)], [3, 7], **options)
    assert len(ours.encode_texts([text[:200]], **options)[0]) == 3


@pytest.mark.usefixtures("reads_only_200_characters")
def test_a_long_text_of_words_is_cut_as_before(ours, theirs):
    text = "the king of Paris " * 100
    for max_length in (10, 11, 30):
        (row,) = ours.encode_texts([text], max_length=max_length, truncation=True)
        assert row == theirs(text, truncation=True, max_length=max_length)["input_ids"]
    # With an even number of tokens to share, it does not matter which of two long texts is the longer one.
    pair = theirs(text, text[4:], truncation=True, max_length=11)["input_ids"]
    assert ours.encode_pairs([(text, text[4:])], max_length=11, truncation=True) == [pair]
    with pytest.raises(InputError, match="input 2 is a pair of 1,800 and 1,796 characters; one of the two may have"):
        ours.encode_pairs([(text, text[4:])], [2], max_length=12, truncation=True)


@pytest.mark.usefixtures("reads_only_200_characters")
def test_a_tokenizer_that_keeps_the_end_reads_no_longer_text(folder, tmp_path):
    copy = tmp_path / "left"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "truncation_side": "left"}))
    left = load_tokenizer(copy)
    assert len(left.encode_texts(["the " * 50], max_length=9, truncation=True)[0]) == 9
    with pytest.raises(InputError, match="input 0 has 204 characters; a tokenizer that keeps the last .* at most 200"):
        left.encode_texts(["the " * 51], max_length=9, truncation=True)


@pytest.mark.parametrize("gap", [" ", "\u0301"], ids=["spaces", "marks"])
def test_four_megabytes_without_an_end_cost_little(ours, gap):
    """A text of the greatest length with hardly a token: it took seconds of CPU to find that out."""
    text = "the" + gap * (MAX_TEXT_BYTES // len(gap.encode()) - 3)
    started = time.process_time()
    with pytest.raises(InputError, match=r"input 0 has [\d,]+ characters, of which at most 1,048,576 are read"):
        ours.encode_texts([text], max_length=128, truncation=True)
    assert time.process_time() - started < 2.5  # on a busy machine
