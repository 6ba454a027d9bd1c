"""The processes that train a student together: ``torchrun`` or ``accelerate launch`` starts them, on one machine or several.

    torchrun --nproc-per-node 2 -m permdistill.cli sweep ...

Rank 0 is the program. The others take part in its trainings and in nothing else (:func:`permdistill.training.lead`), so that
scores, decisions, files and tables are made once. A process that was started in the ordinary way is alone, and is rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=30)  # the others wait while rank 0 does something else; a launcher stops all when one dies


def connect() -> None:
    """Join the processes that the launcher has started, each with a GPU of its own where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)


def part() -> None:
    """Leave them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(value: Any) -> Any:
    """Rank 0's ``value``, whatever the others give. All processes have to call this, in the same order."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def add_up(parameters: Iterable[torch.nn.Parameter], loss: float) -> float:
    """Add up gradients, in place, and the loss over all processes. A parameter that has no gradient in any keeps none."""
    if count() == 1:
        return loss
    parameters = list(parameters)
    sums = torch.tensor([loss, *(p.grad is not None for p in parameters)], dtype=torch.float64)
    dist.all_reduce(sums)
    for parameter, used in zip(parameters, sums[1:].tolist(), strict=True):
        if used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    return float(sums[0])
