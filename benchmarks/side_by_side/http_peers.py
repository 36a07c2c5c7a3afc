"""Other libraries behind HTTP, as their users serve them; each in a process of its own.

python -c "from side_by_side.http_peers import NAME; NAME(FOLDER, PORT, THREADS)"
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

from side_by_side.peers import infinity_options


def sentence_transformers(folder: str, port: int, threads: int) -> None:
    """Serve SentenceTransformer.encode behind FastAPI, in the dozen lines that everybody writes."""
    import torch
    import uvicorn
    from fastapi import Body, FastAPI
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    app = FastAPI()

    @app.post("/embed")
    def embed(inputs: Annotated[list[str], Body(embed=True)]) -> Any:  # FastAPI runs it in a thread
        return model.encode(inputs).tolist()

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def infinity(folder: str, port: int, threads: int) -> None:
    """Serve a bundle with infinity's own server; the number of threads is that of the process's CPUs."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    with tempfile.TemporaryDirectory(dir=folder) as linked:
        options = infinity_options(Path(folder), Path(linked))
        import uvicorn
        from infinity_emb import EngineArgs
        from infinity_emb.infinity_server import create_server

        app = create_server(engine_args_list=[EngineArgs(**options)])
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
