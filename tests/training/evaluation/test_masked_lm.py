"""`gte-train evaluate`: scores against transformers, one chunk at a time in float64, and errors by the jackknife."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM

from every_family import KINDS, TRANSFORMERS_KINDS, make_masked_lm
from factories import SPELLING, make_checkpoint
from gte_deploy.core.errors import ConfigError, InputError, NonFiniteError
from gte_deploy.models.checkpoint import copy_tokenizer, load_model, save_model
from gte_deploy.training.cli import main
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.prepare import prepare
from gte_deploy.training.evaluation.held_out import HeldOutText, ratio_of_sums, scored
from gte_deploy.training.evaluation.masked_lm import EvaluatedModel, evaluate, open_model, plot_comparison, table
from gte_deploy.training.options import EvaluationOptions
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.state import STATE_FILE, TOKENIZER_FOLDER
from gte_deploy.training.train import train

LENGTH = 48


def make_corpus(folder: Path, tokenizer: Path, *, words: list[str], documents: int = 40) -> Path:
    """A corpus of two sources, whose documents have 1 to 130 words, with its tokenizer inside."""
    rng = random.Random(len(words))
    for number, source in enumerate(("domain", "general")):
        some = words[number::2]
        texts = [" ".join(rng.choices(some, k=rng.choice([1, 4, 9, 20, 60, 130]))) for _ in range(documents)]
        (folder / f"{source}.txt").write_text("\n\n".join(texts))
    inputs = [f"{source}={folder / source}.txt" for source in ("domain", "general")]
    prepare(inputs, folder / "data", tokenizer=tokenizer)
    copy_tokenizer(tokenizer, folder / "data" / TOKENIZER_FOLDER)
    return folder / "data"


@pytest.fixture(scope="module")
def two_sources(tiny_mlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("two"), tiny_mlm, words=[f"w{i}" for i in range(5, 256)])


@pytest.fixture(scope="module")
def other_mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("other") / "mlm", seed=5)


def options(**changes: Any) -> EvaluationOptions:
    return EvaluationOptions(**{"device": "cpu", "max_length": LENGTH, **changes})


def text_of(corpus: Path, chosen: EvaluationOptions) -> HeldOutText:
    masking = Masking(probability=chosen.mask_probability, mask_share=1.0, random_share=0.0)
    return HeldOutText(TokenCorpus.open(corpus), chosen.max_length, masking, chosen.max_tokens, chosen.seed)


def expected(
    text: HeldOutText, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    """For each chunk: its source, its document, and the losses and ranks of its masked tokens, without a batch."""
    corpus = text.corpus
    for chunk in text.chunks:
        batch, documents = text.batch(np.array([chunk]))
        if not len(documents):
            continue
        with torch.inference_mode():
            logits = logits_of(torch.from_numpy(batch.input_ids)[None])[0, batch.masked_positions]
        labels = torch.from_numpy(batch.labels)
        order = logits.argsort(dim=-1, descending=True)
        document = int(documents[0])
        source = corpus.languages[int(corpus.language_of[document])]
        yield (
            source,
            document,
            F.cross_entropy(logits, labels, reduction="none"),
            (order == labels[:, None]).int().argmax(dim=-1),
        )


def require_scores(model: EvaluatedModel, text: HeldOutText, logits_of: Callable[..., torch.Tensor]) -> None:
    chunks = list(expected(text, logits_of))
    for score in model.scores:
        mine = [each for each in chunks if score.source in ("all", each[0])]
        losses, ranks = torch.cat([each[2] for each in mine]), torch.cat([each[3] for each in mine])
        assert score.masked_tokens == len(losses) and score.documents == len({each[1] for each in mine})
        assert score.loss == pytest.approx(float(losses.mean()), abs=2e-6)
        assert score.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
        # Two logits may change places by rounding: one token in the whole text.
        assert score.top1 == pytest.approx(float((ranks < 1).double().mean()), abs=1.5 / len(losses))
        assert score.top5 == pytest.approx(float((ranks < 5).double().mean()), abs=1.5 / len(losses))


def test_scores_are_those_of_plain_transformers(tiny_mlm: Path, other_mlm: Path, two_sources: Path):
    result = evaluate([str(tiny_mlm), str(other_mlm)], data=two_sources, options=options())
    assert [score.source for score in result.models[0].scores] == ["all", "domain", "general"]
    for folder, model in zip((tiny_mlm, other_mlm), result.models, strict=True):
        plain = load_model(folder, task="fill-mask").double()  # the class of transformers, without padding
        require_scores(model, text_of(two_sources, options()), lambda ids, plain=plain: plain(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_scores_as_its_own_forward_pass(kind: str, tmp_path: Path):
    folder = make_masked_lm(tmp_path / "model", kind)
    words = [word for word in SPELLING if word.isalpha()] if kind in ("new", "gte") else ["the", "city", "of", "a"]
    corpus = make_corpus(tmp_path, folder, words=words, documents=8)
    (model,) = evaluate([str(folder)], data=corpus, options=options(mask_probability=0.3)).models
    if kind in TRANSFORMERS_KINDS:
        plain = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float64).eval()
    else:
        plain = load_model(folder, task="fill-mask").double()
    require_scores(model, text_of(corpus, options(mask_probability=0.3)), lambda ids: plain(ids).logits)


def test_errors_are_those_of_the_jackknife():
    """Leaving out one document at a time: another estimator of the same standard error."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, 400)
    rates = rng.normal(3.0, 0.5, 400)
    sums = (counts * rates + rng.normal(0, np.sqrt(counts)))[:, None]
    means, errors = ratio_of_sums(sums, counts)
    left_out = (sums.sum() - sums[:, 0]) / (counts.sum() - counts)
    jackknife = np.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert means[0] == pytest.approx(sums.sum() / counts.sum())
    assert errors is not None and errors[0] == pytest.approx(jackknife, rel=0.01)
    assert ratio_of_sums(sums[:1], counts[:1])[1] is None


def test_difference_is_paired_by_document(tiny_mlm: Path, other_mlm: Path, two_sources: Path):
    names = [str(tiny_mlm), str(other_mlm), str(tiny_mlm)]
    first, second, same = evaluate(names, data=two_sources, options=options()).models
    assert first.difference is None and second.difference is not None and same.difference is not None
    for difference, old, new in zip(second.difference, first.scores, second.scores, strict=True):
        assert difference.loss == pytest.approx(new.loss - old.loss)
        assert difference.top1 == pytest.approx(new.top1 - old.top1)
    text = text_of(two_sources, options())
    old_model, new_model = (partial(open_model(name).predict, dtype="float32") for name in names[:2])
    sums = [scored(text, predict, text.packed(512)) for predict in (old_model, new_model)]
    _, errors = ratio_of_sums(sums[1] - sums[0], text.masked_tokens)
    assert second.difference[0].errors == pytest.approx(errors)
    assert all(each.loss == 0 and each.errors == (0, 0, 0) for each in same.difference)


def test_masks_follow_from_the_seed_and_the_document_alone(two_sources: Path):
    def hidden(text: HeldOutText, token_budget: int) -> set[tuple[int, int, int]]:
        """(document, place in it, word)"""
        found = set()
        for chunks in text.packed(token_budget):
            batch, documents = text.batch(chunks)
            _, starts, _ = text.index.locate(chunks)
            rows = np.searchsorted(batch.cu_seqlens, batch.masked_positions, side="right") - 1
            places = starts[rows] + batch.position_ids[batch.masked_positions]
            found |= set(zip(documents.tolist(), places.tolist(), batch.labels.tolist(), strict=True))
        return found

    short, long = text_of(two_sources, options()), text_of(two_sources, options(max_length=120))
    assert hidden(short, 64) == hidden(short, 4096) == hidden(long, 4096)
    assert hidden(short, 64) != hidden(text_of(two_sources, options(seed=1)), 64)
    share = len(hidden(short, 64)) / short.corpus.num_tokens
    assert share == pytest.approx(0.15, abs=0.02)


def test_max_tokens_bounds_each_source(two_sources: Path):
    text = text_of(two_sources, options(max_tokens=300))
    documents, _, lengths = text.index.locate(text.chunks)
    first_of_second = int(text.corpus.language_bounds[1])
    for rows in (documents < first_of_second, documents >= first_of_second):
        assert 300 - LENGTH < (lengths[rows] + 2).sum() <= 300
    assert text.tokens == (lengths + 2).sum()
    other = text_of(two_sources, options(max_tokens=300, seed=7))
    assert other.chunks.tolist() != text.chunks.tolist()
    everything = text_of(two_sources, options())
    assert everything.chunks.tolist() == list(range(everything.index.num_chunks))
    with pytest.raises(InputError, match="max_tokens 0"):
        text_of(two_sources, options(max_tokens=0))


def test_rectangles_hold_every_chunk_within_the_budget(two_sources: Path):
    text = text_of(two_sources, options())
    batches = text.rectangles(200)
    assert sorted(np.concatenate(batches).tolist()) == text.chunks.tolist()
    for chunks in batches:
        assert text.index.lengths_of(chunks).max() * len(chunks) <= 200
    with pytest.raises(InputError, match="exceeds the token budget 20"):
        text.rectangles(20)


def test_ranks_share_the_batches(tiny_mlm: Path, two_sources: Path):
    text, model = text_of(two_sources, options()), open_model(str(tiny_mlm))
    calls = dict.fromkeys(range(3), 0)

    def count(rank: int) -> Callable[..., Any]:
        def predict(batch: Any) -> Any:
            calls[rank] += 1
            return model.predict(batch, dtype="float32")

        return predict

    batches = text.packed(256)
    alone = scored(text, count(0), batches)
    calls[0] = 0
    together = sum(scored(text, count(rank), batches, rank=rank, world_size=3) for rank in range(3))
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert len(set(calls.values())) == 1, "a sharded model needs equally many calls on each rank"


def test_a_run_and_its_checkpoints_need_no_export(make_recipe, two_sources: Path, tmp_path: Path, capsys):
    recipe = recipe_from_dict(make_recipe(steps=(4,), dropout=0.0))
    result = train(recipe, data=two_sources, output=tmp_path / "run", tensorboard=False)
    assert result.model is not None
    first = tmp_path / "run" / "checkpoints" / "00-mlm-32-00000002"
    assert (first / STATE_FILE).is_file()
    names = [str(result.model), str(tmp_path / "run"), str(first)]
    exported, run, earlier = evaluate(names, data=two_sources, options=options()).models
    assert run.scores[0].loss == pytest.approx(exported.scores[0].loss, abs=1e-6)
    assert earlier.scores[0].loss != pytest.approx(run.scores[0].loss, abs=1e-4)
    assert [m.trained_on_this for m in (exported, run, earlier)] == [False, True, True]
    assert main(["evaluate", names[1], "--data", str(two_sources), "--max-len", "48", "--device", "cpu"]) == 0
    assert "was trained on" in capsys.readouterr().err


def test_models_that_do_not_fit_are_refused(tmp_path: Path, two_sources: Path, tiny_mlm: Path):
    short = make_checkpoint(tmp_path / "short", max_positions=32)
    with pytest.raises(ConfigError, match="takes 32 tokens, not 48"):
        evaluate([str(short)], data=two_sources, options=options())
    few = make_checkpoint(tmp_path / "few", vocab=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w5", "w6"])
    with pytest.raises(ConfigError, match="vocabulary of 256 and padding id 0"):
        evaluate([str(few)], data=two_sources, options=options())
    words = json.loads((tiny_mlm / "tokenizer.json").read_text())["model"]["vocab"]
    swapped = [{"w7": "w8", "w8": "w7"}.get(word, word) for word in sorted(words, key=words.__getitem__)]
    other = make_checkpoint(tmp_path / "swapped", vocab=swapped)
    with pytest.raises(ConfigError, match="2 of 256 words .* have other ids"):
        evaluate([str(other)], data=two_sources, options=options())


def test_not_a_number_is_refused(tiny_mlm: Path, two_sources: Path, tmp_path: Path):
    model = load_model(tiny_mlm, task="fill-mask")
    torch.nn.init.constant_(model.gte.layers[0].mlp.down_proj.bias, float("nan"))
    save_model(model, tmp_path / "spoilt", layout="native")
    with pytest.raises(NonFiniteError):
        evaluate([str(tmp_path / "spoilt")], data=two_sources, options=options())


def test_command_writes_json_and_plot(tiny_mlm: Path, other_mlm: Path, two_sources: Path, tmp_path: Path, capsys):
    arguments = ["evaluate", str(tiny_mlm), str(other_mlm), "--data", str(two_sources), "--max-len", "48"]
    arguments += ["--device", "cpu", "--max-tokens", "500"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith((str(tiny_mlm), str(other_mlm)))]) == 9
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    first, second = saved["models"]
    assert first["difference"] is None and "perplexity" not in second["difference"][0]
    assert second["difference"][1]["loss"] == pytest.approx(second["scores"][1]["loss"] - first["scores"][1]["loss"])
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == saved
    assert main(["evaluate", str(tmp_path / "nothing"), "--data", str(two_sources)]) != 0
    assert "no folder" in capsys.readouterr().err


def test_a_corpus_of_one_source_has_one_row(tiny_mlm: Path, corpus_folder: Path, tmp_path: Path):
    result = evaluate([str(tiny_mlm)], data=corpus_folder, options=options(max_tokens=400))
    assert [score.source for score in result.models[0].scores] == ["all"]
    assert "minus" not in table(result)
    plot_comparison(result, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
