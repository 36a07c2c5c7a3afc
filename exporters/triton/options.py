"""The options of a Triton model repository."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choices, option
from gte_deploy.text.inputs import check_integer

Accelerator = Literal["cuda", "tensorrt"]
_MAX_ROWS, _MOST = 1024, 1 << 20
_QUEUE_SECONDS = (1e-3, 86_400)


@dataclass(frozen=True)
class TritonOptions:
    """How a bundle is served.

    Args:
        engine: a bundle with a TensorRT plan, which is served in place of a graph for ONNX Runtime.
        accelerator: what ONNX Runtime runs on on a GPU: "cuda", or "tensorrt", which needs the bundle's graph of
            standard operators and builds an engine when the server starts.
        max_batch_size: rows of one run of the encoder and of one request; by default 32 on a GPU and 8 on a CPU, or
            what a plan takes at every length. A plan that takes so many for short texts only serves only those.
        max_queue_size: requests that may wait for a model; more are refused. By default there is no limit, since with
            one Triton's batcher lets single requests wait for half a second: see docs/triton.md.
        queue_timeout_s: seconds that a request may wait for a model before it is refused; by default there is no limit,
            for the same reason.
        threads: CPU threads inside one operator; by default the CPUs that this process may use.
        response_cache: let the server remember answers, where it is started with a cache.
        model_version: number of the models' version folders.
    """

    engine: Path | None = option(
        None, "serve the TensorRT plan of this bundle, in place of MODEL", metavar="BUNDLE", parse=Path
    )
    accelerator: Accelerator = option("cuda", "how ONNX Runtime runs on a GPU", choices=get_args(Accelerator))
    max_batch_size: int | None = option(
        None, "rows of one run and of one request (default: 32 on a GPU, 8 on a CPU)", metavar="ROWS", parse=int
    )
    max_queue_size: int | None = option(
        None, "refuse requests when so many wait for a model (default: no limit)", metavar="REQUESTS", parse=int
    )
    queue_timeout_s: float | None = option(
        None,
        "refuse a request that waits longer for a model (default: no limit)",
        flags=("--queue-timeout",),
        metavar="SECONDS",
        parse=float,
    )
    threads: int | None = option(
        None, "CPU threads inside one operator (default: the CPUs of this machine)", metavar="N", parse=int
    )
    response_cache: bool = option(False, "let the server remember answers, where it is started with a cache")
    model_version: int = option(1, "number of the models' version folders", metavar="N", parse=int)

    def check(self) -> None:
        """Check every value.

        Raises:
            InputError: naming the option, its value and its range.
        """
        check_choices(self)
        for name, most in (
            ("max_batch_size", _MAX_ROWS),
            ("max_queue_size", _MOST),
            ("threads", _MOST),
            ("model_version", _MOST),
        ):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 1, most)
        shortest, longest = _QUEUE_SECONDS
        if self.queue_timeout_s is not None and not shortest <= self.queue_timeout_s <= longest:
            raise InputError(f"queue_timeout_s is {self.queue_timeout_s}; expected {shortest} to {longest:,} seconds")
