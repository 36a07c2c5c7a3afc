"""Compares masked language models on held-out text: loss, perplexity, and top-1 and top-5 accuracy of masked tokens.

All models predict the same tokens of the same chunks. Standard errors are over documents, and those of a difference
between two models are of pairs: of the differences document by document, which vary less than the scores themselves.

Every family with a class for fill-mask is evaluated. Its own encoder and head compute, without padding where the
family's attention has such a form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from gte_deploy.backends.base import Batch
from gte_deploy.core.errors import ConfigError
from gte_deploy.core.files import write_with
from gte_deploy.models import resolve_checkpoint
from gte_deploy.models.attention import PACKED_ATTENTION, register_packed_attention
from gte_deploy.models.checkpoint import load_model
from gte_deploy.models.families import family_of, head_of, head_transform_of
from gte_deploy.models.heads import encode_packed, encode_padded
from gte_deploy.training.data.corpus import TokenCorpus, corpus_fingerprint
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.packing import MicroBatch
from gte_deploy.training.data.vocabulary import read_tokenizer
from gte_deploy.training.distributed import choose_device
from gte_deploy.training.evaluation.held_out import (
    HeldOutText,
    MaskedTokenScores,
    scored,
    scores_of,
)
from gte_deploy.training.export import checkpoint_model
from gte_deploy.training.figures import new_figure
from gte_deploy.training.model import token_scores
from gte_deploy.training.options import Dtype, EvaluationOptions
from gte_deploy.training.state import TOKENIZER_FOLDER, find_checkpoint, is_run

_TOKENS_AT_ONCE = 16_384  # of a batch; a longer chunk makes a batch of its own


@dataclass(frozen=True)
class ModelToEvaluate:
    """A masked language model, in eval mode on the CPU.

    Args:
        name: as the caller gave it.
        network: the model.
        tokenizer: folder of its tokenizer.
        trained_on: fingerprint of the corpus that a run trained it on; None where it is not known.
    """

    name: str
    network: PreTrainedModel
    tokenizer: Path
    trained_on: str | None

    @property
    def runs_packed(self) -> bool:
        """Whether the model computes the chunks of a batch without padding."""
        return family_of(self.network.config).runs_packed

    def predict(self, batch: MicroBatch, *, dtype: Dtype) -> tuple[Tensor, Tensor]:
        """Return the loss and the rank of each masked token; see `held_out.Predict`."""
        network: Any = self.network
        device = network.device
        encode = encode_packed if self.runs_packed else encode_padded
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = encode(network.base_model, _rectangle(batch), device).masked_tokens()
            assert hidden is not None  # the batch has mask positions
            return token_scores(_head(network), hidden, torch.from_numpy(batch.labels).to(device))


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The scores of one model: of all tokens first, and then of each source if there are several.

    `difference` has the scores minus those of the first model, with errors of pairs; None for the first model itself.
    """

    model: str
    scores: tuple[MaskedTokenScores, ...]
    difference: tuple[MaskedTokenScores, ...] | None
    trained_on_this: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data. A difference has no perplexity, which does not subtract."""
        shown = None
        if self.difference is not None:
            shown = [{k: v for k, v in each.to_dict().items() if k != "perplexity"} for each in self.difference]
        return {
            "model": self.model,
            "scores": [each.to_dict() for each in self.scores],
            "difference": shown,
            "trained_on_this": self.trained_on_this,
        }


@dataclass(frozen=True, kw_only=True)
class HeldOutComparison:
    """The result of `evaluate`."""

    data: str
    tokens: int
    options: EvaluationOptions
    models: tuple[EvaluatedModel, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "tokens": self.tokens,
            "options": asdict(self.options),
            "models": [model.to_dict() for model in self.models],
        }


def evaluate(
    models: Sequence[str],
    *,
    data: Path,
    options: EvaluationOptions = EvaluationOptions(),  # noqa: B008 - frozen
    progress: bool = False,
) -> HeldOutComparison:
    """Evaluate masked language models on the same held-out tokens.

    Args:
        models: each a checkpoint folder, preset name or hub id, the folder of a run (its newest checkpoint), or a
            checkpoint of a run.
        data: corpus that `gte-train prepare` wrote; use text that no model was trained on.
        options: the tokens to read, their masks, and the device.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: a name is no model, or its weights do not fit.
        ConfigError: a model has fewer positions, another vocabulary, or no masked-LM head.
        InputError: no token is masked.
        NonFiniteError: a loss is NaN or infinite.
    """
    corpus = TokenCorpus.open(data)
    masking = Masking(probability=options.mask_probability, mask_share=1.0, random_share=0.0)
    text = HeldOutText(corpus, options.max_length, masking, options.max_tokens, options.seed)
    device = choose_device(options.device)
    dtype: Dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    results: list[EvaluatedModel] = []
    first: NDArray[np.float64] | None = None
    for name in models:
        model = open_model(name)
        _require_same_vocabulary(model, corpus)
        _require_positions(model, options.max_length)
        _moved(model.network, device)
        budget = max(_TOKENS_AT_ONCE, options.max_length)
        batches = text.packed(budget) if model.runs_packed else text.rectangles(budget)
        shown = tqdm(total=len(batches), desc=name, disable=not progress, file=sys.stderr)
        with shown:
            sums = scored(text, _counting(partial(model.predict, dtype=dtype), shown), batches)
        first = sums if first is None else first
        results.append(
            EvaluatedModel(
                model=name,
                scores=scores_of(text, sums),
                difference=scores_of(text, sums - first) if results else None,
                trained_on_this=model.trained_on == corpus_fingerprint(corpus),
            )
        )
    return HeldOutComparison(data=str(data), tokens=text.tokens, options=options, models=tuple(results))


def open_model(name: str) -> ModelToEvaluate:
    """Load a masked language model for `evaluate`; a run and its checkpoints are read without an export.

    Raises:
        CheckpointError: the name is no model, or its weights do not fit.
        ConfigError: the model's family has no class for fill-mask.
    """
    if is_run(Path(name)):
        checkpoint = find_checkpoint(Path(name))
        tokenizer = checkpoint.path.parent.parent / TOKENIZER_FOLDER
        return ModelToEvaluate(name, checkpoint_model(checkpoint), tokenizer, checkpoint.state.corpus)
    register_packed_attention()
    folder = resolve_checkpoint(name)
    network = load_model(folder, task="fill-mask")
    if family_of(network.config).runs_packed:
        network.set_attn_implementation(PACKED_ATTENTION)
    return ModelToEvaluate(name, network, folder, None)


def table(result: HeldOutComparison) -> str:
    """Format the scores for a person: a row for each model and source, and the differences to the first model."""
    options = result.options
    width = max(len("model"), *(len(model.model) for model in result.models))
    names = [score.source or "(none)" for score in result.models[0].scores]
    column = max(len("source"), *map(len, names))
    lines = [
        f"{result.tokens:,} tokens of {result.data}, in chunks of at most {options.max_length}; "
        f"{options.mask_probability:.0%} of them hidden. ± is the standard error over documents",
        "",
        f"{'model':<{width}}  {'source':<{column}} {'hidden':>8} {'loss (nats)':>16} {'perplexity':>11} "
        f"{'top-1':>14} {'top-5':>14}",
    ]
    for model in result.models:
        for score in model.scores:
            loss, top1, top5 = _with_errors(score, sign="")
            lines.append(
                f"{model.model:<{width}}  {score.source or '(none)':<{column}} {score.masked_tokens:>8,} {loss:>16} "
                f"{score.perplexity:>11,.2f} {top1:>14} {top5:>14}"
            )
    if len(result.models) > 1:
        lines += ["", f"minus {result.models[0].model}, on the same tokens; ± is the standard error of the difference"]
    for model in result.models[1:]:
        for score in model.difference or ():
            loss, top1, top5 = _with_errors(score, sign="+")
            lines.append(
                f"{model.model:<{width}}  {score.source or '(none)':<{column}} {score.masked_tokens:>8,} {loss:>16} "
                f"{'':>11} {top1:>14} {top5:>14}"
            )
    return "\n".join(lines)


def _with_errors(score: MaskedTokenScores, *, sign: str) -> tuple[str, str, str]:
    loss, top1, top5 = score.errors or (None, None, None)
    shown_loss = f"{score.loss:{sign}.4f}" + ("" if loss is None else f" ± {loss:.4f}")
    shares = zip((score.top1, score.top5), (top1, top5), strict=True)
    return shown_loss, *(  # type: ignore[return-value]
        f"{100 * value:{sign}.1f}" + (" %" if error is None else f" ± {100 * error:.1f} %") for value, error in shares
    )


def plot_comparison(result: HeldOutComparison, path: Path) -> None:
    """Plot loss, top-1 and top-5 accuracy of each model and source, with standard errors, into a .png or .svg.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(12, 4.5)
    panels = figure.subplots(1, 3)
    columns = (("loss, nats per masked token", 1), ("top-1 accuracy, %", 100), ("top-5 accuracy, %", 100))
    sources = [score.source or "(none)" for score in result.models[0].scores]
    width = 0.8 / len(result.models)
    for number, model in enumerate(result.models):
        places = np.arange(len(sources)) - 0.4 + (number + 0.5) * width
        for column, (axes, (label, factor)) in enumerate(zip(panels, columns, strict=True)):
            values = [factor * (score.loss, score.top1, score.top5)[column] for score in model.scores]
            errors = [factor * (score.errors or (0.0, 0.0, 0.0))[column] for score in model.scores]
            axes.bar(places, values, width, yerr=errors, capsize=2, label=model.model)
            axes.set(ylabel=label, xticks=range(len(sources)))
            axes.set_xticklabels(sources, rotation=30 if len(sources) > 4 else 0)
    for axes in panels:
        axes.grid(alpha=0.3, axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(3, len(result.models)))
    kind = path.suffix.removeprefix(".") or "png"
    write_with(path, partial(figure.savefig, format=kind, dpi=120))


# --- the models -----------------------------------------------------------------------------------------------------


def _counting(predict: Callable[[MicroBatch], tuple[Tensor, Tensor]], shown: Any) -> Callable[..., Any]:
    def counted(batch: MicroBatch) -> tuple[Tensor, Tensor]:
        scores = predict(batch)
        shown.update()
        return scores

    return counted


def _moved(network: nn.Module, device: torch.device) -> None:
    network.to(device)  # transformers' own annotation of `to` lacks the device


def _head(network: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from hidden states `[m, H]` to logits `[m, V]`."""
    transform, head = head_transform_of(network), head_of(network, "fill-mask")
    return head if transform is None else lambda hidden: head(transform(hidden))


def _rectangle(batch: MicroBatch) -> Batch:
    """The chunks of a batch as padded rows, with the masked tokens as mask positions."""
    lengths = np.diff(batch.cu_seqlens)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    input_ids = np.zeros((len(lengths), int(lengths.max())), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    input_ids[rows, batch.position_ids], mask[rows, batch.position_ids] = batch.input_ids, 1
    places = np.stack([rows[batch.masked_positions], batch.position_ids[batch.masked_positions]], axis=1)
    return Batch(input_ids=input_ids, attention_mask=mask, mask_positions=places)


def _require_positions(model: ModelToEvaluate, max_length: int) -> None:
    config = model.network.config
    most = family_of(config).max_tokens(config)
    if most < max_length:
        raise ConfigError(f"{model.name} takes {most} tokens, not {max_length}: use --max-length")


def _require_same_vocabulary(model: ModelToEvaluate, corpus: TokenCorpus) -> None:
    """Refuse a model whose tokens have other ids than the corpus's.

    Raises:
        ConfigError: the vocabularies differ.
    """
    config, vocab = model.network.config, corpus.vocab
    advice = "prepare the corpus with the model's tokenizer (`gte-train prepare --tokenizer`)"
    if vocab.size > config.vocab_size or vocab.pad_id != config.pad_token_id:
        raise ConfigError(
            f"{corpus.folder} has a vocabulary of {vocab.size} and padding id {vocab.pad_id}; {model.name} has "
            f"{config.vocab_size} and {config.pad_token_id}: {advice}"
        )
    theirs, ours = (_words(folder) for folder in (model.tokenizer, corpus.folder / TOKENIZER_FOLDER))
    if theirs and ours:
        odd = [word for word, number in ours.items() if theirs.get(word) != number]
        if odd:
            raise ConfigError(
                f"{len(odd)} of {len(ours)} words of {corpus.folder} have other ids in {model.name}, such as "
                f"{odd[0]!r}: {advice}"
            )


def _words(folder: Path) -> Mapping[str, int]:
    """The ids of a tokenizer.json by their words; empty where there is none."""
    file = folder / "tokenizer.json"
    return read_tokenizer(file).get_vocab(with_added_tokens=True) if file.is_file() else {}
