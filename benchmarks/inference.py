"""Compares gte-deploy with other ways to run the same model on the CPU: speed, memory, accuracy.

    python benchmarks/inference.py                          # everything; an hour and more on two cores
    python benchmarks/inference.py --quick                  # without the large size and three workloads; few repeats
    python benchmarks/inference.py --subjects base --shapes 1x512 8x128 --contestants torch gte-deploy --repeats 3
    python benchmarks/inference.py --resume benchmarks/results/2026-01-31-inference-some-cpu.json

It needs `pip install '.[bench]'`, and `python tests/support/environments.py` for peers that need other versions of our
requirements; a peer that is not installed, or fails, becomes a row with the reason. Every contestant has a process of
its own on the same CPUs, which is idle while others run. Calls go round robin with a pause of 0.1 s before each;
medians and quartiles are over the rounds. A contestant whose interface takes texts gets texts, as in a user's default
call; any other gets one padded batch of ids, and of a list, batches of 32 texts in the given order.

    1x16 … 1x8192   rows x tokens; from 4,096 tokens each contestant is alone in memory, and its peak is reported
    mixed           32 texts, 16 to 512 tokens: 56 % of the tokens of one padded batch are real
    mixed-padded    the same texts as one padded batch on our engines: shows the gain of our own batching
    list-256x32     a list of 256 texts of 32 tokens; likewise list-64x128, or any other
    list-mixed      a list of 128 texts, median 48 tokens, up to 512
    short-corpus    256 texts of up to 32 tokens
    corpus          2,000 texts, median 32 tokens, up to 512

A fixed matrix product in every round, and the CPU times of the system, tell how much other programs disturb. The
benchmark does not start on a machine that is too noisy, and a measurement that was disturbed has no result, so that
--resume repeats it; with --allow-noise it is kept and marked. Where the CPU's energy counters (RAPL) can be read, a
row has the joules of a call, with those of the rest of the machine.

Subjects are the base size and, for two shapes, the large size, both with seeded random weights. The built-in trained
model serves for the corpora and for accuracy on held-out text. All subjects, graphs and bundles are made once in the
work folder. Results go to benchmarks/results/ as JSON, Markdown and a chart after every step; --resume continues from
the JSON. The Markdown ends with a table of bars: how many times as fast as the fastest peer ours has to be, and is.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side.accuracy import agreement, cosines
from side_by_side.artefacts import SUBJECTS, WORK, Artefacts, Subject, result_file
from side_by_side.contestants import CONTESTANTS, REFERENCE, Contestant, reference_of
from side_by_side.environments import ENVIRONMENTS, EnvironmentWorker, interpreter, versions
from side_by_side.gemm import SIZE, Gemm, method
from side_by_side.machine import Calibration, CpuTimes, Energy, Noise, busy_share, kernel_of, kernels
from side_by_side.report import markdown
from side_by_side.workloads import NAMES, Workload, heldout_job, make_workload, masked

from gte_deploy._version import __version__
from gte_deploy.backends.picks import cpu_model
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.files import write_text
from gte_deploy.text.tokenization import load_tokenizer
from gte_deploy.tuning.measure import Worker, WorkerError, interleaved

WORKLOADS = {
    "base": [name for name in NAMES if name not in ("short-corpus", "corpus")],
    "large": ("1x128", "1x512"),
    "tiny": ("short-corpus", "corpus"),
    "tiny-fill-mask": (),
}
_LEFT_OUT_BY_QUICK = ("corpus", "list-64x128", "1x4096")
_LEAST_ROUNDS = 3
_CALIBRATIONS = 7
_CALIBRATION = "calibration"

DISTRIBUTIONS = (
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "nncf",
    "sentence-transformers",
    "fastembed",
    "light-embed",
    "numpy",
    "tokenizers",
)
PEER_DISTRIBUTIONS = ("optimum-intel", "optimum-onnx", "infinity-emb")


@dataclasses.dataclass
class Run:
    """The settings of a run, the results so far, and where they are written."""

    arguments: argparse.Namespace
    report: dict[str, Any]
    deadline: float
    calibration: Worker
    energy: Energy

    def lacks(self, subject: Subject, workload: Workload, contestant: Contestant) -> bool:
        """Whether this still has to be measured; failed and omitted measurements are repeated."""
        key = (subject.name, workload.name, contestant.name)
        return contestant.method_for(workload) is not None and not any(
            (row["subject"], row["workload"], row["contestant"]) == key and row["error"] is None
            for row in self.report["measurements"]
        )

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Add a row, in place of an older row of the same subject, workload and contestant."""
        key = [row.get(name) for name in ("subject", "workload", "contestant")]
        others = [
            old for old in self.report[table] if [old.get(k) for k in ("subject", "workload", "contestant")] != key
        ]
        self.report[table] = [*others, row]

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
        python = self.require(contestant)
        folder = artefacts.path(contestant.artefact)
        arguments = (contestant.factory, (folder, self.arguments.threads), dict(contestant.options))
        limits: dict[str, Any] = {"cpus": self.arguments.threads, "timeout_s": self.arguments.call_minutes * 60}
        return EnvironmentWorker(python, *arguments, **limits) if python else Worker(_make, *arguments, **limits)

    def require(self, contestant: Contestant) -> Path | None:
        """Return the interpreter of a contestant that has an environment of its own.

        Raises:
            WorkerError: the CPU lacks what the contestant needs, or its environment is missing.
        """
        if lack := contestant.what_lacks(self.report["hardware"]["kernels"]):
            raise WorkerError(lack)
        return None if contestant.environment is None else interpreter(contestant.environment)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    with ExitStack() as stack:
        calibration = stack.enter_context(Worker(Calibration, arguments.threads, cpus=arguments.threads))
        _refuse_noise(arguments, calibration)
        energy = Energy()
        report = _report(arguments)
        report["no_energy"] = energy.reason
        run = Run(arguments, report, 0.0, calibration, energy)
        _measure_all(run)
    _draw(run)
    print(json.dumps(run.report) if arguments.json else markdown(run.report))
    _say(f"written to {arguments.output}")
    return 0


def _refuse_noise(arguments: argparse.Namespace, calibration: Worker) -> None:
    """Stop before anything is made or measured, if the machine is too noisy to compare."""
    before, busy = CpuTimes.now(), busy_share()
    seconds = [calibration.call("product").seconds for _ in range(_CALIBRATIONS)]
    reason = Noise.of(seconds, busy=busy, steal=CpuTimes.now().shares_since(before)[1]).reason()
    if reason is not None and not arguments.allow_noise:
        raise SystemExit(
            f"the machine is too noisy to compare: {reason}. End other programs, or take --allow-noise, which marks "
            "the results as noisy."
        )


def _measure_all(run: Run) -> None:
    arguments = run.arguments
    subjects = [SUBJECTS[name] for name in arguments.subjects]
    stages = {subject.name: _artefacts(subject, arguments) for subject in subjects}
    for artefacts in stages.values():
        _prepare(run, artefacts)
    run.deadline = time.monotonic() + arguments.minutes * 60
    _measure_gemm(run)
    for artefacts in stages.values():
        _measure_accuracy(run, artefacts)
    units = [unit for artefacts in stages.values() for unit in _units(run, artefacts)]
    left = sum(len(unit.workloads) for unit in units)
    for unit in units:
        with ExitStack() as stack:
            opened: dict[str, Worker | str] = {}
            for workload in unit.workloads:
                _measure(run, unit, workload, stack, opened, budget_s=(run.deadline - time.monotonic()) / left)
                left -= 1
                run.save()
    run.save()


def _make(factory: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return factory(*arguments, **options)


# --- preparation ----------------------------------------------------------------------------------------------------


def _artefacts(subject: Subject, arguments: argparse.Namespace) -> Artefacts:
    return Artefacts(arguments.work, subject, max_length=arguments.max_length, progress=_say)


def _prepare(run: Run, artefacts: Artefacts) -> None:
    """Make everything before any measurement; report once what cannot be made. Its rows repeat the reason."""
    for contestant in run.arguments.contestants:
        try:
            run.require(contestant)
            artefacts.path(contestant.artefact)
        except WorkerError as error:
            _say(f"{artefacts.subject.name}: {contestant.name} is left out: {error}")


@dataclasses.dataclass(frozen=True)
class Unit:
    """Contestants that are in memory together, and the workloads to measure with them, in order."""

    artefacts: Artefacts
    workloads: list[Workload]
    group: list[Contestant]


def _units(run: Run, artefacts: Artefacts) -> Iterator[Unit]:
    """Yield a subject's remaining units. Every group has the reference; for a large text, each contestant is alone."""
    subject = artefacts.subject
    workloads = _workloads(run, subject)
    together = [one for one in workloads if not one.is_alone and not one.is_list]
    for part in (together, [one for one in workloads if one.is_list]):
        reference = [one for one in run.arguments.contestants if part and one.name == reference_of(part[0].name)]
        missing = [
            one
            for one in run.arguments.contestants
            if one not in reference and any(run.lacks(subject, workload, one) for workload in part)
        ]
        size = _group_size(run, artefacts)
        groups = [[*reference, *missing[i : i + size]] for i in range(0, len(missing), size)]
        if not missing and any(run.lacks(subject, workload, one) for workload in part for one in reference):
            groups = [reference]
        for group in groups:
            yield Unit(artefacts, part, group)
    for workload in workloads:
        if workload.is_alone:
            for one in run.arguments.contestants:
                if run.lacks(subject, workload, one):
                    yield Unit(artefacts, [workload], [one])


def _workloads(run: Run, subject: Subject) -> list[Workload]:
    names = run.arguments.shapes or WORKLOADS[subject.name]
    if subject.task != "embed":
        return []
    if run.arguments.quick and subject.name != "tiny":
        names = [name for name in names if name not in _LEFT_OUT_BY_QUICK]
    return [make_workload(name, corpus_texts=run.arguments.corpus_texts) for name in names]


def _group_size(run: Run, artefacts: Artefacts) -> int:
    """Return how many contestants fit in memory beside the reference, at twice the weights and 0.5 GB for each."""
    if run.arguments.hold:
        return run.arguments.hold
    try:
        weights = (artefacts.path("checkpoint") / "model.safetensors").stat().st_size
    except WorkerError:
        return 1
    return max(1, int(0.8 * _available_bytes() / (2 * weights + 5e8)) - 1)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


# --- measuring ------------------------------------------------------------------------------------------------------


def _measure(
    run: Run, unit: Unit, workload: Workload, stack: ExitStack, opened: dict[str, Worker | str], *, budget_s: float
) -> None:
    """Time one workload on a group of contestants, interleaved, and add their rows.

    `opened` maps names to the group's workers, or to the error of a worker that could not be opened. This function
    opens missing workers.
    """
    subject, reference = unit.artefacts.subject, reference_of(workload.name)
    wanted = [one for one in unit.group if run.lacks(subject, workload, one)]
    if wanted:
        wanted = [one for one in unit.group if one in wanted or (one.name == reference and one.method_for(workload))]
    offered = run.report["hardware"]["kernels"]
    rows = {one.name: _row(subject.name, workload, one, kernel_of(one.precision, offered)) for one in wanted}
    if time.monotonic() > run.deadline:
        for row in rows.values():
            run.add("measurements", {**row, "error": f"left out: the {run.arguments.minutes:g} minutes were over"})
        return
    _say(f"{subject.name} {workload.name}: {', '.join(rows)}")
    started = time.monotonic()
    joules: dict[str, list[float]] = {}
    calls: dict[str, Callable[[], float]] = {_CALIBRATION: lambda: run.calibration.call("product").seconds}
    errors: dict[str, str] = {}
    for one in wanted:
        try:
            if one.name not in opened:
                opened[one.name] = stack.enter_context(run.open(one, unit.artefacts))
            worker = opened[one.name]
            if isinstance(worker, str):
                raise WorkerError(worker)
            call = _warm_call(worker, one, workload, unit.artefacts)
            calls[one.name] = call if run.energy.reason else _metered(call, run.energy, joules.setdefault(one.name, []))
        except WorkerError as error:
            opened.setdefault(one.name, str(error))
            errors[one.name] = str(error)
    at_least = 1 if workload.is_alone or workload.is_list else min(_LEAST_ROUNDS, run.arguments.repeats)
    before, busy = CpuTimes.now(), busy_share()
    calibration = [run.calibration.call("product").seconds for _ in range(_CALIBRATIONS)]
    left = budget_s - (time.monotonic() - started)
    seconds, failed = interleaved(calls, repeats=run.arguments.repeats, at_least=at_least, budget_s=left)
    errors |= failed
    calibration += seconds[_CALIBRATION]
    noise = Noise.of(calibration, busy=busy, steal=CpuTimes.now().shares_since(before)[1])
    for name, row in rows.items():
        worker = opened[name]
        if name in errors:
            row["error"] = errors[name]
            if isinstance(worker, Worker):  # the process may be dead: the next workload gets a new one
                opened.pop(name)
                worker.close()
        elif isinstance(worker, Worker):
            row |= {"seconds": seconds[name], "reference_seconds": seconds.get(reference, [])}
            row |= {"peak_bytes": worker.peak_bytes, "joules": joules.get(name), "noise": noise.reason()}
            if row["noise"] and not run.arguments.allow_noise:
                row |= {"seconds": [], "error": f"the machine was too noisy: {row['noise']}"}
        result = row["error"] or f"{statistics.median(row['seconds']):.4f} s"
        _say(f"{subject.name} {workload.name}: {name}: {result}")
        if row["error"] is None or run.lacks(subject, workload, next(one for one in wanted if one.name == name)):
            run.add("measurements", row)


def _row(subject: str, workload: Workload, contestant: Contestant, kernel: str | None) -> dict[str, Any]:
    return {
        "subject": subject,
        "workload": workload.name,
        "contestant": contestant.name,
        "precision": contestant.precision,
        "kernel": kernel,
        "ours": contestant.is_ours,
        "takes_texts": contestant.takes_texts,
        "texts": len(workload.lengths),
        "tokens": workload.tokens,
        "padded_tokens": workload.padded_tokens,
        "flops": _flops(subject, workload),
        "alone": workload.is_alone,
        "seconds": [],
        "reference_seconds": [],
        "peak_bytes": None,
        "joules": None,
        "noise": None,
        "error": None,
    }


def _flops(subject: str, workload: Workload) -> float:
    """Return the FLOPs of the real tokens in the layers; a multiply-add counts as two."""
    from gte_deploy.models.presets import preset

    config = preset(SUBJECTS[subject].preset)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    dense = (4 * hidden * hidden + 3 * hidden * wide) * workload.tokens
    attention = 2 * hidden * sum(length * length for length in workload.lengths)
    return 2.0 * config["num_hidden_layers"] * (dense + attention)


def _metered(call: Callable[[], float], energy: Energy, joules: list[float]) -> Callable[[], float]:
    """Return a call that appends its joules. The machine's other energy is in them, that of the pause is not."""

    def metered() -> float:
        energy.joules()
        seconds = call()
        joules.append(energy.joules())
        return seconds

    return metered


def _warm_call(worker: Worker, contestant: Contestant, workload: Workload, artefacts: Artefacts) -> Callable[[], float]:
    """Run a first call, in which the contestant allocates and compiles, and return the call to time."""
    tokenizer = load_tokenizer(artefacts.path("checkpoint"))
    method = contestant.method_for(workload)
    assert method is not None  # a group has only contestants with a method for its workloads
    job = workload.job(tokenizer)
    if workload.is_alone:
        worker.call(method, make_workload("1x16").job(tokenizer))
    else:
        answer = worker.call(method, workload.job(tokenizer, texts=32) if workload.is_list else job)
        if not np.isfinite(answer.value).all():
            raise WorkerError("an embedding is not finite")
    return lambda: worker.call(method, job).seconds


def _measure_gemm(run: Run) -> None:
    if run.report["gemm_peak"]:
        return
    _say("GEMM peaks")
    offered = run.report["hardware"]["kernels"]
    with Worker(Gemm, run.arguments.threads, SIZE, offered, cpus=run.arguments.threads) as worker:
        run.report["gemm_peak"] = {"method": method(SIZE), **worker.call("peaks").value}
    run.save()


def _measure_accuracy(run: Run, artefacts: Artefacts) -> None:
    """Compare every contestant's answers to held-out text with the reference's."""
    subject = artefacts.subject
    done = {(row["subject"], row["contestant"]) for row in run.report["accuracy"] if row["error"] is None}
    contestants = [one for one in run.arguments.contestants if (subject.name, one.name) not in done]
    reference = next(one for one in CONTESTANTS if one.name == REFERENCE)
    if not contestants or not run.arguments.accuracy_texts:
        return
    tokenizer = load_tokenizer(artefacts.path("checkpoint"))
    longest = min(128, run.arguments.max_length)
    job = heldout_job(tokenizer, texts=run.arguments.accuracy_texts, longest=longest)
    methods = ["embed", "token_embeddings"]
    if subject.task == "fill-mask":
        assert tokenizer.mask_token_id is not None
        methods, job = ["mask_logits"], masked(job, tokenizer.mask_token_id)

    def answers(one: Contestant) -> dict[str, Any]:
        with run.open(one, artefacts) as worker:
            return {name: worker.call(name, job).value for name in methods if hasattr(one.factory, name)}

    expected = answers(reference)
    for one in contestants:
        if not any(hasattr(one.factory, name) for name in methods):
            continue
        _say(f"{subject.name} accuracy: {one.name}")
        row: dict[str, Any] = {"subject": subject.name, "contestant": one.name, "precision": one.precision}
        row |= {"ours": one.is_ours, "error": None}
        try:
            found = expected if one is reference else answers(one)
            for name, value in found.items():
                row[name] = (
                    agreement(expected[name], value, job) if name == "mask_logits" else cosines(expected[name], value)
                )
        except WorkerError as error:
            row["error"] = str(error)
        run.add("accuracy", row)
        run.save()


# --- the report -----------------------------------------------------------------------------------------------------


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    fresh = {
        "benchmark": "inference",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commands": [shlex.join(["python", *sys.orig_argv[1:]])],
        "hardware": {
            "cpu": cpu_model(),
            "cpus": available_cpus(),
            "threads": arguments.threads,
            "kernels": kernels(),
        },
        "versions": _versions(),
        "environments": {name: versions(name, (*DISTRIBUTIONS, *PEER_DISTRIBUTIONS)) for name in ENVIRONMENTS},
        "gemm_peak": {},
        "accuracy": [],
        "measurements": [],
    }
    if arguments.resume is None:
        return fresh
    report = json.loads(arguments.resume.read_text(encoding="utf-8"))
    for name in ("benchmark", "hardware", "versions"):
        if report.get(name) != fresh[name]:
            raise SystemExit(
                f"{arguments.resume} cannot be resumed: its {name} is {report.get(name)}, and here it is {fresh[name]}"
            )
    report["environments"] |= {name: found for name, found in fresh["environments"].items() if found}
    return {**report, "commands": [*report["commands"], *fresh["commands"]]}


def _versions() -> dict[str, str]:
    found = {"gte-deploy": __version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _draw(run: Run) -> None:
    from side_by_side.chart import draw

    draw(run.report, run.arguments.output.with_suffix(".png"))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, help="default: all; --quick leaves out large")
    parser.add_argument("--shapes", nargs="+", metavar="WORKLOAD", help="ROWSxTOKENS or a name from above")
    parser.add_argument(
        "--contestants", nargs="+", metavar="PART", help="names, or parts of several names each (default: all)"
    )
    parser.add_argument("--repeats", type=int, help="most rounds (default: 9; 3 with --quick)")
    parser.add_argument("--minutes", type=float, default=45, help="limit for all measurements (default: 45)")
    parser.add_argument("--call-minutes", type=float, default=15, help="limit for one call (default: 15)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--allow-noise", action="store_true", help="measure on a noisy machine, and mark the results")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="threads and CPUs of each contestant")
    parser.add_argument("--hold", type=int, help="contestants in memory at once, beside the reference")
    parser.add_argument("--corpus-texts", type=int, default=2000, metavar="N")
    parser.add_argument("--accuracy-texts", type=int, default=24, metavar="N", help="texts for accuracy; 0 for none")
    parser.add_argument("--max-length", type=int, default=8192, metavar="TOKENS", help="limit of the exported bundles")
    parser.add_argument("--work", type=Path, default=WORK, help="the work folder")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="continue from this result, and write to it")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-inference-CPU.json")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args(argv)
    if arguments.subjects is None:
        arguments.subjects = [name for name in SUBJECTS if not (arguments.quick and name == "large")]
    arguments.repeats = arguments.repeats or (3 if arguments.quick else 9)
    names = {one.name for one in CONTESTANTS}
    arguments.contestants = [
        one
        for one in CONTESTANTS
        if arguments.contestants is None
        or any(one.name == part if part in names else part in one.name for part in arguments.contestants)
    ]
    for name in arguments.shapes or ():
        if name not in NAMES and not re.fullmatch(r"(list-)?[1-9]\d*x[1-9]\d*", name):
            parser.error(f"--shapes: {name!r} is neither ROWSxTOKENS, list-ROWSxTOKENS nor one of {', '.join(NAMES)}")
    if not arguments.contestants:
        parser.error(f"--contestants: no name has such a part; there are {', '.join(one.name for one in CONTESTANTS)}")
    arguments.output = arguments.output or arguments.resume or result_file("inference", "json")
    return arguments


def _say(line: str) -> None:
    print(f"inference: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
