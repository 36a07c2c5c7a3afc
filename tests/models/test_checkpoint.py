import filecmp
import json
import logging
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from factories import make_checkpoint
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.models import stored_tensors
from gte_deploy.models.checkpoint import copy_tokenizer, load_model, save_model

INPUT_IDS = torch.tensor([[2, 17, 4, 201, 99, 3], [2, 8, 4, 3, 0, 0]])
ATTENTION_MASK = (INPUT_IDS != 0).long()
TASKS = ("fill-mask", "embed", "classify", "token-classify")


@torch.inference_mode()
def _outputs(model):
    return model(INPUT_IDS, attention_mask=ATTENTION_MASK)[0]


def _rewrite(folder, edit):
    """Apply `edit` to the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _assert_same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


LAYOUTS = [
    {},
    {"prefix": "gte."},
    {"prefix": ""},
    {"pack_qkv": False},
    {"shards": 3},
    {"string_booleans": True},
    {"layout": "native"},
    {"layout": "native", "prefix": ""},
    {"layout": "native", "prefix": "new.", "shards": 2},
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", LAYOUTS[1:], ids=str)
def test_every_layout_holds_the_same_model(task, variant, tmp_path):
    common = {"task": task, "type_vocab_size": 2, "num_labels": 3, "rope_scaling": {"type": "ntk", "factor": 2.0}}
    expected = load_model(make_checkpoint(tmp_path / "reference", **common))
    actual = load_model(make_checkpoint(tmp_path / "variant", **common, **variant))
    assert type(actual) is type(expected) and not actual.training
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name
    assert torch.equal(_outputs(actual), _outputs(expected))


@pytest.mark.parametrize("layout", ["original", "native"])
def test_a_stored_tied_decoder_is_one_with_the_embedding(layout, tmp_path):
    model = load_model(make_checkpoint(tmp_path / "tied", tie_stored=True, layout=layout))
    assert model.lm_head.decoder.weight is model.gte.embeddings.word_embeddings.weight
    assert torch.equal(_outputs(model), _outputs(load_model(make_checkpoint(tmp_path / "untied", layout=layout))))


def test_a_decoder_that_differs_from_the_embedding_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, tie_stored=True)

    def edit(tensors):
        tensors["lm_head.decoder.weight"][7, 5] += 1e-6

    _rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=r"lm_head\.decoder\.weight differs from new\.embeddings"):
        load_model(folder)


def test_agrees_with_transformers_own_loading(tmp_path):
    folder = make_checkpoint(tmp_path, layout="native", type_vocab_size=1, shards=2)
    assert torch.equal(_outputs(load_model(folder)), _outputs(AutoModelForMaskedLM.from_pretrained(folder)))


def _missing(tensors):
    del tensors["new.encoder.layer.1.attn_ln.weight"]


def _extra(tensors):
    tensors["new.encoder.layer.2.attn_ln.weight"] = torch.zeros(32)


def _misshapen(tensors):
    tensors["new.encoder.layer.0.attention.qkv_proj.weight"] = torch.zeros(95, 32)


def _flipped(tensors):
    name = "new.encoder.layer.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


def _twice(tensors):
    tensors["embeddings.LayerNorm.bias"] = tensors["new.embeddings.LayerNorm.bias"].clone()


def _quantised(tensors):
    tensors["lm_head.dense.weight"] = tensors["lm_head.dense.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            _missing,
            r"1 missing: layers\.1\.post_attention_layernorm\.weight \(encoder\.layer\.1\.attn_ln\.weight",
        ),
        (_extra, r"1 unexpected: new\.encoder\.layer\.2\.attn_ln\.weight"),
        (
            _misshapen,
            r"1 misshapen: new\.encoder\.layer\.0\.attention\.qkv_proj\.weight is \[95, 32\], expected \[96,",
        ),
        (_flipped, r"1 misshapen: new\.encoder\.layer\.0\.mlp\.down_proj\.weight is \[64, 32\], expected \[32, 64\]"),
        (_twice, r"1 stored twice: .*embeddings\.LayerNorm\.bias"),
        (_quantised, r"1 of an unknown precision: lm_head\.dense\.weight is I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(edit, said, tmp_path):
    folder = make_checkpoint(tmp_path)
    load_model(folder)
    _rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


def test_all_problems_are_told_at_once_and_long_lists_are_cut(tmp_path):
    folder = make_checkpoint(tmp_path)

    def edit(tensors):
        _misshapen(tensors)
        for name in [name for name in tensors if ".layer.1." in name]:
            tensors["stray." + name] = tensors.pop(name)

    _rewrite(folder, edit)
    with pytest.raises(CheckpointError, match=r"11 unexpected: .* and 1 more; 16 missing: .* and 6 more") as caught:
        load_model(folder)
    assert "1 misshapen" in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "intermediate_size", "type_vocab_size"])
def test_a_config_of_another_size_is_refused(name, tmp_path):
    folder = make_checkpoint(tmp_path, type_vocab_size=1)
    config = json.loads((folder / "config.json").read_text())
    config[name] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="are not those of GteForMaskedLM"):
        load_model(folder)


def test_stored_buffers_that_the_config_determines_are_tolerated(tmp_path):
    folder = make_checkpoint(tmp_path)
    expected = _outputs(load_model(folder))

    def edit(tensors):
        tensors["new.embeddings.position_ids"] = torch.arange(8192)[None]
        tensors["new.embeddings.rotary_emb.inv_freq"] = torch.zeros(4)

    _rewrite(folder, edit)
    assert torch.equal(_outputs(load_model(folder)), expected)


def test_an_encoder_leaves_the_masked_lm_head_and_says_so(tmp_path, caplog):
    folder = make_checkpoint(tmp_path, tie_stored=True)
    with caplog.at_level(logging.INFO, logger="gte_deploy.models.checkpoint"):
        encoder = load_model(folder, task="embed")
    assert "lm_head.dense.weight" in caplog.text and encoder.pooler is None
    with torch.inference_mode():
        expected = load_model(folder).gte(INPUT_IDS, attention_mask=ATTENTION_MASK).last_hidden_state
    assert torch.equal(_outputs(encoder), expected)


def test_an_encoder_does_not_leave_a_sequence_classifier(tmp_path):
    folder = make_checkpoint(tmp_path, task="classify")
    with pytest.raises(CheckpointError, match=r"2 unexpected: classifier\.bias, classifier\.weight"):
        load_model(folder, task="embed")


@pytest.mark.parametrize("layout", ["original", "native"])
def test_an_encoder_keeps_its_own_pooler(layout, tmp_path):
    folder = make_checkpoint(tmp_path / "a", task="embed", with_pooler=True, layout=layout)
    model = load_model(folder)
    assert model.pooler is not None
    save_model(model, tmp_path / "b", layout=layout)
    _assert_same_tensors(folder / "model.safetensors", tmp_path / "b" / "model.safetensors")


@pytest.mark.parametrize(("task", "missing"), [("fill-mask", "lm_head.dense"), ("classify", "classifier.weight")])
def test_a_head_that_is_not_stored_is_missing(task, missing, tmp_path):
    folder = make_checkpoint(tmp_path, task="embed")
    with pytest.raises(CheckpointError, match=rf"missing: .*{missing}"):
        load_model(folder, task=task)


def test_an_unknown_task_is_refused(tiny_mlm):
    with pytest.raises(CheckpointError, match="task is 'rank'; expected one of fill-mask"):
        load_model(tiny_mlm, task="rank")


def test_what_config_refuses_is_not_loaded(tmp_path):
    folder = make_checkpoint(tmp_path, rope_scaling={"type": "yarn", "factor": 2.0})
    with pytest.raises(ConfigError, match="rope_scaling"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_never_opened(name, tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"only {name}, which are pickles"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(keep, tmp_path):
    folder = make_checkpoint(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(folder)


def _lose_a_shard(folder, index):
    (folder / "model-00002-of-00002.safetensors").unlink()


def _leave_the_folder(folder, index):
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../other/model.safetensors"


def _move_a_tensor(folder, index):
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "model-00002-of-00002.safetensors"


def _empty_the_map(folder, index):
    index["weight_map"] = {}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_lose_a_shard, "names the shard 'model-00002-of-00002.safetensors'"),
        (_leave_the_folder, "names the shard '../other/model.safetensors'"),
        (_move_a_tensor, "does not hold what model.safetensors.index.json says"),
        (_empty_the_map, "has no weight_map"),
    ],
)
def test_a_broken_index_is_refused(edit, said, tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", shards=2)
    make_checkpoint(tmp_path / "other")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(folder, index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_precision_is_cast_and_rope_stays_float32(stored, dtype, tmp_path):
    full = load_model(make_checkpoint(tmp_path / "full"))
    model = load_model(make_checkpoint(tmp_path / stored, dtype=stored), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.config.dtype == dtype
    # A module cast as a whole would round the frequencies: bfloat16 has 8 bits for angles of up to 8,192 turns.
    assert torch.equal(model.gte.rotary_emb.inv_freq, full.gte.rotary_emb.inv_freq)
    expected = full.lm_head.dense.weight.to(getattr(torch, stored)).to(dtype)
    assert torch.equal(model.lm_head.dense.weight, expected)


def test_the_model_does_not_map_the_file(tmp_path):
    folder = make_checkpoint(tmp_path)
    model = load_model(folder)
    expected = _outputs(model)
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    assert torch.equal(_outputs(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation(implementation, tiny_mlm):
    model = load_model(tiny_mlm, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(_outputs(model), _outputs(load_model(tiny_mlm)), rtol=0, atol=1e-4)


def test_gradients_flow_to_every_parameter(tiny_mlm):
    model = load_model(tiny_mlm).train()
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["mlm", "embed_ntk", "rerank"])
def test_golden_round_trip_is_bitwise(name, golden_dir, tmp_path):
    save_model(load_model(golden_dir / name), tmp_path / "native", layout="native")
    save_model(load_model(tmp_path / "native"), tmp_path / "original", layout="original")
    assert filecmp.cmp(golden_dir / name / "model.safetensors", tmp_path / "original" / "model.safetensors", False)
    folders = (tmp_path / "original", golden_dir / name)
    written, published = (json.loads((folder / "config.json").read_text()) for folder in folders)
    for config in (written, published):
        del config["auto_map"]
    assert written == published


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("first", ["original", "native"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_is_bitwise(task, first, dtype, tmp_path):
    source = make_checkpoint(tmp_path / "source", task=task, layout=first, dtype=dtype, num_labels=3, type_vocab_size=1)
    other = {"original": "native", "native": "original"}[first]
    save_model(load_model(source), tmp_path / "other", layout=other, dtype=getattr(torch, dtype))
    save_model(load_model(tmp_path / "other"), tmp_path / "again", layout=first, dtype=getattr(torch, dtype))
    _assert_same_tensors(source / "model.safetensors", tmp_path / "again" / "model.safetensors")
    key = {"original": "torch_dtype", "native": "dtype"}[first]
    assert json.loads((tmp_path / "again" / "config.json").read_text())[key] == dtype


@pytest.mark.parametrize(
    ("task", "auto"),
    [("fill-mask", AutoModelForMaskedLM), ("embed", AutoModel), ("classify", AutoModelForSequenceClassification)],
)
@pytest.mark.parametrize("mixed_b", [None, 0.5])
def test_native_layout_is_transformers_own(task, auto, mixed_b, tmp_path):
    scaling = {"type": "ntk", "factor": 4.0} | ({} if mixed_b is None else {"mixed_b": mixed_b})
    model = load_model(make_checkpoint(tmp_path / "original", task=task, rope_scaling=scaling))
    save_model(model, tmp_path / "native", layout="native", max_shard_size="60KB")
    theirs, report = auto.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    # Equal weights at other addresses may be summed in another order; longrope also computes the frequencies of
    # mixed_b in float32, we in float64.
    torch.testing.assert_close(_outputs(theirs), _outputs(model), rtol=0, atol=1e-6 if mixed_b is None else 1e-4)
    assert torch.equal(_outputs(load_model(tmp_path / "native")), _outputs(model))


@pytest.mark.parametrize("layout", ["original", "native"])
def test_sharded_save(layout, tmp_path, tiny_mlm):
    model = load_model(tiny_mlm)
    save_model(model, tmp_path, layout=layout, max_shard_size=50_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(_outputs(load_model(tmp_path)), _outputs(model))
    with safe_open(shards[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saving_over_older_weights_leaves_none_of_them(tmp_path, tiny_mlm, tiny_embed):
    save_model(load_model(tiny_mlm), tmp_path, layout="native", max_shard_size=50_000)
    copy_tokenizer(tiny_mlm, tmp_path)
    model = load_model(tiny_embed)
    save_model(model, tmp_path, layout="original")
    assert sorted(file.name for file in tmp_path.glob("model*")) == ["model.safetensors"]
    assert (tmp_path / "tokenizer.json").exists()
    assert torch.equal(_outputs(load_model(tmp_path)), _outputs(model))


def test_an_interrupted_save_is_refused_on_loading(tmp_path, tiny_mlm, monkeypatch):
    model = load_model(tiny_mlm)
    save_model(model, tmp_path, layout="native")

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(stored_tensors, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.\w+\.tmp cannot be written: no space"):
        save_model(model, tmp_path, layout="original")
    assert not list(tmp_path.glob(".*")), "the file aside is removed"
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_model(tmp_path)


def test_saved_files_are_readable_by_others(tmp_path, tiny_mlm):
    save_model(load_model(tiny_mlm), tmp_path, layout="original", max_shard_size=50_000)
    copy_tokenizer(tiny_mlm, tmp_path)
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    assert len(files) > 6
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


@pytest.mark.parametrize(("model", "layout"), [(torch.nn.Linear(1, 1), "native"), (None, "gguf")])
def test_what_cannot_be_saved_is_refused(model, layout, tmp_path, tiny_mlm):
    with pytest.raises(CheckpointError, match="cannot save a"):
        save_model(model or load_model(tiny_mlm), tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_copy_tokenizer(tmp_path, tiny_mlm):
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}
    assert {file.name for file in copy_tokenizer(tiny_mlm, tmp_path / "new")} == names
    for name in names:
        assert filecmp.cmp(tiny_mlm / name, tmp_path / "new" / name, False)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        copy_tokenizer(tmp_path, tmp_path / "other")
