"""Clients of frameworks, in an environment of their own, ask `gte-deploy serve`; sentence-transformers is the judge."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from environments import Unavailable, interpreter
from http_server import ServerProcess, serve_command

SCRIPT = Path(__file__).parent / "scripts" / "served_clients.py"
TEXTS = ["Paris is the capital of France.", "the king walked to the river", "a good book to read"]
QUERY = "the capital"


@pytest.mark.consumers
def test_clients_of_frameworks(word_checkpoints, bundle_of, tmp_path):
    from sentence_transformers import CrossEncoder, SentenceTransformer

    try:
        python = interpreter("clients")
    except Unavailable as error:
        pytest.skip(f"clients of frameworks: {error}")
    models = {"embed": word_checkpoints["embed"], "rank": word_checkpoints["classify"]}
    server = ServerProcess(
        serve_command(*(f"{name}={bundle_of(checkpoint)}" for name, checkpoint in models.items())), cwd=tmp_path
    )
    try:
        server.wait_until_ready()
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
        command = [str(python), str(SCRIPT), server.url, json.dumps(TEXTS), QUERY]
        run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:] + server.log[-2000:]
    finally:
        server.kill()
    found = json.loads(run.stdout.splitlines()[-1])
    vectors = SentenceTransformer(str(models["embed"]), device="cpu").encode(TEXTS, normalize_embeddings=True)
    for name, theirs in found["vectors"].items():
        np.testing.assert_allclose(theirs, vectors, rtol=1e-4, atol=1e-5, err_msg=name)
    expected = CrossEncoder(str(models["rank"]), device="cpu").rank(QUERY, TEXTS, top_k=2)
    for name, ranking in found["rankings"].items():
        assert [index for index, _ in ranking] == [entry["corpus_id"] for entry in expected], name
        scores = [entry["score"] for entry in expected]
        np.testing.assert_allclose([score for _, score in ranking], scores, rtol=1e-4, atol=1e-5, err_msg=name)
