"""`gte-export convert`: another layout keeps every weight, and other libraries give the same answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gte_deploy.core.errors import CheckpointError, ConfigError, ExportError, InputError
from gte_deploy.core.exit_codes import FAILURE, OK
from gte_deploy.exporters.cli import main
from gte_deploy.exporters.conversion import convert
from gte_deploy.models import builtin_path
from runtime_models import make_word_checkpoint

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

TEXTS = ["the king walked to the river", "paris is a city"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors_torch.load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_there_and_back_is_bit_for_bit(tmp_path, capsys):
    source = builtin_path()
    assert main(["convert", str(source), str(tmp_path / "original"), "--layout", "original", "--json"]) == OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["dtype"] == "float16" and facts["model_class"] == "GteForMaskedLM" and facts["left_out"] == []
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    # What text-embeddings-inference reads of the original layout.
    assert config["model_type"] == "new" and config["architectures"] == ["NewForMaskedLM"]
    assert config["position_embedding_type"] == "rope" and config["layer_norm_type"] == "layer_norm"
    assert any(name.startswith("new.encoder.layer.0.attention.qkv_proj") for name in weights(tmp_path / "original"))

    assert main(["convert", str(tmp_path / "original"), str(tmp_path / "native"), "--layout", "native"]) == OK
    assert same(weights(tmp_path / "native"), weights(source))
    again, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "native", source))
    assert {**again, "transformers_version": None} == {**before, "transformers_version": None}
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors", "__pycache__"):
            assert (tmp_path / "native" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_published_checkpoint_becomes_one_that_transformers_and_sentence_transformers_load(tiny_embed, tmp_path):
    """The original layout with NTK scaling, CLS pooling and code; both libraries then need no remote code."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel, AutoTokenizer, GteModel

    import gte_deploy

    source = shutil.copytree(tiny_embed, tmp_path / "source")
    for name in ("modeling.py", "pytorch_model.bin", "LICENSE", "onnx/model.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    result = convert(source, tmp_path / "native", layout="native")
    assert set(result.left_out) == {"modeling.py", "pytorch_model.bin", "onnx/model.json"}
    assert (tmp_path / "native" / "LICENSE").is_file()

    loaded = AutoModel.from_pretrained(tmp_path / "native").eval()
    assert type(loaded) is GteModel
    inputs = AutoTokenizer.from_pretrained(tmp_path / "native")(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        embeddings = loaded(**inputs).last_hidden_state[:, 0].numpy()
    with gte_deploy.load(source, backend="torch") as model:
        wanted = model.encode(TEXTS)
    np.testing.assert_allclose(embeddings, wanted, rtol=0, atol=1e-5)
    library = sentence_transformers.SentenceTransformer(str(tmp_path / "native"), device="cpu")
    np.testing.assert_allclose(library.encode(TEXTS), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["embed", "classify", "token-classify"])
def test_every_head_survives_both_ways(tmp_path, task):
    options = {"num_labels": 3} if task != "embed" else {"pooling": "mean", "prompts": {"query": "the query: "}}
    source = make_word_checkpoint(tmp_path / "source", task=task, **options)
    convert(source, tmp_path / "original", layout="original")
    convert(tmp_path / "original", tmp_path / "native", layout="native")
    assert same(weights(tmp_path / "native"), weights(source))


def test_the_type_is_kept_or_chosen(tmp_path):
    source = make_word_checkpoint(tmp_path / "source")
    kept = convert(source, tmp_path / "kept", layout="original")
    assert kept.dtype == "float32"
    chosen = convert(source, tmp_path / "half", layout="native", dtype="bfloat16")
    assert chosen.dtype == "bfloat16"
    assert all(
        torch.equal(tensor, weights(source)[name].bfloat16()) for name, tensor in weights(tmp_path / "half").items()
    )
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"

    name = next(name for name in weights(source) if name.endswith("word_embeddings.weight"))
    changed = {**weights(source), name: weights(source)[name].half()}
    safetensors_torch.save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="F16, F32.*--dtype"):
        convert(source, tmp_path / "mixed", layout="native")
    assert convert(source, tmp_path / "mixed", layout="native", dtype="float32").dtype == "float32"


def test_values_that_the_type_cannot_hold_are_refused(tmp_path):
    source = make_word_checkpoint(tmp_path / "source")
    name = next(name for name in weights(source) if name.endswith("word_embeddings.weight"))
    large = {**weights(source), name: weights(source)[name] + 1e6}
    safetensors_torch.save_file(large, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"in float16, .*word_embeddings.weight"):
        convert(source, tmp_path / "half", layout="native", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_what_the_layout_cannot_express_is_refused_by_name(tmp_path, capsys):
    source = make_word_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="dynamic"):
        convert(source, tmp_path / "out", layout="original")
    assert main(["convert", str(source), str(tmp_path / "out"), "--layout", "original"]) == FAILURE
    assert "dynamic" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_refused_leaves_nothing(tmp_path):
    source = make_word_checkpoint(tmp_path / "source")
    with pytest.raises(InputError, match="layout is 'flat'"):
        convert(source, tmp_path / "out", layout="flat")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not replaced"):
        convert(source, full, layout="native")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        convert(source, tmp_path / "out", layout="native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
