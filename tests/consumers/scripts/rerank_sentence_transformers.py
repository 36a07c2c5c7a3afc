import sys

import numpy as np
from sentence_transformers import CrossEncoder

checkpoint, query, documents = sys.argv[1], sys.argv[2], sys.argv[3:]
model = CrossEncoder(checkpoint)
np.save("scores.npy", model.predict([(query, document) for document in documents]))
