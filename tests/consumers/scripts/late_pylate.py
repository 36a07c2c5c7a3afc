"""PyLate makes a model of an encoder, saves it as it publishes models, and embeds texts as queries and as documents.

Arguments: the encoder's folder, the folder to write, the settings as JSON, and the texts.
"""

import json
import sys

import numpy as np
import torch
from pylate import models

encoder, saved, settings, *texts = sys.argv[1:]
torch.manual_seed(0)  # the projection and the rows of the prefixes are new
models.ColBERT(encoder, device="cpu", **json.loads(settings)).save(saved)
model = models.ColBERT(saved, device="cpu")
queries = model.encode(texts, is_query=True, show_progress_bar=False)
documents = model.encode(texts, is_query=False, show_progress_bar=False)
np.savez("answers.npz", *queries, *documents)
