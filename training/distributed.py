"""The ranks of a run: torchrun's on any number of nodes, or one process alone. CUDA with NCCL, CPU with gloo."""

from __future__ import annotations

import atexit
import gc
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gte_deploy.training.model import PackedMaskedLM


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and progress."""
        return self.rank == 0

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, in the order of ranks."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def choose_device(device: str | None) -> torch.device:
    """The device of a name such as "cuda", "cuda:1" or "cpu"; for None a GPU where there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the group that torchrun's environment describes; without one, be a world of one.

    Args:
        device: "cuda", "cuda:1" or "cpu"; None takes a GPU where there is one. Under torchrun each rank takes the GPU
            of its LOCAL_RANK.
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
        yield World(dist.get_rank(), dist.get_world_size(), kind)
    finally:
        dist.destroy_process_group()
        # Only then: the caller's model is a part of what keeps them.
        atexit.unregister(_end_group_threads)
        atexit.register(_end_group_threads)


def _end_group_threads() -> None:
    """End the threads of groups that were left, which could else abort the process while the interpreter ends.

    Sharded parameters keep their mesh, a mesh its group, and a group its threads; so does torch's cache of how
    operators shard.
    """
    from torch.distributed.tensor import debug

    if clear := getattr(debug, "_clear_sharding_prop_cache", None):
        clear()
    gc.collect()


def distribute(module: PackedMaskedLM, world: World, *, sharding: str) -> nn.Module:
    """Wrap the model for its world: "ddp" copies it to each rank, "fsdp" shards each layer and the rest (FSDP2)."""
    if world.size == 1:
        return module
    if sharding == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for layer in module.model.gte.layers:
            fully_shard(layer, mesh=mesh)
        # The word embedding and the decoder share one matrix, so they lie in one group: the root's.
        fully_shard(module, mesh=mesh)
        return module
    # The only buffers are RoPE frequencies, which never change. Releases name the flag differently.
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in accepted else "broadcast_buffers"
    options: dict[str, Any] = {flag: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(
        module, device_ids=[world.device] if world.device.type == "cuda" else None, **options
    )


def gradient_sync(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Reduce gradients over the ranks only in the last micro-batch of a step; those before add up locally."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from its shards; every rank has to call it for a sharded one."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like_parameter(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device, and in the shards, of a parameter of the same shape."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
    return whole.to(parameter.device)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under the names of GteForMaskedLM, whatever wraps it; tied ones once."""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(inner, PackedMaskedLM)
    return dict(inner.model.named_parameters())


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<field>`, whole and on the CPU. Every rank has to call it."""
    return {
        f"{name}.{key}": whole_tensor(value)
        for name, parameter in named_parameters(module).items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in any world."""
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
