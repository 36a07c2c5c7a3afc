"""Two gloo ranks on the CPU against one process: DDP and FSDP2."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gte_deploy.core.exit_codes import INTERRUPTED
from gte_deploy.training.data.masking import Masking
from gte_deploy.training.data.prepare import prepare
from gte_deploy.training.distributed import deterministic_algorithms
from gte_deploy.training.evaluation.held_out import HeldOutText
from gte_deploy.training.log import read_log
from gte_deploy.training.recipe import recipe_from_dict
from gte_deploy.training.state import find_checkpoint
from gte_deploy.training.train import train

# Rank 1 gets SIGTERM in its micro-batch STOP_AT of a command that names one.
RUN_ALL = """
import json, os, signal, sys
from gte_deploy.training import train as train_module
from gte_deploy.training.cli import main
train_module.plot_run = lambda folder: None
tensors, accumulate = train_module.micro_batch_tensors, train_module.accumulate_gradients
codes = []
for port, arguments, stop_at in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    sizes, computed = [], []

    def counting(module, micro_batches, **options):
        sizes.append(len(micro_batches))
        return accumulate(module, micro_batches, **options)

    def signalling(batch, device):
        computed.append(1)
        if len(computed) == stop_at and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return tensors(batch, device)

    train_module.accumulate_gradients, train_module.micro_batch_tensors = counting, signalling
    codes.append(main(arguments))
    if stop_at:
        assert sum(sizes[:-1]) < len(computed) == stop_at < sum(sizes), (sizes, computed)  # in the midst of a step
        assert codes.pop() == 130
sys.exit(max(codes))
"""


def start_ranks(
    commands: list[list[str]], *, size: int = 2, stop_at: dict[int, int] | None = None
) -> list[subprocess.Popen]:
    """What torchrun does: the same commands in `size` processes, one after the other in each.

    `stop_at` has the micro-batch in which a command, by its number, is stopped.
    """
    # A group needs a port of its own: a rank could else join the one of the command before, as it closes.
    jobs = json.dumps([(free_port(), arguments, (stop_at or {}).get(i, 0)) for i, arguments in enumerate(commands)])
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RUN_ALL, jobs],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(ranks: list[subprocess.Popen], *, code: int = 0) -> None:
    try:
        for rank in ranks:
            _, log = rank.communicate(timeout=240)
            assert rank.returncode == code, log
    finally:
        for rank in ranks:
            rank.kill()


def command(recipe: dict, corpus_folder: Path, output: Path) -> list[str]:
    output.mkdir(exist_ok=True)
    path = output / "given.yaml"
    path.write_text(json.dumps(recipe))
    return ["run", str(path), "--data", str(corpus_folder), "--output", str(output), "--device=cpu", "--no-tensorboard"]


def test_deterministic_algorithms_are_for_cuda_and_for_the_run_alone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_algorithms(torch.device("cpu"), enabled=True):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(torch.device("cuda"), enabled=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_is_bitwise_repeated(make_recipe, corpus_folder, tmp_path):
    recipe = make_recipe(steps=(8,), dropout=0.1, dtype="bfloat16", deterministic=True)
    for name in ("first", "second"):
        train(recipe_from_dict(recipe), data=corpus_folder, output=tmp_path / name, device="cuda", tensorboard=False)
    assert_bitwise_equal(tmp_path / "first", tmp_path / "second")


GATHER = """
import json, os, sys
from collections import Counter

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gte_deploy.models.config import read_config
from gte_deploy.training.data.packing import MicroBatch
from gte_deploy.training.distributed import distribute, join_world, named_parameters, whole_tensor
from gte_deploy.training.model import PackedMaskedLM, build_model
from gte_deploy.training.train import accumulate_gradients


class Gathers(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numbers = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::_allgather_base_"):
            self.numbers[str(args[1].dtype)] += args[1].numel()
        return func(*args, **(kwargs or {}))


def micro_batch(seed):
    ids, places = np.random.default_rng(seed).integers(5, 256, 64), np.arange(0, 64, 3)
    bounds = np.array([0, 32, 64], dtype=np.int32)
    return MicroBatch(ids, np.arange(64) % 32, bounds, 32, places, ids[places], num_sequences=2)


with join_world("cpu") as world:
    results = []
    for dtype, checkpointing in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = build_model(read_config(sys.argv[1]), rope_theta=10_000.0, seed=1)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        module = distribute(PackedMaskedLM(model), world, sharding="fsdp", dtype=dtype)
        batches = [micro_batch(10 * world.rank + i) for i in range(2)]
        torch.manual_seed(world.rank)
        with Gathers() as gathers:
            loss = accumulate_gradients(module, batches, world=world, masked_tokens=88, dtype="bfloat16")
        gradients = {name: whole_tensor(p.grad).tolist() for name, p in named_parameters(module).items()}
        results.append({"loss": loss.item(), "gathered": gathers.numbers, "gradients": gradients})
    if world.is_main:
        print(json.dumps(results))
"""


def test_linear_layers_are_gathered_in_bfloat16_with_the_gradients_of_float32_gathers(make_architecture):
    """Autocast casts their weights in any case; the order of additions alone differs. Also with checkpointing."""
    architecture = make_architecture()
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GATHER, str(architecture)],
            env={**common, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (printed, log), (_, other_log) = (rank.communicate(timeout=240) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], log + other_log
    assert "returned a view" not in log
    wide, *narrow = json.loads(printed)
    assert set(wide["gathered"]) == {"torch.float32"}
    layers = {name: torch.tensor(value) for name, value in wide["gradients"].items() if "layers." in name}
    linear = sum(x.numel() for name, x in layers.items() if "norm" not in name)
    for found in narrow:
        assert found["loss"] == wide["loss"]
        # Each rank sends half of them, in two micro-batches, for the forward and the backward pass.
        assert found["gathered"]["torch.bfloat16"] == 2 * linear
        assert found["gathered"]["torch.float32"] < wide["gathered"]["torch.float32"] - 2 * linear + 1
        for name, gradient in wide["gradients"].items():
            torch.testing.assert_close(
                torch.tensor(found["gradients"][name]), torch.tensor(gradient), rtol=1e-5, atol=1e-7, msg=name
            )


LEAVE_A_GROUP = """
import atexit
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gte_deploy.training.distributed import join_world

def names():
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

atexit.register(lambda: print(*(name for name in names() if "gloo" in name or "store" in name), sep="\\n"))  # the last

def work():
    with join_world("cpu"):
        layer = fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
        layer(torch.ones(2, 4)).sum().backward()
        assert any("gloo" in name for name in names())

work()
"""


def test_no_thread_of_a_group_outlives_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_A_GROUP],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def losses(output: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_log(output / "log.jsonl")])


def test_two_ranks_equal_one_process(make_recipe, corpus_folder, tmp_path):
    """One long test: starting processes takes most of the time.

    20 steps with several micro-batches a rank; and with one sequence a step, which leaves one rank with none. Then a
    sharded run with dropout, which a signal to one rank stops, and which goes on in both.
    """
    recipes = {
        "many": make_recipe(steps=(20,), dropout=0.0, stage={"batch_size": 13}, checkpoint_every=10),
        "few": make_recipe(steps=(6,), dropout=0.0, stage={"batch_size": 1}, checkpoint_every=10),
    }
    commands = [
        command({**recipe, "sharding": sharding}, corpus_folder, tmp_path / f"{sharding}-{name}")
        for sharding in ("ddp", "fsdp")
        for name, recipe in recipes.items()
    ]
    dropout = make_recipe(steps=(20,), dropout=0.1, sharding="fsdp", checkpoint_every=20)
    stopped, whole = (command(dropout, corpus_folder, tmp_path / name) for name in ("stopped", "whole"))
    ranks = start_ranks([*commands, whole, stopped])
    for name, recipe in recipes.items():
        train(recipe_from_dict(recipe), data=corpus_folder, output=tmp_path / f"single-{name}", tensorboard=False)
    stop_when_running(ranks, tmp_path / "stopped")
    finish(start_ranks([stopped]))
    assert_bitwise_equal(tmp_path / "stopped", tmp_path / "whole")
    for sharding in ("ddp", "fsdp"):
        for name in recipes:
            assert_same_losses(tmp_path / f"{sharding}-{name}", tmp_path / f"single-{name}")
        assert_same_checkpoint(tmp_path / f"{sharding}-many", tmp_path / "single-many")
        go_on_alone(recipes["many"], corpus_folder, tmp_path / f"{sharding}-many")
        assert_same_losses(tmp_path / f"{sharding}-many", tmp_path / "single-many")


def test_a_signal_to_one_rank_inside_a_step_stops_both_and_the_rest_is_bitwise_equal(
    make_recipe, corpus_folder, tmp_path
):
    """Also where the ranks have unequal numbers of micro-batches. Sharded ranks write a checkpoint in parts."""
    dropout = make_recipe(steps=(20,), dropout=0.1)
    inside = [
        command({**dropout, "sharding": sharding, "stages": long_steps(dropout)}, corpus_folder, tmp_path / name)
        for sharding in ("ddp", "fsdp")
        for name in (f"inside-{sharding}", f"inside-{sharding}", f"whole-{sharding}")
    ]
    finish(start_ranks(inside, stop_at={0: 9, 3: 9}))
    for sharding in ("ddp", "fsdp"):
        assert_bitwise_equal(tmp_path / f"inside-{sharding}", tmp_path / f"whole-{sharding}")
    assert_saved_by(1, tmp_path / "inside-ddp")
    assert_saved_by(2, tmp_path / "inside-fsdp")


def long_steps(recipe: dict) -> list[dict]:
    """Stages of three steps with many micro-batches each."""
    return [{**stage, "steps": 3, "batch_size": 60} for stage in recipe["stages"]]


def assert_saved_by(ranks: int, output: Path) -> None:
    """Each rank wrote its rows, and no rank all of them."""
    checkpoint = find_checkpoint(output)
    files = sorted(checkpoint.path.glob("model*.safetensors"))
    assert checkpoint.shards == len(files) == ranks
    whole = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.model_tensors().values())
    assert all(file.stat().st_size < 0.7 * whole for file in files) or ranks == 1


def assert_same_losses(several: Path, single: Path) -> None:
    assert len(losses(single)) in (6, 20)
    np.testing.assert_allclose(losses(several), losses(single), rtol=0, atol=1e-5)
    masked = [[record["masked_tokens"] for record in read_log(f / "log.jsonl")] for f in (several, single)]
    assert masked[0] == masked[1]


def assert_same_checkpoint(several: Path, single: Path) -> None:
    """The same names and shapes, and nearly the same numbers, however many ranks wrote them."""
    for read in ("model_tensors", "optimizer_tensors"):
        actual, expected = (getattr(find_checkpoint(folder), read)() for folder in (several, single))
        assert set(actual) == set(expected)
        for key, tensor in expected.items():
            assert actual[key].shape == tensor.shape
            assert (actual[key] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, key


def go_on_alone(recipe: dict, corpus_folder: Path, output: Path) -> None:
    """Lose the last checkpoint of a run of two ranks, and let one process do the second half again."""
    shutil.rmtree(find_checkpoint(output).path)
    assert find_checkpoint(output).state.step == 10
    train(recipe_from_dict(recipe), data=corpus_folder, output=output, tensorboard=False)


def stop_when_running(ranks: list[subprocess.Popen], output: Path) -> None:
    """Send SIGTERM to one of the ranks after the second step of `output`; both have to end with a checkpoint."""
    while len(read_log(output / "log.jsonl")) < 2:
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[1] for rank in ranks]
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGTERM)
    finish(ranks, code=INTERRUPTED)
    assert 2 <= find_checkpoint(output).state.step < 20


def assert_bitwise_equal(first: Path, second: Path) -> None:
    assert losses(first).tolist() == losses(second).tolist()
    ends = [find_checkpoint(folder).model_tensors() for folder in (first, second)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.slow
def test_scores_on_held_out_text_do_not_depend_on_the_ranks(make_recipe, corpus_folder, tmp_path):
    """Three batches on two ranks: one rank computes a batch more, whose result counts once."""
    (tmp_path / "text.txt").write_text(
        "\n\n".join(" ".join(f"w{i + j}" for j in range(0, 160, 7)) for i in range(5, 30))
    )
    tokenizer = corpus_folder / "tokenizer"
    held_out = prepare([str(tmp_path / "text.txt")], tmp_path / "held-out", tokenizer=tokenizer)
    recipe = make_recipe(steps=(3,), eval_data=str(held_out.folder), evaluate_every=2, tokens_per_micro_batch=256)
    text = HeldOutText(held_out, 32, Masking(), 100_000, recipe["seed"])
    assert len(text.packed(256)) % 2 == 1

    train(recipe_from_dict(recipe), data=corpus_folder, output=tmp_path / "one", tensorboard=False)
    kinds = ("ddp", "fsdp")
    finish(
        start_ranks([command({**recipe, "sharding": kind}, corpus_folder, tmp_path / kind) for kind in kinds]),
    )
    alone = read_log(tmp_path / "one" / "log.jsonl", kind="evaluation")
    assert [event["step"] for event in alone] == [0, 2, 3]
    for kind in kinds:
        together = read_log(tmp_path / kind / "log.jsonl", kind="evaluation")
        for mine, theirs in zip(alone, together, strict=True):
            (one,), (other,) = mine["scores"], theirs["scores"]
            assert one["masked_tokens"] == other["masked_tokens"] and one["documents"] == other["documents"]
            assert abs(one["loss"] - other["loss"]) < 1e-5 and abs(one["loss_error"] - other["loss_error"]) < 1e-5
    assert find_checkpoint(tmp_path / "fsdp").state.step == 3
