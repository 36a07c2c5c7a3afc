"""Measure fill-mask accuracy on the held-out text of gte-en-mlm-tiny.

    python tools/tiny_model/evaluate.py corpus models/builtin/gte_en_mlm_tiny

The script prints one JSON object. It holds the accuracy over 512-token windows, for each source and for all of them,
beside the accuracy of a baseline that always answers with the most frequent words; and the loss by position over
8,192-token windows of the long documents.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GteForMaskedLM

from gte_deploy.models import builtin_path
from gte_deploy.training.data.vocabulary import read_vocabulary

SEED = 20240729
VOCABULARY, _ = read_vocabulary(builtin_path())
EVALUATION_MASK_PROBABILITY = 0.15
POSITION_EDGES = (0, 512, 2048, 4096, 8192)


def windows(corpus: Path, length: int) -> Iterator[tuple[str, np.ndarray]]:
    """Cut the held-out documents into whole windows; yield the source and int64 ids [length] with [CLS] and [SEP]."""
    arrays = np.load(corpus / "heldout.npz")
    with open(corpus / "heldout.jsonl") as lines:
        keys = [json.loads(line)["key"] for line in lines]
    bounds = zip(keys, arrays["documents"], arrays["documents"][1:], strict=False)
    for key, begin, end in bounds:
        for start in range(begin, end - length + 3, length - 2):
            body = arrays["tokens"][start : start + length - 2].astype(np.int64)
            yield key.split("/")[0], np.concatenate([[VOCABULARY.cls_id], body, [VOCABULARY.sep_id]])


@torch.inference_mode()
def predict(model: GteForMaskedLM, ids: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Hide 15 % of one window; return for each hidden token its position, word, rank (0 is best) and loss [n]."""
    chosen = np.flatnonzero((rng.random(len(ids)) < EVALUATION_MASK_PROBABILITY) & (ids > VOCABULARY.mask_id))
    hidden = ids.copy()
    hidden[chosen] = VOCABULARY.mask_id
    states = model.gte(torch.from_numpy(hidden)[None]).last_hidden_state[0, chosen]
    logits, wanted = model.lm_head(states), torch.from_numpy(ids[chosen])
    rank = (logits > logits.gather(1, wanted[:, None])).sum(1)
    padded = (logits.argmax(1) >= VOCABULARY.size).sum().expand(len(chosen))
    loss = F.cross_entropy(logits, wanted, reduction="none")
    found = {"rank": rank.numpy(), "loss": loss.numpy(), "padded": padded.numpy()}
    return found | {"position": chosen, "word": ids[chosen]}


def accuracy(model: GteForMaskedLM, corpus: Path, limit: int) -> dict[str, dict[str, float]]:
    """Measure top-1 and top-5 accuracy and a unigram baseline, by source (at most ``limit`` windows) and in total."""
    frequent = np.argsort(-np.bincount(np.load(corpus / "train.npz")["tokens"]))[:5]
    by_source: dict[str, list[dict[str, np.ndarray]]] = {}
    rng = np.random.default_rng(SEED)
    for source, ids in windows(corpus, 512):
        if len(by_source.setdefault(source, [])) < limit:
            by_source[source].append(predict(model, ids, rng))
    groups = by_source | {"all": [found for group in by_source.values() for found in group]}
    return {source: _summary(group, frequent) for source, group in groups.items() if group}


def _summary(group: list[dict[str, np.ndarray]], frequent: np.ndarray) -> dict[str, float]:
    rank, word, loss = (np.concatenate([found[key] for found in group]) for key in ("rank", "word", "loss"))
    return {
        "windows": len(group),
        "masked_tokens": len(rank),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "unigram_top1": float((word == frequent[0]).mean()),
        "unigram_top5": float(np.isin(word, frequent).mean()),
        "loss": float(loss.mean()),
        "padded_ids_predicted": int(sum(found["padded"][0] for found in group if len(found["padded"]))),
    }


def loss_by_position(model: GteForMaskedLM, corpus: Path, limit: int) -> dict[str, float]:
    """Measure the mean masked loss by range of positions over up to ``limit`` windows of 8,192 tokens."""
    rng = np.random.default_rng(SEED)
    found = [predict(model, ids, rng) for (_, ids), _ in zip(windows(corpus, 8192), range(limit), strict=False)]
    position, loss = (np.concatenate([one[key] for one in found]) for key in ("position", "loss"))
    ranges = zip(POSITION_EDGES, POSITION_EDGES[1:], strict=False)
    return {f"{low}-{high}": float(loss[(position >= low) & (position < high)].mean()) for low, high in ranges}


def main() -> None:
    """Print the measurements of the model folder that the command line names."""
    parser = argparse.ArgumentParser(description="Measure gte-en-mlm-tiny on held-out text.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=25, help="512-token windows of each source")
    parser.add_argument("--long-windows", type=int, default=40, help="8,192-token windows")
    arguments = parser.parse_args()
    model = GteForMaskedLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    result = {
        "accuracy": accuracy(model, arguments.corpus, arguments.windows),
        "loss_by_position": loss_by_position(model, arguments.corpus, arguments.long_windows),
    }
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
