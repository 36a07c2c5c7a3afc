"""`python slow_server.py SECONDS [option=value …]`: a server whose model takes its time.

The model is one text a step; each step takes SECONDS, and notes itself on stderr, as does a call that is given up.
"""

from __future__ import annotations

import logging
import sys
import time
from types import SimpleNamespace

import numpy as np

from gte_deploy.core.calls import current_call
from gte_deploy.core.errors import CancelledCallError
from gte_deploy.core.spec import ModelSpec
from gte_deploy.serving.options import ServerOptions
from gte_deploy.serving.server import serve


class SlowModel:
    """Embeds a text in each step, and looks before each step whether the call goes on, as the queue does."""

    def __init__(self, seconds: float) -> None:
        self.spec = ModelSpec("embed", max_length=8, vocab_size=8, hidden_size=4, pad_token_id=0)
        self.path = "slow"
        self.joining = None
        self.tokenizer = SimpleNamespace(truncation_side="right")
        self._seconds = seconds

    def encode(self, texts, *args, **kwargs):
        for number in range(len(texts)):
            try:
                current_call().check()
            except CancelledCallError:
                print(f"given up before text {number}", file=sys.stderr, flush=True)
                raise
            print(f"text {number}", file=sys.stderr, flush=True)
            time.sleep(self._seconds)
        return np.ones((len(texts), 4), np.float32)

    def close(self) -> None:
        print("closed", file=sys.stderr, flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    options = dict(argument.split("=") for argument in sys.argv[2:])
    values = {name: float(value) if "." in value else int(value) for name, value in options.items()}
    model = SlowModel(float(sys.argv[1]))
    serve({"slow": lambda: model}, ServerOptions(port=0, warm_up=False, **values))
