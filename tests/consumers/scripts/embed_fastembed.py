import json
import sys
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

bundle, texts = Path(sys.argv[1]), sys.argv[2:]
TextEmbedding.add_custom_model(
    model="my-embedder",
    pooling=PoolingType.DISABLED,  # the graph pools
    normalization=True,
    output_name="sentence_embedding",
    sources=ModelSource(hf="my-embedder"),  # has to be given, and is not asked
    dim=json.loads((bundle / "config.json").read_text())["hidden_size"],
)
model = TextEmbedding("my-embedder", specific_model_path=str(bundle))
np.save("embeddings.npy", np.array(list(model.embed(texts))))
