import sys

import numpy as np
from fastembed import SparseTextEmbedding
from fastembed.common.model_description import ModelSource, SparseModelDescription
from fastembed.sparse.splade_pp import supported_splade_models

bundle, texts = sys.argv[1], sys.argv[2:]
supported_splade_models.append(  # there is no add_custom_model for sparse models
    SparseModelDescription(
        model="my-splade",
        sources=ModelSource(hf="my-splade"),  # has to be given, and is not asked
        model_file="onnx/model.onnx",
        description="",
        license="",
        size_in_GB=0,
    )
)
model = SparseTextEmbedding("my-splade", specific_model_path=bundle)
embeddings = np.zeros((len(texts), 30528), np.float32)  # [texts, vocabulary]
for row, embedding in zip(embeddings, model.embed(texts), strict=True):
    row[embedding.indices] = embedding.values
np.save("embeddings.npy", embeddings)
