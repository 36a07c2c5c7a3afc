import os
import shutil
import sys
from pathlib import Path

import numpy as np
from infinity_emb import EngineArgs, SyncEngineArray

import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"

bundle, texts = Path(sys.argv[1]), sys.argv[2:]
# Of a local model, infinity finds a graph only beside config.json, and only in the working directory.
shutil.copytree(bundle, "model")
for file in Path("model", "onnx").iterdir():
    shutil.move(file, "model")
os.chdir("model")
options = EngineArgs(
    model_name_or_path=".",
    engine="optimum",
    device="cpu",
    pooling_method="mean",  # as 1_Pooling/config.json says
    model_warmup=False,
    embedding_dtype="float32",
)
engine = SyncEngineArray.from_args([options])
embeddings, _ = engine.embed(model=".", sentences=texts).result()  # normalised
np.save("../embeddings.npy", np.stack(embeddings))
engine.stop()
