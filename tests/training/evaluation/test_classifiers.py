"""The classifiers that GLUE fine-tunes: which weights they start with, and that they are those of transformers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, ElectraConfig, ElectraForMaskedLM

from every_family import KINDS, TRANSFORMERS_KINDS, make_masked_lm
from factories import make_checkpoint, write_safetensors, write_tokenizer
from family_checkpoints import make_family_checkpoint
from gte_deploy.core.errors import CheckpointError, ConfigError
from gte_deploy.models.checkpoint import load_model, save_model
from gte_deploy.models.families import FAMILIES, bert, family_of_type
from gte_deploy.training.evaluation.classifiers import open_encoder, run_without_padding, start_from
from gte_deploy.training.evaluation.finetuning import Encoded, fine_tune, predict
from gte_deploy.training.evaluation.glue_tasks import Examples
from gte_deploy.training.options import Protocol

TEXTS: list[tuple[str, ...]] = [
    ("the river is old", "the city"),
    ("old city",),
    ("the river and the old city", "is old"),
]
LABELS = np.array([0, 1, 2])


@pytest.fixture(params=TRANSFORMERS_KINDS)
def transformers_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A masked-LM checkpoint that transformers loads by itself."""
    return make_masked_lm(tmp_path / "mlm", request.param)


@pytest.fixture(params=KINDS)
def family_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A masked-LM checkpoint of any family."""
    return make_masked_lm(tmp_path / "mlm", request.param)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def test_these_are_all_families(tmp_path: Path):
    made = {open_encoder(make_masked_lm(tmp_path / kind, kind)).description.family.model_types for kind in KINDS}
    assert made == {family_of_type(name).model_types for name in FAMILIES}


# --- which weights ----------------------------------------------------------------------------------------------------


def test_the_classifier_is_transformers_own(transformers_folder: Path):
    """Its encoder has the weights that transformers loads; with the head of transformers the logits are the same."""
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        transformers_folder, num_labels=3, dtype=torch.float32, output_loading_info=True
    )
    theirs, new = loaded[0], set(loaded[1]["missing_keys"])
    encoder = open_encoder(transformers_folder)
    ours: Any = encoder.classifier(num_labels=3, seed=0)
    assert type(ours) is type(theirs)
    prefix, state = f"{theirs.base_model_prefix}.", theirs.state_dict()
    assert "classifier.weight" in new or "classifier.out_proj.weight" in new
    assert all(name.startswith("classifier.") or ".pooler." in name for name in new), new
    for name, tensor in ours.state_dict().items():
        if name.startswith(prefix) and name not in new:
            assert torch.equal(tensor, state[name]), name
    ours.load_state_dict({name: state[name] for name in new}, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(transformers_folder)
    for text in TEXTS:
        data = Encoded.of(Examples([text], LABELS[:1]), encoder=encoder, max_length=16)
        inputs = tokenizer(*text, truncation="longest_first", max_length=16, return_tensors="pt")
        with torch.inference_mode():
            np.testing.assert_allclose(predict(ours, data), theirs.eval()(**inputs).logits, atol=2e-5)


def test_every_weight_of_the_encoder_is_the_checkpoints(family_folder: Path):
    encoder = load_model(family_folder, task="embed")
    model: Any = open_encoder(family_folder).classifier(num_labels=3, seed=0)
    state = {name: tensor for name, tensor in model.base_model.state_dict().items() if not name.startswith("pooler.")}
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("pooler.")}
    assert state.keys() == own.keys() and len(own) > 20
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("layout", ["original", "native"])
def test_a_gte_classifier_has_the_checkpoints_encoder_and_a_seeded_head(tmp_path: Path, layout):
    folder = make_checkpoint(tmp_path / "mlm", layout=layout, type_vocab_size=2)
    opened = open_encoder(folder)
    first, second, other = (opened.classifier(num_labels=3, seed=seed) for seed in (0, 0, 1))
    assert type(first) is transformers.GteForSequenceClassification
    encoder = load_model(folder, task="embed").state_dict()
    state = first.state_dict()
    assert all(torch.equal(state[f"gte.{name}"], tensor) for name, tensor in encoder.items())
    assert state["classifier.weight"].shape == (3, 32)
    new = [name for name in state if not name.startswith("gte.") or ".pooler." in name]
    assert all(torch.equal(state[name], second.state_dict()[name]) for name in new)
    assert not torch.equal(state["classifier.weight"], other.state_dict()["classifier.weight"])
    assert not torch.equal(state["gte.pooler.dense.weight"], other.state_dict()["gte.pooler.dense.weight"])


def test_both_layouts_give_the_same_classifier(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "mlm")
    save_model(load_model(folder), tmp_path / "native", layout="native")
    write_tokenizer(tmp_path / "native")
    first, second = (
        open_encoder(path).classifier(num_labels=2, seed=0).state_dict() for path in (folder, tmp_path / "native")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stored_pooler_is_kept(tmp_path: Path):
    """BERT's pooler was pretrained: fine-tuning starts from it."""
    folder = make_family_checkpoint(tmp_path / "bert", "bert", "embed")
    pooler = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    model: Any = open_encoder(folder).classifier(num_labels=2, seed=0)
    assert torch.equal(model.bert.pooler.dense.weight, pooler)


def test_a_pooler_that_the_class_lacks_is_left_out(tmp_path: Path):
    folder = make_family_checkpoint(tmp_path / "roberta", "roberta", "embed")
    assert "pooler.dense.weight" in load_file(folder / "model.safetensors")
    model = open_encoder(folder).classifier(num_labels=2, seed=0)
    assert not any(".pooler." in name for name in model.state_dict())


def test_a_damaged_encoder_is_refused(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "mlm")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("new.encoder.layer.1.mlp.down_proj.weight")
    write_safetensors(folder, tensors)
    with pytest.raises(CheckpointError, match="down_proj"):
        open_encoder(folder).classifier(num_labels=2, seed=0)


def test_a_family_without_a_class_for_classify_is_refused_by_name(tmp_path: Path, monkeypatch):
    classes = {task: name for task, name in bert.BERT.classes.items() if task != "classify"}
    monkeypatch.setattr(bert, "BERT", replace(bert.BERT, classes=classes))
    with pytest.raises(ConfigError, match="model_type 'bert' have no class for classify; there are fill-mask"):
        open_encoder(make_family_checkpoint(tmp_path / "bert", "bert"))


# --- other architectures ----------------------------------------------------------------------------------------------

ELECTRA = {"vocab_size": 256, "hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ELECTRA |= {"intermediate_size": 48, "max_position_embeddings": 140}


@pytest.mark.parametrize("types", [1, 2])
def test_encoders_that_transformers_knows_run_too(tmp_path: Path, types):
    assert "electra" not in FAMILIES
    ElectraForMaskedLM(ElectraConfig(**ELECTRA, type_vocab_size=types)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    encoder = open_encoder(tmp_path)
    data = Encoded.of(Examples([("w7 w8", "w9"), ("w7", "w8")], LABELS[:2]), encoder=encoder, max_length=16)
    assert (data.type_ids is not None) == (types == 2)
    assert predict(encoder.classifier(num_labels=2, seed=0), data).shape == (2, 2)


def test_a_half_filled_encoder_of_another_architecture_is_refused(tmp_path: Path):
    ElectraForMaskedLM(ElectraConfig(**ELECTRA)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("electra.encoder.layer.1.output.dense.weight")
    write_safetensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="layer.1.output.dense.weight"):
        open_encoder(tmp_path).classifier(num_labels=2, seed=0)


def test_an_unknown_architecture_is_refused_and_remote_code_not_run(tmp_path: Path):
    config = {
        "model_type": "mystery",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"},
    }
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="remote code is never run"):
        open_encoder(tmp_path).classifier(num_labels=2, seed=0)
    assert not (tmp_path / "ran").exists()


# --- the start from another classifier --------------------------------------------------------------------------------


def test_start_from_keeps_all_but_the_last_layer(tiny_mlm: Path):
    opened = open_encoder(tiny_mlm)
    source, target = (opened.classifier(num_labels=n, seed=n) for n in (3, 2))
    fresh = target.classifier.weight.detach().clone()
    start_from(target, {name: tensor + 1 for name, tensor in source.state_dict().items()})
    assert torch.equal(target.classifier.weight, fresh)
    assert torch.equal(target.gte.pooler.dense.weight, source.gte.pooler.dense.weight + 1)
    assert torch.equal(target.gte.layers[1].mlp.down_proj.weight, source.gte.layers[1].mlp.down_proj.weight + 1)
    with pytest.raises(CheckpointError, match="gte.pooler.dense.bias"):
        start_from(target, {k: v for k, v in source.state_dict().items() if k != "gte.pooler.dense.bias"})


def test_start_from_fits_every_family(family_folder: Path):
    opened = open_encoder(family_folder)
    source, target = (opened.classifier(num_labels=n, seed=n) for n in (3, 1))
    start_from(target, {name: tensor + 1 for name, tensor in source.state_dict().items()})
    kept = [name for name, tensor in target.state_dict().items() if tensor.shape == source.state_dict()[name].shape]
    assert all(torch.equal(target.state_dict()[name], source.state_dict()[name] + 1) for name in kept)
    assert len(target.state_dict()) - len(kept) == 2  # weight and bias of the last layer


# --- padding ----------------------------------------------------------------------------------------------------------


def test_without_padding_logits_and_gradients_are_those_of_padded_rows(family_folder: Path):
    encoder = open_encoder(family_folder)
    if not encoder.description.family.runs_packed:
        assert "does not compute alibi positions" in str(encoder.keeps_padding_because())
        return
    # In float64, because the gradient of a key's bias is 0 but for rounding.
    padded = without_dropout(encoder.classifier(num_labels=3, seed=0)).double().train()
    packed = copy.deepcopy(padded)
    run_without_padding(packed)
    data = Encoded.of(Examples(TEXTS, LABELS), encoder=encoder, max_length=16)
    inputs, labels = data.batch(np.arange(3), torch.device("cpu"))
    assert (inputs["attention_mask"] == 0).any()
    for model in (padded, packed):
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
    np.testing.assert_allclose(packed(**inputs).logits.detach(), padded(**inputs).logits.detach(), atol=1e-10)
    assert packed.state_dict().keys() == padded.state_dict().keys()
    for (name, ours), theirs in zip(packed.named_parameters(), padded.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
            continue
        assert (ours.grad - theirs.grad).norm() < 1e-8 * theirs.grad.norm().clamp(min=1e-6), name


def test_dropout_in_attention_keeps_padding(tmp_path: Path):
    folder = make_family_checkpoint(tmp_path / "a", "bert")
    assert "attention_probs_dropout_prob is 0.1" in str(open_encoder(folder).keeps_padding_because())
    free = make_family_checkpoint(tmp_path / "b", "bert", attention_probs_dropout_prob=0.0)
    assert open_encoder(free).keeps_padding_because() is None


# --- a step of training -----------------------------------------------------------------------------------------------


def test_three_steps_are_those_of_a_plain_loop_on_transformers(transformers_folder: Path):
    """transformers' classifier with the same weights, its tokenizer's own batch, AdamW, and a schedule by hand.

    In float64: in float32 AdamW makes whole steps of gradients that are 0 but for rounding.
    """
    encoder = open_encoder(transformers_folder)
    ours: Any = without_dropout(encoder.classifier(num_labels=3, seed=0)).double()
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(
        transformers_folder, num_labels=3, dtype=torch.float32
    )
    theirs = without_dropout(theirs).double().train()
    theirs.load_state_dict(ours.state_dict())
    pairs: list[tuple[str, ...]] = [("the river is old", "the city"), ("old city", "river"), ("the old", "is old")]
    protocol = Protocol(max_length=8, batch_size=3, learning_rate=1e-3, epochs=3, warmup_ratio=0.34)
    data = Encoded.of(Examples(pairs, LABELS), encoder=encoder, max_length=8)
    fine_tune(ours, data, protocol=protocol, seed=0)

    tokenizer = transformers.AutoTokenizer.from_pretrained(transformers_folder)
    inputs = tokenizer(
        *map(list, zip(*pairs, strict=True)),
        truncation="longest_first",
        max_length=8,
        padding=True,
        return_tensors="pt",
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, weight_decay=0.0)
    # Two steps of warm-up (ceil(0.34 * 3)) from 0, then a linear decay to 0 at step 3.
    for rate in (0.0, 0.5e-3, 1e-3):
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.nn.functional.cross_entropy(theirs(**inputs).logits.float(), torch.from_numpy(LABELS))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-6, err_msg=name)
    assert max((a.detach() - before[name]).abs().max() for name, a in ours.named_parameters()) > 1e-3
