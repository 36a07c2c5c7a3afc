"""PyTorch's outputs of long inputs: computed once for all exports of the same weights, and never taken from a file
that is damaged or that somebody else could have written."""

import copy
import dataclasses
import errno
import json
import os
import threading
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from factories import make_checkpoint  # noqa: E402
from gte_deploy.core.spec import ModelSpec  # noqa: E402
from gte_deploy.exporters.verification import reference_cache  # noqa: E402
from gte_deploy.exporters.verification.cases import Case, TokenSource, make_batch  # noqa: E402
from gte_deploy.exporters.verification.parity import Comparison, check_parity  # noqa: E402
from gte_deploy.exporters.verification.reference import TorchReference  # noqa: E402
from gte_deploy.exporters.verification.reference_cache import (  # noqa: E402
    CachedOutputs,
    ReferenceCache,
    encoder_key,
    open_cache,
)
from gte_deploy.exporters.verification.report import format_table  # noqa: E402
from gte_deploy.exporters.verification.texts import text_batches  # noqa: E402
from gte_deploy.models.checkpoint import load_model  # noqa: E402
from gte_deploy.text.tokenization import load_tokenizer  # noqa: E402

SPEC = ModelSpec(task="fill-mask", max_length=512, vocab_size=256, hidden_size=32, pad_token_id=0)
SMALL, LONG = Case(17, 2, ragged=True), (Case(300), Case(100, 8, ragged=True))
TASKS = ("fill-mask", "embed", "classify", "token-classify")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(task)`: the folder of a tiny checkpoint, made once."""
    made = {}

    def of(task):
        if task not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / task
            made[task] = make_checkpoint(folder, task=task, num_labels=3, with_pooler=task == "classify")
        return made[task]

    return of


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "reference")


def compared(folder, task, cache, *, texts=0):
    """The report of a parity check of a model with itself, and the token counts of the batches that its encoder ran."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, task=task)
    spec = dataclasses.replace(SPEC, task=task)
    options = {"task": task, "pooling": "cls", "logits": "masked"}
    candidate = TorchReference(copy.deepcopy(model), **options)
    reference = TorchReference(model, **options, cache=cache)
    computed = []
    model.base_model.register_forward_hook(
        lambda module, args, inputs, output: computed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    head = "sentence_embedding" if task == "embed" else "logits"
    words = " ".join(f"w{5 + i % 250}" for i in range(200))
    rounds = {"en": [text_batches([words], tokenizer, spec, max_tokens=texts)]} if texts else {}
    tokens = TokenSource.from_tokenizer(tokenizer)
    asked = Comparison(["last_hidden_state", head], spec, "int8", tokens, cases=(SMALL, *LONG), texts=rounds)
    return check_parity(reference, {("onnxruntime", "int8"): candidate}, asked), computed


def numbers(report):
    """The report without the use of the cache."""
    data = report.to_json()
    data.pop("reference")
    return data


@pytest.mark.parametrize("task", TASKS)
def test_a_second_comparison_runs_no_long_batch_and_finds_the_same(checkpoint, cache, task):
    plain, every = compared(checkpoint(task), task, None)
    first, computed = compared(checkpoint(task), task, cache)
    second, again = compared(checkpoint(task), task, cache)
    assert computed == every and {300, 800} <= set(computed)
    assert again == [tokens for tokens in every if tokens < 256]
    assert numbers(plain) == numbers(first) == numbers(second)
    assert plain.reference is None
    assert (first.reference.batches, first.reference.cached, first.reference.oldest) == (len(every), 0, None)
    assert (second.reference.batches, second.reference.cached) == (len(every), 2)


def test_answers_to_texts_are_cached_too(checkpoint, cache):
    first, computed = compared(checkpoint("fill-mask"), "fill-mask", cache, texts=600)
    second, again = compared(checkpoint("fill-mask"), "fill-mask", cache, texts=600)
    assert sum(computed) > sum(again) and max(again) < 256
    assert first.engines[0].accuracy == second.engines[0].accuracy
    assert numbers(first) == numbers(second)


def test_another_head_uses_the_same_outputs(checkpoint, cache, tmp_path):
    report, _ = compared(make_checkpoint(tmp_path / "embed", task="embed"), "embed", cache)
    assert report.reference.cached == 0
    report, _ = compared(make_checkpoint(tmp_path / "words", task="fill-mask"), "embed", cache)
    assert report.reference.cached == len(LONG)


def test_the_report_names_the_source(checkpoint, cache, monkeypatch):
    first, _ = compared(checkpoint("embed"), "embed", cache)
    assert "come from the cache" not in format_table(first)
    load = ReferenceCache.load
    monkeypatch.setattr(
        ReferenceCache,
        "load",
        lambda self, key: (found := load(self, key)) and dataclasses.replace(found, day="2026-01-31"),
    )
    second, _ = compared(checkpoint("embed"), "embed", cache)
    assert "for 2 of 5 batches come from the cache" in format_table(second)
    assert "the oldest on 2026-01-31" in format_table(second)
    assert second.to_json()["reference"] == {"batches": 5, "cached": 2, "oldest": "2026-01-31"}


def edit_weight(model):
    model.base_model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-6


def edit_frequencies(model):
    buffers = dict(model.base_model.named_buffers())
    buffers[next(name for name in buffers if "inv_freq" in name)].mul_(1.01)


def edit_norm(model):
    model.base_model.config.layer_norm_eps *= 2


def edit_attention(model):
    model.base_model.set_attn_implementation("eager")


def edit_head(model):
    model.lm_head.layer_norm.weight.mul_(2)


def edit_name(model):
    model.base_model.config._name_or_path = "elsewhere"


@pytest.mark.parametrize(
    "edit, same",
    [
        (edit_weight, False),
        (edit_frequencies, False),
        (edit_norm, False),
        (edit_attention, False),
        (edit_head, True),
        (edit_name, True),
    ],
)
def test_the_key_covers_what_decides_the_encoders_outputs(tiny_mlm, edit, same):
    model = load_model(tiny_mlm)
    key = encoder_key(model.base_model)
    with torch.no_grad():
        edit(model)
    assert (encoder_key(model.base_model) == key) == same


@pytest.mark.parametrize(
    "name, value",
    [
        ("cpu_model", lambda: "another CPU"),
        ("__version__", "99"),
        ("torch.__version__", "99"),
        ("transformers.__version__", "99"),
        ("sha256_file", lambda path: "changed code"),
    ],
)
def test_the_key_covers_the_machine_and_the_code(tiny_mlm, monkeypatch, name, value):
    encoder = load_model(tiny_mlm).base_model
    key = encoder_key(encoder)
    assert encoder_key(encoder) == key
    *where, last = name.split(".")
    target = getattr(reference_cache, where[0]) if where else reference_cache
    monkeypatch.setattr(target, last, value)
    assert encoder_key(encoder) != key


def test_batches_that_differ_in_one_token_or_in_padding_have_other_keys(tiny_mlm, cache):
    tokens = TokenSource.from_tokenizer(load_tokenizer(tiny_mlm))
    batch = make_batch(Case(300), SPEC, tokens, np.random.default_rng(0), text_first=True)
    ids, mask = batch.input_ids.copy(), batch.attention_mask.copy()
    ids[0, 200], mask[0, 250:] = 77, 0
    types = np.zeros_like(ids)
    others = [dataclasses.replace(batch, **{name: value}) for name, value in
              (("input_ids", ids), ("attention_mask", mask), ("token_type_ids", types))]  # fmt: skip
    reference = TorchReference(load_model(tiny_mlm), task="fill-mask", pooling="mean", logits="masked", cache=cache)
    for each in (batch, *others):
        reference.run(each, ())
    assert (reference.use.batches, reference.use.cached) == (4, 0)
    assert reference.run(batch, ())["last_hidden_state"].shape == (1, 300, 32)
    assert (reference.use.batches, reference.use.cached) == (5, 1)


KEY = "0" * 64
OUTPUTS = CachedOutputs({"last_hidden_state": np.ones((1, 4, 8), np.float32)}, "2026-11-29")


def stored(cache, key=KEY):
    cache.store(key, OUTPUTS)
    (file,) = cache._folder.glob(f"{key}*")
    return file


def test_what_is_stored_is_read_back_and_is_this_users_alone(cache):
    file = stored(cache)
    found = cache.load(KEY)
    assert found.day == "2026-11-29"
    assert list(found.arrays) == ["last_hidden_state"]
    np.testing.assert_array_equal(found.arrays["last_hidden_state"], OUTPUTS.arrays["last_hidden_state"])
    assert cache.load("1" * 64) is None
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary file"


def flip_last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flip_last_byte, lambda data: data[:-100], lambda data: b"", lambda data: data[:9]])
def test_a_damaged_file_is_computed_again(cache, damage):
    file = stored(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cache.load(KEY) is None
    assert stored(cache).read_bytes() == whole and cache.load(KEY) is not None


def test_a_file_under_another_name_is_not_used(cache):
    file = stored(cache)
    file.rename(file.with_name(file.name.replace("0", "1")))
    assert cache.load("1" * 64) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_not_used(cache, mode):
    file = stored(cache)
    file.chmod(mode)
    assert cache.load(KEY) is None


def test_links_and_pipes_are_not_used(cache, tmp_path):
    file = stored(cache)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert cache.load(KEY) is None
    file.unlink()
    os.mkfifo(file)
    assert cache.load(KEY) is None


def test_the_files_of_another_user_are_not_used(cache, monkeypatch):
    stored(cache)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert cache.load(KEY) is None
    lines = []
    assert ReferenceCache(cache._folder, report=lines.append).load(KEY) is None
    assert "another user's" in lines[0]


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_is_not_used(cache, mode):
    file = stored(cache)
    file.parent.chmod(mode)
    lines = []
    opened = ReferenceCache(file.parent, report=lines.append)
    assert opened.load(KEY) is None
    assert "others can write to it" in lines[0]
    before = file.stat()
    opened.store(KEY, OUTPUTS)
    assert file.stat() == before


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    opened = ReferenceCache(tmp_path / "file" / "reference", report=lines.append)
    opened.store(KEY, OUTPUTS)
    assert opened.load(KEY) is None
    assert len(lines) == 1 and "PyTorch's outputs are not cached" in lines[0]


def refuse(number):
    def raised(*args, **options):
        raise OSError(number, os.strerror(number))

    return raised


def test_a_read_only_folder_is_read(cache, monkeypatch):
    stored(cache)
    monkeypatch.setattr(os, "utime", refuse(errno.EROFS))
    monkeypatch.setattr(reference_cache.tempfile, "mkstemp", refuse(errno.EROFS))
    opened = ReferenceCache(cache._folder)
    assert opened.load(KEY) is not None
    opened.store("1" * 64, OUTPUTS)
    assert opened.load("1" * 64) is None


def test_a_full_disk_stops_nothing_and_leaves_no_part(cache, monkeypatch):
    class Full:
        def __init__(self, descriptor, mode):
            os.close(descriptor)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        writelines = refuse(errno.ENOSPC)

    monkeypatch.setattr(reference_cache, "open", Full, raising=False)
    cache.store(KEY, OUTPUTS)
    assert list(cache._folder.iterdir()) == []


def test_the_last_gibibyte_of_the_disk_stays_free(cache, monkeypatch):
    monkeypatch.setattr(reference_cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=(1 << 30) - 1))
    cache.store(KEY, OUTPUTS)
    assert list(cache._folder.iterdir()) == []


def test_the_least_recently_used_files_are_removed(cache):
    size = stored(cache).stat().st_size
    small = ReferenceCache(cache._folder, max_bytes=3 * size)
    strange = cache._folder / "notes.txt"
    strange.write_text("the user's own")
    keys = [str(digit) * 64 for digit in range(5)]
    for age, key in enumerate(keys[:3]):
        os.utime(stored(small, key), (age + 1, age + 1))
    assert small.load(keys[0]) is not None  # used now, so no longer the oldest
    for key in keys[3:]:
        stored(small, key)
    left = {key for key in keys if (cache._folder / f"{key}.outputs").exists()}
    assert left == {keys[0], keys[3], keys[4]}
    assert strange.exists()
    ReferenceCache(cache._folder, max_bytes=size - 1).store(KEY, OUTPUTS)  # larger than the whole cache
    assert [path.name for path in cache._folder.iterdir()] == ["notes.txt"]


def test_exports_at_the_same_time_never_read_a_part(cache):
    size = stored(cache).stat().st_size
    keys, wrong = [str(digit) * 64 for digit in range(4)], []

    def work(number):
        opened = ReferenceCache(cache._folder, max_bytes=3 * size)  # they also remove each other's files
        for turn in range(40):
            key = keys[(number + turn) % 4]
            opened.store(key, OUTPUTS)
            found = opened.load(key)
            if found is not None and not (found.arrays["last_hidden_state"] == 1).all():
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(path.stat().st_size for path in cache._folder.iterdir()) <= 4 * size


def test_the_cache_is_in_the_users_cache_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_cache(None, print).store(KEY, OUTPUTS)
    assert [path.name for path in (tmp_path / "gte-deploy" / "reference").iterdir()] == [f"{KEY}.outputs"]
    assert open_cache("off", print) is None


def test_without_a_home_folder_nothing_is_cached(monkeypatch):
    monkeypatch.setattr(reference_cache, "cache_folder", refuse(errno.ENOENT))
    lines = []
    assert open_cache(None, lines.append) is None
    assert "PyTorch's outputs are not cached" in lines[0]


def test_exports_of_the_same_weights_share_the_cache(tiny_mlm, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    from gte_deploy.exporters.cli import main

    def exported(name, *options):
        words = [str(tiny_mlm), str(tmp_path / name), "--max-len", "300", "--json", "--quiet", *options]
        assert main(words) == 0
        return json.loads(capsys.readouterr().out)["parity"]["reference"]

    folder = ["--reference-cache", str(tmp_path / "cache")]
    first = exported("fp32", *folder)
    assert first["cached"] == 0 and first["batches"] > 0
    files = len(list((tmp_path / "cache").iterdir()))
    second = exported("weight", "--precision", "int8-weight", *folder)
    assert second["cached"] >= files > 0
    assert exported("off", "--reference-cache", "off") is None
    page = (tmp_path / "weight" / "report.html").read_text()
    assert f"for {second['cached']} of {second['batches']} batches" in page
