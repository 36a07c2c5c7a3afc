"""Fine-tuning end to end: the loss falls, what is saved is float32 and answers alike in both libraries, runs go on."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

import gte_deploy
from gte_deploy.core.errors import ConfigError, InputError, NonFiniteError
from gte_deploy.training.finetune.opening import open_initial, open_trained
from gte_deploy.training.finetune.recipe import HardNegatives
from gte_deploy.training.finetune.train import fine_tune_on_pairs, measure
from gte_deploy.training.log import read_log

LIBRARY = {"embed": SentenceTransformer, "rerank": CrossEncoder, "sparse": SparseEncoder}
PAIRS = [("what is green river", "the river is green and old"), ("what is tall city", "the dog is cold and old")]
TEXTS = [text for pair in PAIRS for text in pair]


def run(recipe, pairs_file, output, **rest):
    return fine_tune_on_pairs(recipe, data=[str(pairs_file)], output=output, device="cpu", **rest)


def recipe_of(make_finetune, kind, **fields):
    mined = {"hard_negatives": HardNegatives(count=2, depth=20)} if kind == "rerank" else {}
    loss = {"name": "contrastive", "temperature": 0.1 if kind == "embed" else 1.0, "mini_batch_size": 4}
    return make_finetune(kind, loss=None if kind == "rerank" else loss, **mined, **fields)


@pytest.fixture(scope="module", params=list(LIBRARY))
def trained(request, make_finetune, pairs_file, tmp_path_factory):
    """A kind, its recipe, the folder of a finished run, and the result."""
    output = tmp_path_factory.mktemp("runs") / request.param
    recipe = recipe_of(make_finetune, request.param, steps=20, saved_max_length=64)
    return request.param, recipe, output, run(recipe, pairs_file, output, eval_data=[str(pairs_file)])


def test_the_loss_falls_and_embeddings_find_better(trained):
    kind, _, output, result = trained
    losses = [record["loss"] for record in read_log(output / "log.jsonl") if "loss" in record]
    assert len(losses) == 20 and result.after["loss"] < 0.98 * losses[0]
    assert result.after["ndcg@10"] > result.before["ndcg@10"] or kind != "embed"
    assert json.loads((output / "results.json").read_text())["after"] == result.after
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_saved_is_float32_and_its_card_says_so(trained):
    kind, recipe, _, result = trained
    stored = load_file(result.model / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert json.loads((result.model / "config.json").read_text())["dtype"] == "float32"
    card = (result.model / "README.md").read_text()
    assert "**Weights:** float32, whatever the starting checkpoint stores" in card
    assert f"`{recipe.model.rpartition('/')[2]}`" in card and "`pairs.jsonl`, 32 rows" in card
    assert f"| ndcg@10 | {result.before['ndcg@10']:.4f} | {result.after['ndcg@10']:.4f} |" in card
    assert recipe.model not in card, "the card names a path of this machine"
    assert not list(result.model.rglob("*.bin")), "a pickle"
    assert LIBRARY[kind](str(result.model), device="cpu").max_seq_length == 64


def answers_of_both(kind, ours, theirs):
    """The answers of gte_deploy and of sentence-transformers to the same texts."""
    if kind == "rerank":
        return ours.predict(PAIRS), theirs.predict(PAIRS)
    if kind == "embed":
        return ours.encode(TEXTS), theirs.encode(TEXTS)
    expected = theirs.encode(TEXTS).to_dense().numpy()
    return np.stack([each.to_dense() for each in ours.encode_sparse(TEXTS)])[:, : expected.shape[1]], expected


def test_both_libraries_answer_alike(trained):
    kind, _, _, result = trained
    theirs = LIBRARY[kind](str(result.model), device="cpu")
    with gte_deploy.load(result.model, backend="torch") as ours:
        found, expected = answers_of_both(kind, ours, theirs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    opened_kind, opened = open_trained(str(result.model), device="cpu")
    again = opened.predict(PAIRS) if kind == "rerank" else opened.encode(TEXTS)
    again = again.to_dense().numpy() if kind == "sparse" else again
    assert opened_kind == kind
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_gte_export_takes_it(trained, tmp_path):
    """The graphs of ONNX Runtime answer as sentence-transformers does."""
    from gte_deploy.exporters.cli import main

    kind, _, _, result = trained
    assert main([str(result.model), str(tmp_path / "bundle"), "--max-len", "32", "--quiet"]) == 0
    theirs = LIBRARY[kind](str(result.model), device="cpu")
    with gte_deploy.load(tmp_path / "bundle", backend="onnx") as ours:
        found, expected = answers_of_both(kind, ours, theirs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_finished_run_is_returned_and_another_is_refused(trained, pairs_file, tmp_path, make_finetune):
    kind, recipe, output, result = trained
    assert run(recipe, pairs_file, output) == result
    other = recipe_of(make_finetune, kind, steps=20, saved_max_length=64, learning_rate=1e-3)
    with pytest.raises(InputError, match="differs in learning_rate"):
        run(other, pairs_file, output)
    (tmp_path / "other.jsonl").write_text("".join(reversed(pairs_file.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match="differs in data"):
        run(recipe, tmp_path / "other.jsonl", output)


def test_a_stopped_run_goes_on_to_the_same_weights(make_finetune, pairs_file, tmp_path, monkeypatch):
    recipe = recipe_of(make_finetune, "embed", steps=6)
    whole = run(recipe, pairs_file, tmp_path / "whole")

    from gte_deploy.training.finetune import log

    on_log = log.RunCallback.on_log

    def stop_at_3(self, args, state, control, logs=None, **rest):
        on_log(self, args, state, control, logs, **rest)
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(log.RunCallback, "on_log", stop_at_3)
        stopped = run(recipe, pairs_file, tmp_path / "stopped")
    assert stopped.model is None and 3 <= stopped.steps < 6
    finished = run(recipe, pairs_file, tmp_path / "stopped")
    assert finished.steps == 6
    expected, found = (load_file(each.model / "model.safetensors") for each in (whole, finished))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    steps = [record["step"] for record in read_log(tmp_path / "stopped" / "log.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_killed_before_it_wrote_its_results_goes_on(make_finetune, pairs_file, tmp_path):
    """The model was renamed into its place already, and a newer checkpoint is there in part."""
    recipe = recipe_of(make_finetune, "embed", steps=2)
    whole = run(recipe, pairs_file, tmp_path / "out")
    expected = (whole.model / "model.safetensors").read_bytes()
    (tmp_path / "out" / "results.json").unlink()
    torn = tmp_path / "out" / "checkpoints" / "checkpoint-9"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    assert run(recipe, pairs_file, tmp_path / "out").model == whole.model
    assert (whole.model / "model.safetensors").read_bytes() == expected
    assert run(recipe, pairs_file, tmp_path / "out").model == whole.model


def test_a_loss_that_is_not_finite_ends_the_run(make_finetune, pairs_file, tmp_path):
    recipe = recipe_of(make_finetune, "embed", learning_rate=1e30, clip_norm=None, warmup_ratio=0.0)
    with pytest.raises(NonFiniteError, match=r"step \d: .*nan. Lower learning_rate"):
        run(recipe, pairs_file, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_prompts_are_trained_with_and_kept(make_finetune, pairs_file, tmp_path):
    recipe = recipe_of(make_finetune, "embed", steps=1, prompts={"query": "what ", "document": "the "})
    plain = recipe_of(make_finetune, "embed", steps=1)
    results = [run(each, pairs_file, tmp_path / str(i)) for i, each in enumerate((recipe, plain))]
    assert SentenceTransformer(str(results[0].model)).prompts == {"query": "what ", "document": "the "}
    losses = [read_log(tmp_path / str(i) / "log.jsonl")[0]["loss"] for i in range(2)]
    assert losses[0] != losses[1]


def test_scores_are_learnt_and_measured_by_their_order(make_finetune, tmp_path):
    rows = [(f"what is {a}", f"the {b} is old", float(a == b)) for a in ("river", "city") for b in ("river", "city")]
    text = "".join(json.dumps(dict(zip(("query", "document", "score"), row, strict=True))) + "\n" for row in rows)
    (tmp_path / "scored.jsonl").write_text(text)
    recipe = make_finetune(loss={"name": "cosent"}, steps=40, batch_size=4, learning_rate=2e-3)
    result = run(recipe, tmp_path / "scored.jsonl", tmp_path / "run", eval_data=[str(tmp_path / "scored.jsonl")])
    assert result.after["loss"] < 0.1 and result.after["spearman"] > 0.8 and set(result.before) == {"spearman"}


def test_training_starts_from_the_checkpoint_in_float32(half_checkpoint, make_finetune):
    """Every weight of the encoder is the stored one, cast; what is new depends on the seed."""
    from gte_deploy.models.checkpoint import load_model

    stored = load_model(half_checkpoint, task="embed").state_dict()
    for kind in LIBRARY:
        model = open_initial(make_finetune(kind), device="cpu")
        state = model.state_dict()
        for name, tensor in stored.items():
            same = [value for key, value in state.items() if key.endswith(name)]
            assert same and torch.equal(same[0], tensor.float()) and same[0].dtype == torch.float32, name
    heads = [
        open_initial(make_finetune("rerank", seed=seed), device="cpu").state_dict()["0.model.classifier.weight"]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_model_for_another_task_is_refused(make_finetune, tmp_path):
    from factories import make_checkpoint

    folder = make_checkpoint(tmp_path / "labels", task="classify", num_labels=3)
    with pytest.raises(ConfigError, match="is a model for classify of 3 labels"):
        open_trained(str(folder))


def test_measuring_leaves_the_mode_as_it_was(make_finetune, pairs_file):
    from gte_deploy.training.finetune.data import read_pairs

    recipe = make_finetune()
    model = open_initial(recipe, device="cpu")
    figures = measure(model, read_pairs([str(pairs_file)], recipe), recipe)
    assert model.training and set(figures) == {"ndcg@10", "mrr@10", "recall@1", "recall@10"}
