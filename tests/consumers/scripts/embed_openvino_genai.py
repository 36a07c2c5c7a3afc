import sys
from pathlib import Path

import numpy as np
from openvino_genai import TextEmbeddingPipeline

bundle, texts = Path(sys.argv[1]), sys.argv[2:]
options = {
    "pooling_type": TextEmbeddingPipeline.PoolingType.MEAN,  # as 1_Pooling/config.json says
    "normalize": True,
    "INFERENCE_PRECISION_HINT": "f32",  # without it, CPUs that have bfloat16 compute in it
}
pipeline = TextEmbeddingPipeline(bundle / "openvino", "CPU", **options)
np.save("embeddings.npy", np.array(pipeline.embed_documents(texts), np.float32))
