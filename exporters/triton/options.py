"""The options of a Triton model repository."""

from dataclasses import dataclass
from pathlib import Path

from gte_deploy.bundle.signature import KeySource
from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option
from gte_deploy.text.inputs import check_integer

CUDA = "cuda"
_MAX_ROWS, _MOST, _MOST_PROCESSES = 1024, 1 << 20, 256
_QUEUE_SECONDS = (1e-3, 86_400)


def check_accelerator(value: str) -> str:
    """Check the provider that ONNX Runtime uses on a GPU.

    Raises:
        InputError: it is not "cuda"; the message names the replacement of "tensorrt".
    """
    if value != CUDA:
        raise InputError(
            f"accelerator is {value!r}, and ONNX Runtime serves GPUs only through {CUDA!r}. For TensorRT, build a plan "
            "with gte-export --format trt, and serve it with gte-export --format triton --engine BUNDLE."
        )
    return value


@dataclass(frozen=True)
class TritonOptions:
    """Options for serving a bundle.

    Args:
        engine: a bundle with a TensorRT plan, which is served in place of a graph for ONNX Runtime.
        accelerator: the provider that ONNX Runtime uses on a GPU: "cuda".
        max_batch_size: the most rows of one run of the encoder and of one request. By default 32 on a GPU and 8 on a
            CPU; with a plan, the most rows that one of its profiles takes, and for fill-mask at most 32. Of longer
            texts, a run has only as many rows as the plan takes at that length.
        max_queue_size: the most requests that may wait for a model; further requests are refused. By default there is
            no limit, because with a limit Triton's batcher lets single requests wait for half a second: see
            docs/triton.md.
        queue_timeout_s: seconds that a request may wait for a model before it is refused. By default there is no limit,
            for the same reason.
        threads: CPU threads inside one operator; by default the CPUs that this process may use.
        tokenizers: processes that tokenise; those that compute answers are half as many. By default 1 on a CPU; on a
            GPU half the CPUs of this machine, but at least 2.
        response_cache: whether the server caches answers, if it is started with a cache.
        model_version: number of the models' version folders.
        trusted_keys: public Ed25519 keys in PEM; the served bundle must be signed by one of them, as for
            `gte_deploy.load`. None takes any bundle.
    """

    engine: Path | None = option(
        None, "serve the TensorRT plan of this bundle, in place of MODEL", metavar="BUNDLE", parse=Path
    )
    accelerator: str = option(
        CUDA,
        "the provider that ONNX Runtime uses on a GPU; for TensorRT see --engine",
        metavar="NAME",
        parse=check_accelerator,
    )
    max_batch_size: int | None = option(
        None,
        "the most rows of one run and of one request (default: 32 on a GPU, 8 on a CPU)",
        metavar="ROWS",
        parse=int,
    )
    max_queue_size: int | None = option(
        None,
        "refuse further requests while so many wait for a model (default: no limit)",
        metavar="REQUESTS",
        parse=int,
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
    tokenizers: int | None = option(
        None,
        "processes that tokenise (default: on a GPU half the CPUs of this machine, at least 2; on a CPU 1)",
        metavar="N",
        parse=int,
    )
    response_cache: bool = option(False, "let the server cache answers, if it is started with a cache")
    model_version: int = option(1, "number of the models' version folders", metavar="N", parse=int)
    trusted_keys: tuple[KeySource, ...] | None = option(
        None,
        "serve only a bundle that this key has signed: a public Ed25519 key in PEM; repeat it to trust several keys, "
        "of which one is enough. The repository itself is not signed",
        flags=("--trusted-key",),
        metavar="FILE",
        repeated=True,
    )

    def check(self) -> None:
        """Check every value.

        Raises:
            InputError: a value is out of range; the message names the option, the value and the range.
        """
        check_accelerator(self.accelerator)
        for name, most in (
            ("max_batch_size", _MAX_ROWS),
            ("max_queue_size", _MOST),
            ("threads", _MOST),
            ("tokenizers", _MOST_PROCESSES),
            ("model_version", _MOST),
        ):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 1, most)
        shortest, longest = _QUEUE_SECONDS
        if self.queue_timeout_s is not None and not shortest <= self.queue_timeout_s <= longest:
            raise InputError(f"queue_timeout_s is {self.queue_timeout_s}; expected {shortest} to {longest:,} seconds")
