import sys

import numpy as np
from openvino_genai import TextEmbeddingPipeline

folder, texts = sys.argv[1], sys.argv[2:]
pipeline = TextEmbeddingPipeline(folder, "CPU", pooling_type=TextEmbeddingPipeline.PoolingType.MEAN, normalize=True)
np.save("embeddings.npy", np.array(pipeline.embed_documents(texts), np.float32))
