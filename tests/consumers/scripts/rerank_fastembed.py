import sys

import numpy as np
from fastembed.common.model_description import ModelSource
from fastembed.rerank.cross_encoder import TextCrossEncoder

bundle, query, documents = sys.argv[1], sys.argv[2], sys.argv[3:]
TextCrossEncoder.add_custom_model("my-reranker", sources=ModelSource(hf="my-reranker"))  # the source is not asked
model = TextCrossEncoder("my-reranker", specific_model_path=bundle)
np.save("scores.npy", np.array(list(model.rerank(query, documents))))
