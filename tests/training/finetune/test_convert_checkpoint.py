"""gte-train convert: the same weights in another layout and dtype, read by the libraries alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

from factories import SPELLING, make_checkpoint
from gte_deploy.core.exit_codes import EXISTS, OK
from gte_deploy.models.checkpoint import load_model
from gte_deploy.training.cli import main


def test_native_float32_is_read_by_transformers_alone(half_checkpoint, tmp_path, capsys):
    assert main(["convert", str(half_checkpoint), str(tmp_path / "native")]) == OK
    assert capsys.readouterr().out == f"{tmp_path / 'native'}\n"
    assert json.loads((tmp_path / "native" / "config.json").read_text())["dtype"] == "float32"
    found = AutoModelForMaskedLM.from_pretrained(tmp_path / "native").state_dict()
    for name, tensor in load_model(half_checkpoint).state_dict().items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name
    assert main(["convert", str(half_checkpoint), str(tmp_path / "native")]) == EXISTS


def test_back_to_the_original_layout_is_bitwise(half_checkpoint, tmp_path):
    assert main(["convert", str(half_checkpoint), str(tmp_path / "native"), "--quiet"]) == OK
    back = ["convert", str(tmp_path / "native"), str(tmp_path / "back"), "--layout", "original", "--dtype", "float16"]
    assert main(back) == OK
    before, after = (load_file(folder / "model.safetensors") for folder in (half_checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_embedding_model_keeps_its_modules_and_prompts(pooling, tmp_path):
    source = make_checkpoint(
        tmp_path / "source", task="embed", vocab=SPELLING, pooling=pooling, normalize=True, prompts={"query": "the "}
    )
    assert main(["convert", str(source), str(tmp_path / "native")]) == OK
    model = SentenceTransformer(str(tmp_path / "native"), device="cpu")
    assert model.prompts["query"] == "the " and model[1].pooling_mode == pooling and len(model) == 3
    import gte_deploy

    with gte_deploy.load(source, backend="torch") as reference:
        expected = torch.from_numpy(reference.encode(["the old city", "a river"]))
    found = torch.from_numpy(model.encode(["the old city", "a river"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
