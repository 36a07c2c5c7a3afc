import gzip
import json
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from factories import write_tokenizer
from gte_deploy.core.errors import GteDeployError, InputError
from gte_deploy.training.data import prepare as module
from gte_deploy.training.data import readers, units
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.prepare import prepare
from gte_deploy.training.options import PrepareOptions

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12", "w200 w201"]
IDS = [[5, 6, 7], [8], [9, 10, 11, 12], [200, 201]]


@pytest.fixture
def make(tmp_path, tokenizer):
    """Prepare into tmp_path/out; the keyword arguments are a tokenizer and fields of PrepareOptions."""

    def call(*inputs, tokenizer=tokenizer, **options):
        options = PrepareOptions(**options)
        return prepare([str(i) for i in inputs], tmp_path / "out", tokenizer=tokenizer, options=options)

    return call


def documents(corpus):
    return [corpus.tokens(i, 0, int(length)).tolist() for i, length in enumerate(corpus.lengths)]


def write_json_lines(path, texts=TEXTS, *, field="text"):
    lines = "".join(json.dumps({field: text, "url": "http://x"}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


def write_parquet(path, texts=TEXTS, *, field="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=3)
    return path


def tree(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c4-train.00000.json.gz", "a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_formats(tmp_path, make, name):
    path = (write_parquet if name.endswith("parquet") else write_json_lines)(tmp_path / name)
    corpus = make(path)
    assert documents(corpus) == IDS
    assert TokenCorpus.open(tmp_path / "out", verify=True).num_tokens == 10


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_another_column(tmp_path, make, name):
    path = (write_parquet if name.endswith("parquet") else write_json_lines)(tmp_path / name, field="content")
    assert documents(make(path, text_column="content")) == IDS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_by_blank_lines(tmp_path, make, name):
    content = "\ufeffw5 w6\r\nw7\r\n\r\n \t\n\nw8\n\nw9 w10\nw11 w12\n\n\nw200 w201".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert documents(make(tmp_path / name)) == IDS


def test_plain_text_by_file(tmp_path, make):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text.replace(" ", "\n\n"))
    corpus = make(tmp_path / "*.txt", document_break="file")
    assert documents(corpus) == IDS
    assert len(corpus.index["shards"]) == 1  # small files share a unit


def test_a_local_dataset(tmp_path, make):
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for i in range(3):
        write_json_lines(folder / f"train-{i}.jsonl", TEXTS[i : i + 2])
    corpus = make(f"hf:{folder}::train")
    assert documents(corpus) == IDS[0:2] + IDS[1:3] + IDS[2:4]
    assert len(corpus.index["shards"]) == 3


def test_a_dataset_that_is_not_there(make, tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="cannot be opened"):
        make(f"hf:{tmp_path / 'nothing'}")


def test_folders_globs_and_order(tmp_path, make):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    write_json_lines(tmp_path / "b" / "deep" / "2.jsonl", TEXTS[1:2])
    write_json_lines(tmp_path / "b" / "1.json.gz", TEXTS[0:1])
    (tmp_path / "b" / "README.md").write_text("not data")
    write_json_lines(tmp_path / "z.jsonl", TEXTS[3:4])
    write_json_lines(tmp_path / "y.jsonl", TEXTS[2:3])
    assert documents(make(tmp_path / "b", tmp_path / "[yz].jsonl")) == IDS


def test_languages_lie_side_by_side(tmp_path, make):
    files = [write_json_lines(tmp_path / f"{i}.jsonl", TEXTS[i : i + 1]) for i in range(4)]
    corpus = make(f"en={files[0]}", f"zh-Hant={files[1]}", f"en={files[2]}", files[3])
    assert corpus.languages == ("en", "zh-Hant", "")
    assert documents(corpus) == [IDS[0], IDS[2], IDS[1], IDS[3]]
    assert corpus.language_of.tolist() == [0, 0, 1, 2]


def test_a_file_name_with_an_equals_sign_is_a_file(tmp_path, make, monkeypatch):
    write_json_lines(tmp_path / "a=b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert make("a=b.jsonl").languages == ("",)


# --- text -----------------------------------------------------------------------------------------------------------


def test_special_tokens_in_a_text_are_text(tmp_path, make):
    corpus = make(write_json_lines(tmp_path / "a.jsonl", ["w5 [MASK] w6 [SEP] [CLS]"]))
    # "[MASK]" is three unknown pieces, a bracket, a word and a bracket, and never the mask token.
    assert documents(corpus) == [[5, 1, 1, 1, 6, *[1] * 6]]


def test_lone_surrogates_become_u_fffd_and_are_counted(tmp_path, make):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w5 \\ud800 w6"}\n{"text": "w7 \\ud83d\\ude00"}\n')  # the second is a proper pair
    corpus = make(path)
    # The replacement character is dropped by BERT's clean-up; the emoji is one unknown word.
    assert documents(corpus) == [[5, 6], [7, 1]]
    assert corpus.index["counts"]["documents_with_replaced_surrogates"] == 1


def test_empty_documents_are_dropped_and_counted(tmp_path, make):
    corpus = make(write_json_lines(tmp_path / "a.jsonl", ["", "w5", " \n", "w6"]))
    assert documents(corpus) == [[5], [6]]
    assert corpus.index["counts"]["empty_documents"] == 2


def test_long_documents_are_not_cut(tmp_path, make):
    limited = tmp_path / "limited"
    limited.mkdir()
    write_tokenizer(limited)
    content = json.loads((limited / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (limited / "tokenizer.json").write_text(json.dumps(content))
    path = write_json_lines(tmp_path / "a.jsonl", ["w5 " * 5_000, "w6"])
    assert make(path, tokenizer=limited).lengths.tolist() == [5_000, 1]


# --- bad records ----------------------------------------------------------------------------------------------------

BAD_LINES = {
    "cut": b'{"text": "w9',
    "a list": b'["text"]',
    "no text": b'{"body": "w9"}',
    "null": b'{"text": null}',
    "a number": b'{"text": 9}',
    "no UTF-8": b'{"text": "w9 \xff"}',
    "deep": b'{"text": ' + b"[" * 100_000,
    "long": b'{"text": "' + b"w9 " * 1_000 + b'"}',
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, make, name):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "w5"}\n\n' + BAD_LINES[name] + b'\n{"text": "w6"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:3: .*skip_bad"):
        make(path, max_document_bytes=2_000)
    corpus = make(path, max_document_bytes=2_000, skip_bad=True)
    assert documents(corpus) == [[5], [6]]
    assert corpus.index["counts"]["bad_records"] == 1


@pytest.mark.parametrize("bad", [b"w9 \xff\nw9", b"w9 " * 700])
def test_a_bad_paragraph_is_named_or_skipped(tmp_path, make, bad):
    path = tmp_path / "a.txt"
    path.write_bytes(b"w5\n\n" + bad + b"\n\nw6\n")
    with pytest.raises(InputError, match=r"a\.txt:3: "):
        make(path, max_document_bytes=2_000)
    assert documents(make(path, max_document_bytes=2_000, skip_bad=True)) == [[5], [6]]


@pytest.mark.parametrize("bad", [None, "w9 " * 700])
def test_a_bad_parquet_row_is_named_or_skipped(tmp_path, make, bad):
    path = write_parquet(tmp_path / "a.parquet", ["w5", "w6", "w7", bad, "w8"])
    with pytest.raises(InputError, match=r"a\.parquet: row 3: "):
        make(path, max_document_bytes=2_000)
    assert documents(make(path, max_document_bytes=2_000, skip_bad=True)) == [[5], [6], [7], [8]]


def test_a_wrong_parquet_column_is_named_with_those_there(tmp_path, make):
    with pytest.raises(InputError, match="no column 'text', only id, content"):
        make(write_parquet(tmp_path / "a.parquet", field="content"))


def cut_gzip(path):
    path.write_bytes(write_json_lines(path, TEXTS * 50).read_bytes()[:-20])


def broken_gzip(path):
    content = bytearray(write_json_lines(path, TEXTS * 50).read_bytes())
    content[30:40] = b"0123456789"
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_gzip, broken_gzip, lambda p: p.write_bytes(b"plain")], ids=["cut", "bad", "no"])
def test_a_damaged_file_is_an_error_even_when_bad_records_are_skipped(tmp_path, make, damage):
    path = tmp_path / "a.json.gz"
    damage(path)
    with pytest.raises(InputError, match=r"a\.json\.gz"):
        make(path, skip_bad=True, restart=True)


def test_a_damaged_parquet_file_is_an_error(tmp_path, make):
    path = write_parquet(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        make(path)


def test_a_decompression_bomb_is_refused(tmp_path, make, monkeypatch):
    monkeypatch.setattr(readers, "EXPANSION_FREE_BYTES", 1 << 16)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"\n" * (1 << 19)))
    with pytest.raises(InputError, match="expands more than 200 times"):
        make(path)


# --- arguments ------------------------------------------------------------------------------------------------------


def test_inputs_that_cannot_be_used(tmp_path, make):
    path = write_json_lines(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    for inputs, message in [
        ([], "no input"),
        ([tmp_path / "missing.jsonl"], "names no file"),
        ([tmp_path / "empty"], "names no file"),
        ([tmp_path / "a.csv"], "no known format"),
        ([path, f"en={path}"], "given twice"),
        (["hf:"], "expected hf:NAME"),
    ]:
        with pytest.raises(InputError, match=message):
            make(*inputs)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"max_document_bytes": 0}, {"document_break": "line"}], ids=lambda o: next(iter(o))
)
def test_options_that_cannot_be_used(tmp_path, make, options):
    with pytest.raises(InputError):
        make(write_json_lines(tmp_path / "a.jsonl"), **options)


def test_inputs_without_a_token(tmp_path, make):
    with pytest.raises(InputError, match="no document"):
        make(write_json_lines(tmp_path / "a.jsonl", [""]))


def test_an_output_is_not_replaced_unless_told_to(tmp_path, make):
    first, second = (write_json_lines(tmp_path / f"{i}.jsonl", TEXTS[i : i + 1]) for i in (0, 1))
    make(first)
    with pytest.raises(InputError, match="exists already"):
        make(second)
    assert documents(TokenCorpus.open(tmp_path / "out")) == IDS[:1]
    assert documents(make(second, force=True)) == IDS[1:2]
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_that_is_no_corpus_is_never_replaced(tmp_path, make):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="no corpus"):
        make(write_json_lines(tmp_path / "a.jsonl"), force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


# --- parallel, interrupted, resumed ---------------------------------------------------------------------------------


@pytest.fixture
def many_units(tmp_path, monkeypatch):
    """Six inputs, each a unit of its own."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    rng = np.random.default_rng(0)
    for i in range(6):
        texts = [" ".join(f"w{w}" for w in rng.integers(5, 256, n)) for n in rng.integers(0, 60, 200)]
        write_json_lines(tmp_path / f"c4-{i}.json.gz", texts)
    return str(tmp_path / "c4-*.json.gz")


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, tokenizer, many_units):
    for workers in (1, 2):
        prepare([many_units], tmp_path / f"by{workers}", tokenizer=tokenizer, options=PrepareOptions(workers=workers))
    assert tree(tmp_path / "by1") == tree(tmp_path / "by2")
    assert len([name for name in tree(tmp_path / "by1") if name.endswith(".tokens")]) == 6


def test_files_are_readable_by_others_and_complete(tmp_path, make, many_units):
    make(many_units)
    names = set(tree(tmp_path / "out"))
    assert {"index.json", "histogram.json", "histogram.txt"} < names and not any("tmp" in name for name in names)
    for file in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_have_a_bound_and_the_documents_stay_as_they_are(tmp_path, tokenizer, many_units, workers):
    whole = prepare([many_units], tmp_path / "whole", tokenizer=tokenizer)
    options = PrepareOptions(workers=workers, shard_bytes=300, held_out=0.2)
    cut = prepare([many_units], tmp_path / "cut", tokenizer=tokenizer, options=options)
    held_out = TokenCorpus.open(cut.folder / "held-out", verify=True)
    TokenCorpus.open(cut.folder, verify=True)
    for corpus in (cut, held_out):
        sizes = [(shard["tokens"] * 2, shard["documents"]) for shard in corpus.index["shards"]]
        assert len(sizes) > 12 and all(size <= 300 or count == 1 for size, count in sizes)
        names = [shard["name"] for shard in corpus.index["shards"]]
        assert names == sorted(names) and names[:2] == ["shard-00000", "shard-00000-0001"]
    assert sorted(documents(whole)) == sorted([*documents(cut), *documents(held_out)])
    kept = set(map(tuple, documents(cut)))
    assert [each for each in documents(whole) if tuple(each) in kept] == documents(cut)


def test_a_document_above_the_bound_has_a_shard_of_its_own(tmp_path, make):
    texts = [" ".join(["w7"] * count) for count in (2, 50, 3, 4, 6)]
    corpus = make(write_json_lines(tmp_path / "text.jsonl", texts), shard_bytes=20)
    assert [shard["tokens"] for shard in corpus.index["shards"]] == [2, 50, 7, 6]
    assert corpus.lengths.tolist() == [2, 50, 3, 4, 6]


def test_another_bound_of_shards_needs_a_restart_and_an_interrupted_run_goes_on(tmp_path, make, many_units):
    expected = tree(make(many_units, shard_bytes=3_000).folder)
    (tmp_path / "out").rename(tmp_path / "expected")
    good = (tmp_path / "c4-5.json.gz").read_bytes()
    (tmp_path / "c4-5.json.gz").write_bytes(good[:100])
    with pytest.raises(InputError):
        make(many_units, shard_bytes=3_000)
    (tmp_path / "c4-5.json.gz").write_bytes(good)
    with pytest.raises(InputError, match="other options"):
        make(many_units, shard_bytes=4_000)
    assert tree(make(many_units, shard_bytes=3_000).folder) == expected


def test_histogram_files_tell_the_lengths(tmp_path, make):
    corpus = make(f"en={write_json_lines(tmp_path / 'a.jsonl')}", f"de={write_json_lines(tmp_path / 'b.jsonl')}")
    plot = json.loads((tmp_path / "out" / "histogram.json").read_text())
    assert plot["all"] == {"edges": [0, 16], "sequences": [8], "tokens": [20]}
    assert plot["languages"]["de"]["sequences"] == [4]
    assert f"{corpus.num_documents} sequences, 20 tokens" in (tmp_path / "out" / "histogram.txt").read_text()


def test_a_failed_run_goes_on_with_the_units_that_are_left(tmp_path, make, many_units, monkeypatch, caplog):
    expected = tree(make(many_units).folder)
    (tmp_path / "out").rename(tmp_path / "expected")

    good = (tmp_path / "c4-3.json.gz").read_bytes()
    (tmp_path / "c4-3.json.gz").write_bytes(good[:100])
    with pytest.raises(InputError, match="c4-3"):
        make(many_units)
    assert not (tmp_path / "out").exists()

    (tmp_path / "c4-3.json.gz").write_bytes(good)
    encoded = []
    original = module._Encoder.encode
    monkeypatch.setattr(
        module._Encoder, "encode", lambda self, unit: encoded.append(unit.number) or original(self, unit)
    )
    with caplog.at_level(logging.INFO):
        assert tree(make(many_units).folder) == expected
    assert encoded == [3, 4, 5] and "3 of 6 units are already encoded" in caplog.text


@pytest.mark.parametrize("damage", ["record", "tokens", "input"])
def test_a_unit_that_does_not_match_is_done_again(tmp_path, make, many_units, damage):
    expected = tree(make(many_units).folder)
    (tmp_path / "out").rename(tmp_path / "expected")
    last = tmp_path / "c4-5.json.gz"
    good = last.read_bytes()
    last.write_bytes(good[:100])
    with pytest.raises(InputError):
        make(many_units)
    last.write_bytes(good)

    work = tmp_path / ".out.partial"
    if damage == "record":
        (work / "units" / "shard-00001.json").write_text("{")
    elif damage == "tokens":
        os.truncate(work / "corpus" / "shard-00001.tokens", 4)
    else:
        write_json_lines(tmp_path / "c4-1.json.gz", TEXTS)
        expected = None
    (work / "corpus" / ".shard-00005.tokens.abc.tmp").write_bytes(b"left by a kill")
    corpus = make(many_units)
    if expected is not None:
        assert tree(corpus.folder) == expected
    else:
        assert int(corpus.index["shards"][1]["documents"]) == 4
    TokenCorpus.open(corpus.folder, verify=True)


def test_skip_bad_may_be_added_when_resuming(tmp_path, make, many_units):
    with gzip.open(tmp_path / "c4-4.json.gz", "at") as file:
        file.write("no json\n")
    with pytest.raises(InputError, match="c4-4"):
        make(many_units)
    assert make(many_units, skip_bad=True).index["counts"]["bad_records"] == 1


def test_skipped_records_are_not_accepted_by_a_strict_resume(tmp_path, make, many_units):
    with gzip.open(tmp_path / "c4-0.json.gz", "at") as file:
        file.write("no json\n")
    (tmp_path / "c4-5.json.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(InputError, match="c4-5"):
        make(many_units, skip_bad=True)
    with pytest.raises(InputError, match="c4-0"):
        make(many_units)


def test_other_options_need_a_restart(tmp_path, make, many_units):
    good = (tmp_path / "c4-5.json.gz").read_bytes()
    (tmp_path / "c4-5.json.gz").write_bytes(good[:100])
    with pytest.raises(InputError):
        make(many_units)
    (tmp_path / "c4-5.json.gz").write_bytes(good)
    with pytest.raises(InputError, match="other options or another tokenizer.*restart"):
        make(many_units, max_document_bytes=1 << 20)
    assert make(many_units, max_document_bytes=1 << 20, restart=True).num_documents > 1_000


def test_two_runs_do_not_write_one_output(tmp_path, make, many_units):
    with module._workspace(tmp_path / "out", {}, restart=False), pytest.raises(InputError, match="in use"):
        make(many_units)


SCRIPT = """
import sys
from pathlib import Path
from gte_deploy.training.data import units
from gte_deploy.training.data.prepare import prepare
from gte_deploy.training.options import PrepareOptions
units.UNIT_BYTES = 1  # used where units are planned, so it need not reach the workers

if __name__ == "__main__":
    inputs, output, tokenizer, workers = sys.argv[1:]
    prepare([inputs], Path(output), tokenizer=Path(tokenizer), options=PrepareOptions(workers=int(workers)))
"""


@pytest.fixture
def start(tmp_path, tokenizer, many_units):
    """Start a run in a process group of its own, over inputs that take it a while."""
    for file in tmp_path.glob("c4-*.json.gz"):
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()) * 5, mtime=0))
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(workers):
        command = [sys.executable, tmp_path / "script.py", many_units, tmp_path / "out", tokenizer, str(workers)]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    return start


def wait_until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_until_gone(process):
    """Until no process of its group is left: one that was killed is reaped a moment later."""
    process.wait(timeout=60)
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    except ProcessLookupError:
        return
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("workers outlived their parent")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_it_ends_in_the_same_bytes(tmp_path, tokenizer, many_units, start, workers):
    expected = tree(prepare([many_units], tmp_path / "expected", tokenizer=tokenizer).folder)
    work = tmp_path / ".out.partial"
    for condition in (
        # inside a shard
        lambda: any(not file.with_suffix(".offsets").exists() for file in (work / "corpus").glob("*.tokens")),
        lambda: len(list((work / "units").glob("*.json"))) >= 2,
    ):
        process = start(workers)
        wait_until(condition, process)
        process.kill()
        wait_until_gone(process)  # the workers end with their parent
        process.communicate()
        assert not (tmp_path / "out").exists()
    process = start(workers)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert tree(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupt_leaves_no_worker_and_keeps_what_is_done(tmp_path, start):
    process = start(2)
    wait_until(lambda: any((tmp_path / ".out.partial/units").glob("*.json")), process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert errors.count("Traceback") == 1  # the parent's; none from a worker
    wait_until_gone(process)
    assert any((tmp_path / ".out.partial/units").glob("*.json")) and not (tmp_path / "out").exists()


def test_a_killed_worker_is_said_so(make, many_units, monkeypatch):
    """As the kernel does when memory runs out."""
    monkeypatch.setattr(module, "_show", lambda *_: [child.kill() for child in multiprocessing.active_children()])
    with pytest.raises(GteDeployError, match="a worker process died"):
        make(many_units, workers=2)


# --- held-out documents ---------------------------------------------------------------------------------------------

MANY = [f"w{i} w{i + 1} w{i + 2}" for i in range(5, 200)]


def test_held_out_documents_are_in_the_second_corpus_alone(make, tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", [*MANY, *MANY[:20], ""])
    corpus = make(source, held_out=0.2)
    held_out = TokenCorpus.open(tmp_path / "out" / module.HELD_OUT_FOLDER, verify=True)
    kept, held = documents(TokenCorpus.open(tmp_path / "out", verify=True)), documents(held_out)
    assert corpus.num_documents == len(kept) and len(kept) + len(held) == len(MANY) + 20
    assert len(held) == pytest.approx(0.2 * len(MANY), abs=25)
    assert not {tuple(ids) for ids in kept} & {tuple(ids) for ids in held}, "copies of a document stay together"
    assert held_out.languages == corpus.languages and corpus.index["counts"] == {"empty_documents": 1}


def test_which_documents_are_held_out_does_not_depend_on_files_and_workers(make, tmp_path, monkeypatch):
    one = write_json_lines(tmp_path / "one.jsonl", MANY)
    make(one, held_out=0.1)
    alone = documents(TokenCorpus.open(tmp_path / "out" / module.HELD_OUT_FOLDER))
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    several = [write_json_lines(tmp_path / f"{i}.jsonl", MANY[i::3]) for i in range(3)]
    make(*several, held_out=0.1, force=True)
    together = documents(TokenCorpus.open(tmp_path / "out" / module.HELD_OUT_FOLDER))
    assert sorted(together) == sorted(alone) and len(alone) > 5


def test_an_interrupted_run_with_held_out_documents_goes_on(make, tmp_path, monkeypatch):
    source = write_json_lines(tmp_path / "a.jsonl", MANY)
    make(source, held_out=0.1)
    whole = tree(tmp_path / "out")

    def killed(made, output):
        raise KeyboardInterrupt  # after the held-out corpus was moved into place in the workspace

    with monkeypatch.context() as patch:
        patch.setattr(module, "_install", killed)
        with pytest.raises(KeyboardInterrupt):
            make(source, held_out=0.1, force=True)
    make(source, held_out=0.1, force=True)
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(("share", "message"), [(1e-6, "no document is held out"), (0.999999, "no document is left")])
def test_a_share_that_holds_out_nothing_or_all_is_refused(make, tmp_path, share, message):
    source = write_json_lines(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=message):
        make(source, held_out=share)
    with pytest.raises(InputError, match=r"outside \[0, 1\)"):
        make(source, held_out=1.0)
