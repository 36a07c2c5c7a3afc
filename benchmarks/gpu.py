"""Compares gte-deploy with other ways to run the model on an NVIDIA GPU: speed, memory, accuracy.

    python benchmarks/gpu.py                              # everything, base size; hours
    python benchmarks/gpu.py --claims-only --subjects tiny   # only the first checks
    python benchmarks/gpu.py --quick                      # few shapes and repeats
    python benchmarks/gpu.py --contestants torch "ORT CUDA fp16" --shapes 1x512 8x8192
    python benchmarks/gpu.py --device cpu --subjects tiny --shapes 2x16    # tries the benchmark itself

Contestants are torch eager, compiled and padding-free; ONNX Runtime's CUDA provider on the traced graph and on
ours, and its TensorRT provider; TensorRT and TensorRT-RTX in FP16, BF16, INT8 and FP8. Those with "CLS" pool by the
first token, so that the last layer need not compute the others: ONNX Runtime runs a part of its graph, and "answer
alone" is an engine of --outputs answer, beside one of all outputs. The benchmark needs
`pip install '.[bench]'`, and onnxruntime-gpu, tensorrt or tensorrt-rtx for their rows. A contestant that is not
installed, cannot be exported for this GPU, or fails, becomes a row with the reason. Without a GPU nothing is measured,
and the exit code is 1.

Before anything is timed, each of our contestants that embeds, TensorRT first, is checked for what the documents claim:
finite answers near torch in FP32 at lengths from 1 to 8,192, a hit rate of 95 % in simulated traffic (a hit is a run
that creates no context and captures no CUDA graph), and the seconds of the first run with and without the kernels that
an earlier process compiled.

Every contestant has a process of its own. First each runs alone on the GPU, for its accuracy on held-out text against
torch in FP32 and its peak GPU memory for every shape. Then the contestants are timed round robin, as many together as
fit on the GPU at these peaks, with a pause of 0.1 s before each call; medians and quartiles are over the rounds. Each
takes one padded batch of ids in host memory, and returns float32 in host memory.

    1x16 … 64x8192   rows x tokens
    mixed            32 texts, 16 to 512 tokens: 56 % of the tokens of the padded batch are real

Graphs, bundles and engines are made once in the work folder. Results go to benchmarks/results/ as JSON, Markdown and a
chart after every step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from gpu_side_by_side import claims
from gpu_side_by_side.chart import draw
from gpu_side_by_side.contestants import CONTESTANTS, EXACT, REFERENCE, Contestant
from gpu_side_by_side.meter import Meter
from gpu_side_by_side.report import markdown
from side_by_side.accuracy import agreement, cosines
from side_by_side.artefacts import ROOT, SUBJECTS, Artefacts, Subject, result_file
from side_by_side.workloads import Job, Workload, heldout_job, make_workload, masked

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.core.files import write_text
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer
from gte_deploy.tuning.measure import Worker, WorkerError, interleaved

SHAPES = tuple(f"{rows}x{tokens}" for rows in (1, 8, 64) for tokens in (16, 128, 512, 2048, 8192))
QUICK_SHAPES = ("1x16", "1x512", "8x128", "64x128", "8x2048")
DISTRIBUTIONS = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "flash-attn",
    "numpy",
)
_SHARE_OF_MEMORY = 0.9
_LEAST_ROUNDS = 3
_ACCURACY_LENGTH = 512
FAILURE = 1


class Run:
    """The settings of a run, the results so far, and where they are written."""

    def __init__(self, arguments: argparse.Namespace, meter: Worker | None) -> None:
        self.arguments = arguments
        self.meter = meter
        hardware = {"device": arguments.device, "cpu": cpu_model()}
        self.report: dict[str, Any] = {
            "benchmark": "gpu",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commands": [shlex.join(["python", *sys.orig_argv[1:]])],
            "hardware": hardware | (meter.call("describe").value if meter else {}),
            "versions": _versions(),
            "claims": [],
            "accuracy": [],
            "memory": [],
            "measurements": [],
        }

    def save(self) -> None:
        """Write the JSON and the table."""
        output: Path = self.arguments.output
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(self.report, indent=1) + "\n")
        write_text(output.with_suffix(".md"), markdown(self.report))

    def open(self, contestant: Contestant, artefacts: Artefacts) -> Worker:
        """Start a contestant in its own process.

        Raises:
            WorkerError: the contestant's artefact cannot be made, or the contestant cannot be opened.
        """
        folder = artefacts.path(contestant.artefact)
        timeout_s = self.arguments.call_minutes * 60
        device = self.arguments.device
        return Worker(_make, contestant.factory, (folder, device), dict(contestant.options), timeout_s=timeout_s)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    with ExitStack() as stack:
        meter = None
        if arguments.device == "cuda":
            try:
                meter = stack.enter_context(Worker(Meter))
            except WorkerError as error:
                print(
                    f"gpu: nothing was measured: {error}. Use a machine with a GPU; --device cpu tests the benchmark.",
                    file=sys.stderr,
                )
                return FAILURE
        run = Run(arguments, meter)
        arguments.output = arguments.output or result_file("gpu", "json", hardware=run.report["hardware"].get("gpu"))
        subjects = [SUBJECTS[name] for name in arguments.subjects]
        for subject in subjects:
            _check_claims(run, subject)
        for subject in subjects if not arguments.claims_only else []:
            _measure_subject(run, subject)
    run.save()
    for subject in arguments.subjects:
        draw(run.report, subject, arguments.output.with_name(f"{arguments.output.stem}-{subject}.png"))
    print(json.dumps(run.report) if arguments.json else markdown(run.report))
    _say(f"written to {arguments.output}")
    return 0


def _make(factory: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return factory(*arguments, **options)


def _artefacts(run: Run, subject: Subject) -> Artefacts:
    return Artefacts(run.arguments.work, subject, max_length=run.arguments.max_length, progress=_say)


# --- first: the claims ----------------------------------------------------------------------------------------------


def _check_claims(run: Run, subject: Subject) -> None:
    """Check our contestants that embed, and write the rows after each."""
    ours = [one for one in run.arguments.contestants if one.is_ours] if subject.task == "embed" else []
    if not ours:
        return
    artefacts = _artefacts(run, subject)
    jobs = claims.jobs_of(load_tokenizer(artefacts.path("checkpoint")), run.arguments.max_length)
    exact = next(one for one in CONTESTANTS if one.name == EXACT)
    with run.open(exact, artefacts) as worker:
        methods = {one.right_answer for one in ours}
        expected = {name: [worker.call(name, job).value for job in jobs] for name in methods}
    for one in sorted(ours, key=lambda one: "TensorRT" not in one.name):
        _say(f"{subject.name}: the claims of {one.name}")
        row: dict[str, Any] = {**_about(subject, one), "error": None}
        try:
            folder, device = artefacts.path(one.artefact), run.arguments.device
            row |= claims.check(
                one, folder, device, jobs, expected[one.right_answer], run.arguments.work / "claims-cache"
            )
        except WorkerError as error:
            row["error"] = str(error)
        _say(f"{subject.name}: the claims of {one.name}: {row['error'] or row}")
        run.report["claims"].append(row)
        run.save()


def _measure_subject(run: Run, subject: Subject) -> None:
    arguments = run.arguments
    artefacts = _artefacts(run, subject)
    tokenizer = load_tokenizer(artefacts.path("checkpoint"))
    workloads = [make_workload(name) for name in arguments.shapes] if subject.task == "embed" else []
    expected: dict[str, Any] = {}
    usable: list[Contestant] = []
    for contestant in arguments.contestants:
        try:
            _measure_alone(run, artefacts, contestant, workloads, tokenizer, expected)
            usable.append(contestant)
        except WorkerError as error:
            _say(f"{subject.name}: {contestant.name}: {error}")
            run.report["accuracy"].append({**_about(subject, contestant), "error": str(error)})
            run.report["measurements"] += [
                {**_row(subject, workload, contestant), "error": str(error)} for workload in workloads
            ]
        run.save()
    with ExitStack() as stack:
        opened: dict[str, Worker] = {}
        stack.callback(lambda: [worker.close() for worker in opened.values()])
        for workload in sorted(workloads, key=_size):
            for group in _groups(run, subject, workload, usable):
                for name in set(opened) - {one.name for one in group}:
                    opened.pop(name).close()
                _measure_together(run, artefacts, workload, group, tokenizer, opened)
                run.save()


def _size(workload: Workload) -> tuple[int, int]:
    return workload.padded_tokens, max(workload.lengths)


# --- alone: accuracy and memory -------------------------------------------------------------------------------------


def _measure_alone(
    run: Run,
    artefacts: Artefacts,
    contestant: Contestant,
    workloads: Sequence[Workload],
    tokenizer: TextTokenizer,
    expected: dict[str, Any],
) -> None:
    """Measure accuracy on text, then peak memory in each workload; contestant EXACT fills in `expected`.

    Raises:
        WorkerError: the contestant cannot be opened, or its answers cannot be compared.
    """
    subject = artefacts.subject
    artefacts.path(contestant.artefact)  # made before the meter starts, to keep its memory out
    _say(f"{subject.name}: {contestant.name} alone")
    with ExitStack() as stack:
        if run.meter:
            run.meter.call("start")
            stack.callback(run.meter.call, "stop")
        worker = stack.enter_context(run.open(contestant, artefacts))
        row = _accuracy(run, worker, subject, contestant, tokenizer, expected)
        run.report["accuracy"].append(row)
        for workload in sorted(workloads, key=_size):
            found: dict[str, Any] = {**_about(subject, contestant), "workload": workload.name}
            try:
                worker.call("embed", workload.job(tokenizer))
                found |= {"error": None, "peak_bytes": run.meter.call("peak_bytes").value if run.meter else None}
            except WorkerError as error:
                found |= {"error": str(error), "peak_bytes": None}
            if found["error"] or run.meter:
                run.report["memory"].append(found)
            if found["error"]:
                break  # a larger workload would fail too, and the process may be dead


def _accuracy(
    run: Run,
    worker: Worker,
    subject: Subject,
    contestant: Contestant,
    tokenizer: TextTokenizer,
    expected: dict[str, Any],
) -> dict[str, Any]:
    longest = min(_ACCURACY_LENGTH, run.arguments.max_length)
    job = heldout_job(tokenizer, texts=run.arguments.accuracy_texts, longest=longest)
    methods = ["embed", *(["token_embeddings"] if contestant.gives_states else [])]
    if contestant.name == EXACT:
        methods.append("first_tokens")
    if subject.task == "fill-mask":
        assert tokenizer.mask_token_id is not None
        methods, job = ["mask_logits"], masked(job, tokenizer.mask_token_id)
    answers = {name: worker.call(name, job).value for name in methods}
    if contestant.name == EXACT:
        expected |= answers
    row: dict[str, Any] = {**_about(subject, contestant), "error": None}
    for name, value in answers.items():
        right = expected.get(contestant.right_answer if name == "embed" else name)
        if right is not None:
            row[name] = agreement(right, value, job) if name == "mask_logits" else cosines(right, value)
    return row


# --- together: time -------------------------------------------------------------------------------------------------


def _groups(run: Run, subject: Subject, workload: Workload, usable: Sequence[Contestant]) -> Iterator[list[Contestant]]:
    """Yield groups that fit on the GPU at once, each with the reference; without a GPU, one group of all."""
    taken = {
        row["contestant"]: row["peak_bytes"]
        for row in run.report["memory"]
        if row["subject"] == subject.name and row["workload"] == workload.name and row["error"] is None
    }
    failed = {
        row["contestant"]: row
        for row in run.report["memory"]
        if row["subject"] == subject.name and row["error"] is not None
    }
    able = [one for one in usable if not _is_beyond(workload, failed.get(one.name))]
    for one in usable:
        if one not in able:
            error = failed[one.name]["error"]
            run.report["measurements"].append({**_row(subject, workload, one), "error": error})
    if not run.meter:
        yield from [able] if able else []
        return
    free = _SHARE_OF_MEMORY * run.meter.call("free_bytes").value
    reference = [one for one in able if one.name == REFERENCE]
    base = sum(taken.get(one.name, 0) for one in reference)
    group, size = list(reference), base
    for one in able:
        if one in reference:
            continue
        needs = taken.get(one.name, 0)
        if len(group) > len(reference) and size + needs > free:
            yield group
            group, size = list(reference), base
        group.append(one)
        size += needs
    if group:
        yield group


def _is_beyond(workload: Workload, failure: dict[str, Any] | None) -> bool:
    """Whether a contestant failed alone at this workload or at a smaller one."""
    if failure is None:
        return False
    return _size(workload) >= _size(make_workload(failure["workload"]))


def _measure_together(
    run: Run,
    artefacts: Artefacts,
    workload: Workload,
    group: Sequence[Contestant],
    tokenizer: TextTokenizer,
    opened: dict[str, Worker],
) -> None:
    """Time one workload, interleaved, and add the rows; missing workers are opened and added to `opened`."""
    subject = artefacts.subject
    _say(f"{subject.name} {workload.name}: {', '.join(one.name for one in group)}")
    job = workload.job(tokenizer)
    calls: dict[str, Callable[[], float]] = {}
    errors: dict[str, str] = {}
    for one in group:
        try:
            if one.name not in opened:
                opened[one.name] = run.open(one, artefacts)
            calls[one.name] = _warm_call(opened[one.name], job)
        except WorkerError as error:
            errors[one.name] = str(error)
    budget_s = run.arguments.minutes_per_shape * 60
    at_least = min(_LEAST_ROUNDS, run.arguments.repeats)
    seconds, failed = interleaved(calls, repeats=run.arguments.repeats, at_least=at_least, budget_s=budget_s)
    errors |= failed
    for name in errors.keys() & opened.keys():  # the process may be dead: the next workload gets a new one
        opened.pop(name).close()
    done = {(row["subject"], row["workload"], row["contestant"]) for row in run.report["measurements"]}
    for one in group:
        if (subject.name, workload.name, one.name) in done:
            continue  # the reference, in a second group
        row = _row(subject, workload, one)
        if one.name in errors:
            row["error"] = errors[one.name]
        else:
            row |= {"seconds": seconds[one.name], "reference_seconds": seconds.get(REFERENCE, [])}
        result = row["error"] or f"{statistics.median(row['seconds']) * 1000:.2f} ms"
        _say(f"{subject.name} {workload.name}: {one.name}: {result}")
        run.report["measurements"].append(row)


def _warm_call(worker: Worker, job: Job) -> Callable[[], float]:
    """Run two calls, which compile, tune, allocate and capture CUDA graphs, and return the call to time.

    Raises:
        WorkerError: the contestant fails, or gives numbers that are not finite.
    """
    for _ in range(2):
        answer = worker.call("embed", job)
    if not np.isfinite(answer.value).all():
        raise WorkerError("an embedding is not finite")
    return lambda: worker.call("embed", job).seconds


def _about(subject: Subject, contestant: Contestant) -> dict[str, Any]:
    return {
        "subject": subject.name,
        "contestant": contestant.name,
        "precision": contestant.precision,
        "ours": contestant.is_ours,
    }


def _row(subject: Subject, workload: Workload, contestant: Contestant) -> dict[str, Any]:
    return {
        **_about(subject, contestant),
        "workload": workload.name,
        "texts": len(workload.lengths),
        "tokens": workload.tokens,
        "padded_tokens": workload.padded_tokens,
        "seconds": [],
        "reference_seconds": [],
        "error": None,
    }


def _versions() -> dict[str, str]:
    versions = {"gte-deploy": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=["base", "tiny-fill-mask"])
    parser.add_argument("--shapes", nargs="+", metavar="WORKLOAD", help="ROWSxTOKENS or mixed")
    parser.add_argument(
        "--contestants", nargs="+", metavar="PART", help="those whose name has one of these parts (default: all)"
    )
    parser.add_argument("--claims-only", action="store_true", help="end after the claims, before anything is timed")
    parser.add_argument("--quick", action="store_true", help=f"only {' '.join(QUICK_SHAPES)}; few repeats")
    parser.add_argument("--repeats", type=int, help="most rounds (default: 30; 5 with --quick)")
    parser.add_argument("--minutes-per-shape", type=float, default=5, help="limit for timing (default: 5)")
    parser.add_argument("--call-minutes", type=float, default=10, help="limit for one call (default: 10)")
    parser.add_argument("--accuracy-texts", type=int, default=64, metavar="N")
    parser.add_argument("--max-length", type=int, default=8192, metavar="TOKENS", help="limit of the exported bundles")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the benchmark itself")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-benchmark", help="the work folder")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-gpu-GPU.json")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or [*(QUICK_SHAPES if arguments.quick else SHAPES), "mixed"]
    for name in arguments.shapes:
        if name != "mixed" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
            parser.error(f"--shapes: {name!r} is neither ROWSxTOKENS nor mixed")
        longest = max(make_workload(name).lengths)
        if longest > arguments.max_length:
            parser.error(
                f"--shapes: {name!r} has texts of {longest:,} tokens, and --max-length is {arguments.max_length:,}"
            )
    arguments.repeats = arguments.repeats or (5 if arguments.quick else 30)
    parts = arguments.contestants
    chosen = [one for one in CONTESTANTS if parts is None or any(part in one.name for part in parts)]
    if not chosen:
        parser.error(f"--contestants: no name has such a part; there are {', '.join(one.name for one in CONTESTANTS)}")
    # EXACT gives the right answers and REFERENCE the speed of 1, so both always run.
    arguments.contestants = [one for one in CONTESTANTS if one in chosen or one.name in (EXACT, REFERENCE)]
    return arguments


def _say(line: str) -> None:
    print(f"gpu: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
