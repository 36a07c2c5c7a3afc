import sys

import numpy as np
from sentence_transformers import SentenceTransformer

checkpoint, texts = sys.argv[1], sys.argv[2:]
np.save("embeddings.npy", SentenceTransformer(checkpoint).encode(texts))
