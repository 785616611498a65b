"""One process or many: what torchrun says about this process, and the few collectives a run needs."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from mimfast._check import UserError


@dataclass(frozen=True)
class World:
    """This process among all: rank 0 <= rank < size, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks; the same tensor when there is one."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            distributed.barrier()

    def share(self, text: str) -> str:
        """The first rank's text, on every rank."""
        if self.size == 1:
            return text
        box = [text]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over the ranks."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)


def start(device: str = "auto") -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, choose the device, join the group (gloo on CPU,
    nccl on GPU).

    Raises:
        UserError: when the device does not exist here.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)), size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    return World(rank, size, chosen)


def _device(wanted: str, local_rank: int, size: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(
            f"pretrain: train.device has {wanted!r}, expected auto, cpu, cuda or cuda:N because torch knows no such "
            "device"
        ) from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(
            f"pretrain: train.device has {wanted!r}, expected auto, cpu, cuda or cuda:N because runs are tested on "
            "those"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if size > 1 or device.index is None else device.index
    if index >= count:
        raise UserError(
            f"pretrain: train.device has {wanted!r}, expected a device that exists because torch sees {count} GPUs here"
        )
    return torch.device("cuda", index)


def finish(world: World) -> None:
    """Leave the group."""
    if world.size > 1:
        distributed.destroy_process_group()


def local_size() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
