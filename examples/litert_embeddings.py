"""Convert an embedding checkpoint to LiteRT for one length of texts, and embed texts with LiteRT alone.

    pip install '.[export]' litert-torch              # an environment of its own
    python examples/litert_embeddings.py my-checkpoint "a text" "another"    # writes my-checkpoint.tflite here

Shorter texts are padded on the right and longer ones are cut. The answers must be PyTorch's, or the script fails.
"""

import argparse
from pathlib import Path

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from tokenizers import Tokenizer

from gte_deploy.exporters.graph.trace import traceable_module
from gte_deploy.models.checkpoint import load_described
from gte_deploy.models.description import describe
from gte_deploy.models.heads import HeadOptions

BOUND = 2e-5  # on embeddings of length 1

parser = argparse.ArgumentParser(usage="%(prog)s [--tokens N] CHECKPOINT TEXT [TEXT ...]")
parser.add_argument("checkpoint", type=Path)
parser.add_argument("texts", nargs="+")
parser.add_argument("--tokens", type=int, default=128)
given = parser.parse_args()

described = describe(given.checkpoint, task="embed")
tokenizer = Tokenizer.from_file(str(given.checkpoint / "tokenizer.json"))
tokenizer.enable_truncation(given.tokens)
tokenizer.enable_padding(length=given.tokens, pad_id=described.spec.pad_token_id)
encodings = tokenizer.encode_batch(given.texts)
feeds = [
    {"input_ids": torch.tensor([one.ids]).int(), "attention_mask": torch.tensor([one.attention_mask]).int()}
    for one in encodings
]  # [1, tokens] int32

model, file = load_described(described), f"{given.checkpoint.name}.tflite"
with traceable_module(model, HeadOptions.of(described.spec), max_length=given.tokens) as module, torch.no_grad():
    expected = np.concatenate([module(**feed)[1] for feed in feeds])  # last_hidden_state, sentence_embedding
    litert_torch.convert(module, sample_kwargs=feeds[0]).export(file)

run = Interpreter(file).get_signature_runner()  # in an app: the same file and the same names
found = np.concatenate([run(**feed)["output_1"] for feed in feeds])
embeddings, expected = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (found, expected))
np.save("embeddings.npy", embeddings)
difference = np.abs(embeddings - expected).max()
print(f"{file}: {Path(file).stat().st_size / 1e6:.1f} MB, {given.tokens} tokens, PyTorch differs by {difference:.1e}")
print(np.round(embeddings @ embeddings.T, 4))
if not difference <= BOUND:
    raise SystemExit(f"the difference is above {BOUND}: do not use {file}")
