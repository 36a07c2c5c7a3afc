import sys

import numpy as np
from sentence_transformers import SparseEncoder

checkpoint, texts = sys.argv[1], sys.argv[2:]
np.save("embeddings.npy", SparseEncoder(checkpoint).encode(texts).to_dense().cpu().numpy())
