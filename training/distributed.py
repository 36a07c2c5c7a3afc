"""The ranks of a run: those of torchrun on any number of nodes, or one process alone.

GPUs communicate over NCCL, CPUs over gloo.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gte_deploy.training.model import PackedMaskedLM
from gte_deploy.training.state import TensorPart


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, and this process's device.

    Args:
        rank: number of this process, from 0.
        size: number of ranks.
        device: the device of this process.
        votes: group in which the CPUs of the ranks talk; None for a single rank.
        saves: as `votes`, for the threads that write checkpoints. Each group has one user, so that calls stay in order.
    """

    rank: int
    size: int
    device: torch.device
    votes: Any = None
    saves: Any = None

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and progress."""
        return self.rank == 0

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return the integers of every rank, in their order. Every rank has to call it; no rank waits for its GPU."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.votes)
        return torch.stack(everyone).tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place. Every rank has to call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool, *, group: Any = None) -> bool:
        """Return whether the flag is true on any rank. Every rank has to call it; no rank waits for its GPU.

        Args:
            flag: the flag of this rank.
            group: `votes` or `saves`; None for `votes`.
        """
        if self.size == 1:
            return flag
        value = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group or self.votes)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def choose_device(device: str | None) -> torch.device:
    """Return the device of a name such as "cuda", "cuda:1" or "cpu"; for None a GPU if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; without torchrun, the world has one rank.

    Args:
        device: see `choose_device`. Under torchrun each rank takes the GPU of its LOCAL_RANK.
    """
    kind = choose_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        index = (kind.index or 0) if kind.type == "cuda" else None
        yield World(0, 1, torch.device(kind.type, index) if index is not None else kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(kind)
    dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        votes, saves = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        yield World(dist.get_rank(), dist.get_world_size(), kind, votes, saves)
    finally:
        dist.destroy_process_group()
        # At the exit and not here: the caller still holds the model, which keeps the threads alive.
        atexit.unregister(_end_group_threads)
        atexit.register(_end_group_threads)


@contextmanager
def deterministic_algorithms(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Let CUDA compute only with operations whose result is the same each time; on a CPU this changes nothing.

    The backward pass of the variable-length flash kernel obeys it, too. It has to come before the first matrix product:
    cuBLAS reads its workspace setting once.
    """
    if not enabled or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _end_group_threads() -> None:
    """End the threads of destroyed process groups. They could otherwise abort the process while the interpreter ends.

    Sharded parameters keep their mesh alive, a mesh keeps its group, and a group keeps its threads. torch's cache of
    the operators' sharding keeps meshes, too.
    """
    from torch.distributed.tensor import debug

    if clear := getattr(debug, "_clear_sharding_prop_cache", None):
        clear()
    gc.collect()


# Linear layers under autocast compute with bfloat16 copies of their weights. Copies that are made before the weights
# are gathered are the same ones, and half as many bytes. Inputs stay as they are, and gradients add up in float32.
_GATHERED_IN_BFLOAT16 = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


def distribute(module: PackedMaskedLM, world: World, *, sharding: str, dtype: str) -> nn.Module:
    """Wrap the model for its ranks.

    Gathering in bfloat16 changes the result by the order of additions alone. It takes attention and MLP apart from the
    norms, so torch.compile fuses less across them (see `benchmarks/training_roofline.py`).

    Args:
        module: the model, on its device.
        world: the ranks.
        sharding: "ddp" copies the model to each rank; "fsdp" shards each layer and the rest (FSDP2).
        dtype: "bfloat16" for a model that runs under autocast: the linear layers' weights of each layer are then
            gathered in bfloat16. Norms, embedding and head are gathered in float32.
    """
    if world.size == 1:
        return module
    if sharding == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in module.model.gte.layers:
            _shard_layer(layer, mesh, dtype=dtype)
        # The word embedding and the decoder share one matrix, so they have to be in one group, which is the root's.
        fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(module, "predictions")  # gathers the root's weights, as its forward does
        return module
    # The only buffers are RoPE frequencies, which never change. The flag has another name in older releases of torch.
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    options: dict[str, Any] = {flag: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(
        module, device_ids=[world.device] if world.device.type == "cuda" else None, **options
    )


def _shard_layer(layer: Any, mesh: DeviceMesh, *, dtype: str) -> None:
    if dtype != "bfloat16":
        fully_shard(layer, mesh=mesh)
        return
    # Their outputs are views, and no operation in place follows, of which torch warns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    fully_shard([layer.self_attn, layer.mlp], mesh=mesh, mp_policy=_GATHERED_IN_BFLOAT16)
    # The norms are left, a few kilobytes: they stay gathered until the backward pass.
    fully_shard(layer, mesh=mesh, reshard_after_forward=False)


def gradient_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Reduce gradients over the ranks in the last micro-batch of a step; before it they add up locally."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, gathered from its shards. For a sharded tensor every rank has to call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def parts_to_save(tensors: Mapping[str, Tensor], world: World) -> dict[str, TensorPart]:
    """Return what this rank writes of a checkpoint: its rows of sharded tensors; rank 0 also every whole tensor."""
    parts = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            part = _local_part(tensor, world.rank)
            if part.rows.numel():
                parts[name] = part
        elif world.is_main:
            parts[name] = TensorPart.whole(tensor.detach())
    return parts


def _local_part(tensor: DTensor, rank: int) -> TensorPart:
    assert tensor.placements == (Shard(0),)  # as `distribute` shards, which cuts the rows as torch.chunk does
    rows_of_each = -(-tensor.shape[0] // tensor.device_mesh.size())
    return TensorPart(tensor.to_local().detach(), min(rank * rows_of_each, tensor.shape[0]), tuple(tensor.shape))


def like_parameter(whole: Tensor, parameter: Tensor) -> Tensor:
    """Put a whole tensor on the device of a parameter of the same shape, sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters under their names in GteForMaskedLM, however it is wrapped; tied parameters once."""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(inner, PackedMaskedLM)
    return dict(inner.model.named_parameters())


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as `<parameter>.<field>`, sharded as the parameters are."""
    return {
        f"{name}.{key}": value
        for name, parameter in named_parameters(module).items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned, also on another number of ranks."""
    names = {id(parameter): name for name, parameter in named_parameters(module).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        by_name.setdefault(name, {})[field] = tensor
    state = {
        i: {
            field: like_parameter(tensor, parameter) if tensor.shape == parameter.shape else tensor
            for field, tensor in by_name[names[id(parameter)]].items()
        }
        for i, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
