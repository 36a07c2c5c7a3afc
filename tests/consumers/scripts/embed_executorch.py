import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer

bundle, texts = Path(sys.argv[1]), sys.argv[2:]
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
config = json.loads((bundle / "config.json").read_text())
tokenizer.enable_truncation(config["max_position_embeddings"])  # the limit of the bundle
method = Runtime.get().load_program(bundle / "executorch" / "model.pte").load_method("forward")
embeddings = []
for text in texts:
    ids = torch.tensor([tokenizer.encode(text).ids])  # [1, tokens] int64
    hidden, embedding = method.execute([ids, torch.ones_like(ids)])  # last_hidden_state, sentence_embedding
    embeddings.append(torch.nn.functional.normalize(embedding))
torch.save(torch.cat(embeddings), "embeddings.pt")
