"""Measures the model gte_tokenizer of a Triton server alone: texts per second, and the CPU time of each part.

    python benchmarks/serving_tokenizer.py                      # the built-in model; about a minute
    python benchmarks/serving_tokenizer.py --tokenizers 2 --rows 1 32 --concurrency 64

The bundle is exported as a model repository and served by a real Triton on the same CPUs
(tests/support/triton_server.py). One process sends prepared gRPC messages, so that its own work is small; it, the
server and the tokenizer share the CPUs. The CPU time of each is read from /proc. For comparison, the tokenizers library
tokenises the same texts in this process, single-threaded.

JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving import _bundle, _repository, _settings, _version, load_texts, server_module
from side_by_side.artefacts import SUBJECTS, WORK, result_file
from side_by_side.report import table

from gte_deploy.backends.picks import cpu_model, engine_versions
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.files import write_text
from gte_deploy.text.tokenization import load_tokenizer

MODEL = "gte_tokenizer"
_CALL = "/inference.GRPCInferenceService/ModelInfer"
_WARM_UP_S = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """The result for one size of requests.

    Args:
        rows: texts in a request.
        concurrency: requests at the same time.
        texts_per_second: texts answered, divided by the seconds.
        requests_per_execution: requests that the tokenizer takes at once.
        median_ms: median milliseconds from request to answer.
        tokenizer_us, server_us, client_us: microseconds of CPU time for each text, in the tokenizer's processes, in
            the server's own process, and in this process.
    """

    rows: int
    concurrency: int
    texts_per_second: float
    requests_per_execution: float
    median_ms: float
    tokenizer_us: float
    server_us: float
    client_us: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    triton = server_module()
    triton.install()
    bundle = arguments.bundle or _bundle(arguments)
    texts = load_texts(bundle, *arguments.lengths)
    alone_us = library_us(bundle, texts)
    options = {"tokenizers": arguments.tokenizers, "max_batch_size": arguments.max_batch_size}
    with triton.Server(_repository(bundle, arguments.work, threads=1, **options)) as server:
        loads = [
            measure(server, texts, rows, concurrency, arguments.seconds)
            for rows in arguments.rows
            for concurrency in arguments.concurrency
        ]
    report = {
        "benchmark": "serving tokenizer",
        **_settings(bundle, arguments),
        "tokenizers": arguments.tokenizers,
        "max_batch_size": arguments.max_batch_size,
        "hardware": {"cpu": cpu_model(), "cpus": available_cpus()},
        "versions": {
            **engine_versions(),
            **{name: _version(name) for name in ("tokenizers", "tritonclient", "grpcio")},
            "tritonserver": triton.VERSION,
        },
        "library_us": alone_us,
        "loads": [asdict(load) for load in loads],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    print(summary(loads))
    print(f"The tokenizers library alone: {alone_us:.1f} us a text.\n{arguments.output}")
    return 0


def library_us(bundle: Path, texts: Sequence[str]) -> float:
    """Microseconds that the tokenizers library needs for each text, in batches of 32."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(bundle)._tokenizer
    rounds, size = 10, 32
    begin = time.perf_counter()
    for _ in range(rounds):
        for start in range(0, len(texts), size):
            tokenizer.encode_batch_fast(texts[start : start + size], add_special_tokens=False)
    return (time.perf_counter() - begin) / rounds / len(texts) * 1e6


def measure(server: Any, texts: Sequence[str], rows: int, concurrency: int, seconds: float) -> Load:
    """Send requests of `rows` texts, `concurrency` at a time, for some seconds."""
    import tritonclient.grpc

    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        outputs = [tensor.name for tensor in client.get_model_config(MODEL).config.output]
        messages = [
            _message([texts[(start + i) % len(texts)] for i in range(rows)], outputs)
            for start in range(0, len(texts), rows)
        ]
        asyncio.run(_send(server.grpc, messages, concurrency, min(_WARM_UP_S, seconds)))
        processes = _children(server.pid)
        before, executions = _cpu(server.pid, processes), _executions(client)
        begin = time.perf_counter()
        latencies = asyncio.run(_send(server.grpc, messages, concurrency, seconds))
        passed = time.perf_counter() - begin
        after = _cpu(server.pid, processes)
        executed = _executions(client) - executions
    count = len(latencies) * rows
    tokenizer_us, server_us, client_us = ((end - start) / count * 1e6 for start, end in zip(before, after, strict=True))
    return Load(
        rows=rows,
        concurrency=concurrency,
        texts_per_second=count / passed,
        requests_per_execution=len(latencies) / max(1, executed),
        median_ms=float(np.median(latencies)) * 1e3,
        tokenizer_us=tokenizer_us,
        server_us=server_us,
        client_us=client_us,
    )


def _message(texts: Sequence[str], outputs: Sequence[str]) -> bytes:
    """A request as gRPC sends it."""
    from tritonclient.grpc import InferInput, InferRequestedOutput, service_pb2

    messages: Any = service_pb2  # created at import, so type checkers cannot see it
    tensor = InferInput("TEXT", [len(texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=object))
    request = messages.ModelInferRequest(model_name=MODEL)
    request.inputs.append(tensor._get_tensor())
    request.outputs.extend(InferRequestedOutput(name)._get_tensor() for name in outputs)
    request.raw_input_contents.append(tensor._get_content())
    return bytes(request.SerializeToString())


async def _send(address: str, messages: Sequence[bytes], concurrency: int, seconds: float) -> list[float]:
    """Send the messages in turn; return the seconds from each request to its answer."""
    import grpc

    latencies: list[float] = []
    end = time.perf_counter() + seconds
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(_CALL)

        async def caller(number: int) -> None:
            while (begin := time.perf_counter()) < end:
                await call(messages[number % len(messages)])
                latencies.append(time.perf_counter() - begin)
                number += concurrency

        await asyncio.gather(*(caller(number) for number in range(concurrency)))
    return latencies


def _executions(client: Any) -> int:
    (statistics,) = client.get_inference_statistics(MODEL, as_json=True)["model_stats"]
    return int(statistics.get("execution_count", 0))


def _children(parent: int) -> list[int]:
    """The processes of the model: the Python backend starts one for each instance, and names the model's folder."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                own = int(_stat(int(folder.name))[1]) == parent
                if own and MODEL in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:  # the process ended
                continue
    return found


def _cpu(server: int, tokenizers: Sequence[int]) -> tuple[float, float, float]:
    """Seconds of CPU time so far: of the tokenizer's processes, of the server, and of this process."""

    def seconds(process: int) -> float:
        fields = _stat(process)
        return (int(fields[11]) + int(fields[12])) / _TICKS

    return sum(map(seconds, tokenizers)), seconds(server), time.process_time()


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may have spaces."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def summary(loads: Sequence[Load]) -> str:
    """Return a table with a line for each load."""
    head = ["texts a request", "requests at once", "texts/s", "p50 ms", "requests an execution"]
    head += [f"us CPU a text: {part}" for part in ("tokenizer", "server", "client")]
    rows = [
        [
            f"{load.rows}",
            f"{load.concurrency}",
            f"{load.texts_per_second:,.0f}",
            f"{load.median_ms:.2f}",
            f"{load.requests_per_execution:.1f}",
            *(f"{value:.1f}" for value in (load.tokenizer_us, load.server_us, load.client_us)),
        ]
        for load in loads
    ]
    return table(head, rows)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=tuple(SUBJECTS), default="tiny", help="model, made in the work folder")
    parser.add_argument("--bundle", type=Path, help="a bundle in place of --subject")
    parser.add_argument("--tokenizers", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--max-batch-size", type=int, default=32, help="the most texts of a request")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32], metavar="N", help="texts in a request")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="requests at once")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each load")
    parser.add_argument("--lengths", nargs=2, type=int, default=[8, 32], metavar=("SHORTEST", "LONGEST"), help="tokens")
    parser.add_argument("--work", type=Path, default=WORK, help="the work folder")
    parser.add_argument("--output", type=Path, default=result_file("serving-tokenizer", "json"), metavar="JSON")
    arguments = parser.parse_args(argv)
    if min(*arguments.rows, *arguments.concurrency, arguments.tokenizers) < 1 or arguments.seconds <= 0:
        parser.error("--rows, --concurrency, --tokenizers and --seconds must be positive")
    if max(arguments.rows) > arguments.max_batch_size:
        parser.error("--rows must not be above --max-batch-size")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
