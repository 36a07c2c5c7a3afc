"""Loss by position and by context: against plain transformers, by hand, and through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from factories import make_checkpoint
from gte_deploy.core.errors import ConfigError, InputError, NonFiniteError
from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention
from gte_deploy.models.checkpoint import load_model, save_model
from gte_deploy.training.cli import main
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.packing import MicroBatch
from gte_deploy.training.evaluation import extrapolation
from gte_deploy.training.evaluation.extrapolation import extrapolate, table, token_losses
from gte_deploy.training.options import ExtrapolationOptions

LENGTH = 64


def packed_model(folder: Path) -> Any:
    register_packed_attention()
    return load_model(folder, task="fill-mask", attn_implementation=PACKED_ATTENTION)


@pytest.fixture
def seen(monkeypatch) -> list[tuple[MicroBatch, np.ndarray]]:
    """Every batch that went through `token_losses`, and the result."""
    batches: list[tuple[MicroBatch, np.ndarray]] = []
    real = token_losses

    def record(model: Any, batch: MicroBatch) -> np.ndarray:
        batches.append((batch, real(model, batch)))
        return batches[-1][1]

    monkeypatch.setattr(extrapolation, "token_losses", record)
    return batches


def measure(model: Path, corpus: Path, **changes: Any) -> Any:
    arguments = {"max_length": LENGTH, "contexts": [16, 32], "buckets": 4, "rows": 5, "device": "cpu"}
    return extrapolate(str(model), data=corpus, options=ExtrapolationOptions(**{**arguments, **changes}))


def test_losses_are_those_of_plain_transformers(tiny_mlm: Path, corpus_folder: Path, seen):
    result = measure(tiny_mlm, corpus_folder)
    plain = load_model(tiny_mlm, task="fill-mask")
    assert [batch.max_seqlen for batch, _ in seen[:3]] == [16, 32, 64]
    for batch, losses in seen:
        windows = torch.from_numpy(batch.input_ids).reshape(-1, batch.max_seqlen)
        with torch.inference_mode():
            logits = plain(windows, attention_mask=torch.ones_like(windows)).logits.flatten(0, 1)
        expected = F.cross_entropy(logits[batch.masked_positions], torch.from_numpy(batch.labels), reduction="none")
        np.testing.assert_allclose(losses, expected, atol=2e-5, rtol=1e-5)
    by_context = {c.length: c.loss for c in result.by_context}
    for context in (16, 32, 64):
        every = np.concatenate([losses for batch, losses in seen if batch.max_seqlen == context])
        assert by_context[context] == pytest.approx(every.mean(), rel=1e-5)


def test_every_context_predicts_the_same_tokens(tiny_mlm: Path, corpus_folder: Path, seen):
    result = measure(tiny_mlm, corpus_folder)
    assert len({c.tokens for c in result.by_context}) == 1
    rows = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rows) == result.rows == 5
    for row in rows:
        (first, _), *others = row
        for batch, _ in others:
            np.testing.assert_array_equal(batch.masked_positions, first.masked_positions)
            np.testing.assert_array_equal(batch.labels, first.labels)
    vocab = TokenCorpus.open(corpus_folder).vocab
    for batch, _ in seen:
        windows = batch.input_ids.reshape(-1, batch.max_seqlen)
        assert (windows[:, 0] == vocab.cls_id).all() and (windows[:, -1] == vocab.sep_id).all()
        assert (batch.input_ids[batch.masked_positions] == vocab.mask_id).all()
    assert sum(batch.masked_positions.size for batch, _ in seen) > 3 * 5 * LENGTH * 0.15


def test_rows_are_full_and_differ(tiny_mlm: Path, corpus_folder: Path, seen):
    corpus = TokenCorpus.open(corpus_folder)
    full = int(((corpus.lengths) // (LENGTH - 2)).sum())
    assert measure(tiny_mlm, corpus_folder, rows=1000).rows == full
    whole = [batch.input_ids.tobytes() for batch, _ in seen if batch.max_seqlen == LENGTH]
    assert len(set(whole)) == len(whole) == full


def test_buckets_average_their_positions(tiny_mlm: Path, corpus_folder: Path, monkeypatch):
    per_row: list[np.ndarray] = []

    def losses_are_positions(model: Any, batch: MicroBatch) -> np.ndarray:
        if batch.max_seqlen == LENGTH:
            per_row.append(batch.masked_positions)
        return batch.masked_positions.astype(np.float32)

    monkeypatch.setattr(extrapolation, "token_losses", losses_are_positions)
    result = measure(tiny_mlm, corpus_folder)
    assert [(b.start, b.stop) for b in result.by_position] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    for bucket in result.by_position:
        inside = [p[(p >= bucket.start) & (p < bucket.stop)] for p in per_row]
        assert bucket.loss == pytest.approx(np.concatenate(inside).mean())
        assert bucket.tokens == sum(map(len, inside))
        sums, counts = np.array([x.sum() for x in inside]), np.array([len(x) for x in inside])
        residuals = sums - bucket.loss * counts
        assert bucket.error == pytest.approx(np.sqrt(5 / 4 * (residuals**2).sum()) / counts.sum())


def test_windows_do_not_see_each_other(tiny_mlm: Path):
    model = packed_model(tiny_mlm)
    batch = MicroBatch(
        input_ids=np.array([2, 7, 4, 9, 3, 2, 4, 8, 3]),
        position_ids=np.array([0, 1, 2, 3, 4, 0, 1, 2, 3]),
        cu_seqlens=np.array([0, 5, 9], dtype=np.int32),
        max_seqlen=5,
        masked_positions=np.array([2, 6]),
        labels=np.array([10, 11]),
        num_sequences=2,
    )
    before = token_losses(model, batch)
    batch.input_ids[7] = 30
    after = token_losses(model, batch)
    assert after[0] == before[0] and after[1] != before[1]


def test_default_contexts_are_powers_of_two():
    assert sorted(extrapolation._default_contexts(8192)) == [128, 256, 512, 1024, 2048, 4096, 8192]
    assert extrapolation._default_contexts(100) == {100}


@pytest.mark.parametrize("changes", [{"contexts": [24]}, {"contexts": [2]}, {"buckets": 5}, {"buckets": 0}])
def test_lengths_that_do_not_divide_are_refused(tiny_mlm: Path, corpus_folder: Path, changes):
    with pytest.raises(InputError, match="divide max_length"):
        measure(tiny_mlm, corpus_folder, **changes)


def test_corpus_without_long_documents_is_refused(tiny_mlm: Path, corpus_folder: Path):
    with pytest.raises(InputError, match="has 152 tokens, not 4096"):
        measure(tiny_mlm, corpus_folder, max_length=4096, contexts=[128])


def test_model_of_too_few_positions_or_another_vocabulary_is_refused(tmp_path: Path, corpus_folder: Path):
    short = make_checkpoint(tmp_path / "short", max_positions=32)
    with pytest.raises(ConfigError, match="has 32 positions, not 64"):
        measure(short, corpus_folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w5", "w6"]
    other = make_checkpoint(tmp_path / "other", vocab=words)
    with pytest.raises(ConfigError, match="vocabulary of 256 and padding id 0"):
        measure(other, corpus_folder)


def test_not_a_number_is_refused(tiny_mlm: Path, corpus_folder: Path, tmp_path: Path):
    model = load_model(tiny_mlm, task="fill-mask")
    torch.nn.init.constant_(model.gte.layers[0].mlp.down_proj.bias, float("nan"))
    save_model(model, tmp_path / "spoilt", layout="native")
    with pytest.raises(NonFiniteError):
        measure(tmp_path / "spoilt", corpus_folder)


def test_command_writes_json_and_plot(tiny_mlm: Path, corpus_folder: Path, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["extrapolate", str(tiny_mlm), "--data", str(corpus_folder), "--rows", "3", "--max-length", "64"]
    arguments += ["--contexts", "16", "--buckets", "4", "--device", "cpu"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    assert "position" in (text := capsys.readouterr().out) and "48-63" in text
    result = json.loads((tmp_path / "out" / "extrapolation.json").read_text())
    assert [c["length"] for c in result["by_context"]] == [16, 64]
    assert (tmp_path / "out" / "extrapolation.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_plot_may_be_svg(tiny_mlm: Path, corpus_folder: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    result = measure(tiny_mlm, corpus_folder)
    extrapolation.plot(result, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert "the same tokens" in table(result)
