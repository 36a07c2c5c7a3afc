"""Convert an embedding checkpoint to Core ML for one length of texts; on macOS, embed texts with Core ML as well.

    pip install '.[export]' coremltools               # an environment of its own
    python examples/coreml_embeddings.py my-checkpoint "a text" "another"    # writes my-checkpoint.mlpackage here

Shorter texts are padded on the right and longer ones are cut. On macOS the answers must be PyTorch's, or the script
fails; elsewhere it converts, and says that Core ML did not run.
"""

import argparse
import sys
from pathlib import Path

import coremltools
import numpy as np
import torch
from tokenizers import Tokenizer

from gte_deploy.exporters.graph.trace import traceable_module
from gte_deploy.models.checkpoint import load_described
from gte_deploy.models.description import describe
from gte_deploy.models.heads import HeadOptions

BOUND = 1e-3  # on embeddings of length 1

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
feeds = [{"input_ids": np.int32([one.ids]), "attention_mask": np.int32([one.attention_mask])} for one in encodings]

options, file = HeadOptions.of(described.spec), f"{given.checkpoint.name}.mlpackage"
with traceable_module(load_described(described), options, max_length=given.tokens) as module, torch.no_grad():
    tensors = [tuple(map(torch.from_numpy, feed.values())) for feed in feeds]  # [1, tokens] int32
    expected = np.concatenate([module(*pair)[1] for pair in tensors])  # last_hidden_state, sentence_embedding
    converted = coremltools.convert(
        torch.export.export(module, tensors[0]).run_decompositions({}),
        outputs=[coremltools.TensorType(name=name) for name in module.output_names],
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
    )
converted.save(file)
print(f"{file}: {given.tokens} tokens, float32, iOS 17 and macOS 14 or later")
if sys.platform != "darwin":
    print("Core ML did not run: only macOS has it. Run this script on a Mac before you use the file.")
    sys.exit()
found = np.concatenate([converted.predict(feed)["sentence_embedding"] for feed in feeds])
found, expected = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (found, expected))
print(f"PyTorch differs by {(difference := np.abs(found - expected).max()):.1e}")
if not difference <= BOUND:
    raise SystemExit(f"the difference is above {BOUND}: do not use {file}")
