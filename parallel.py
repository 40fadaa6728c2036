"""A network over several GPUs of one process, or over several processes, and the average of their gradients."""

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel, parallel_apply


class Within(nn.Module):
    """A model whose forward runs in a context of its own."""

    def __init__(self, model: nn.Module, context: Callable[[], contextlib.AbstractContextManager]):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, *inputs: Any) -> Any:
        """What the model makes of the inputs."""
        with self.context():
            return self.model(*inputs)


class EvenDataParallel(DataParallel):
    """DataParallel that leaves a GPU out where the last one would get a single image, on which batch-norm cannot train.

    autocast: the context that each replica's forward runs in: threads do not know its dtype. Each GPU keeps its thread:
    PyTorch starts new ones at every step, in which cuDNN, by whose plans convolutions run, would choose its plans anew.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], contextlib.AbstractContextManager],
                 devices: list[torch.device] | None = None):
        super().__init__(Within(model, autocast), devices)
        self.threads = [ThreadPoolExecutor(1) for _ in self.device_ids]

    def parallel_apply(self, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """What each replica makes of its part of the inputs."""
        enabled = torch.is_grad_enabled()

        def apply(*part: Any) -> Any:
            with torch.set_grad_enabled(enabled):
                return parallel_apply(*([one] for one in part))[0]  # a single one: in this thread
        running = [thread.submit(apply, *part) for thread, *part in zip(
            self.threads, replicas, inputs, kwargs, self.device_ids, strict=False)]  # of which there may be fewer than GPUs
        return [each.result() for each in running]

    def scatter(self, inputs: tuple, kwargs: dict[str, Any] | None, device_ids: list[int]) -> Any:
        """The inputs, of which the first is the images (batch, ...), in a part for each GPU."""
        batch = len(inputs[0])
        used = next(count for count in range(len(device_ids), 0, -1) if (batch - 1) % math.ceil(batch / count) or count == 1)
        return super().scatter(inputs, kwargs, device_ids[:used])


def over_processes(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model over all processes, each of which has it on its device.

    Gradients lie in the buckets that are sent, for which a step must zero them, not drop them: made anew they would be copied
    there, with a warning where the device's kernels give them other strides.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = inspect.signature(DistributedDataParallel).parameters
    sync = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # its older name
    over = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True, **{sync: False})
    over.register_comm_hook(None, allreduce_hook)  # averages a bucket at once, not each gradient
    return over


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Average the gradients of parameters over all processes in a single message; each has gradients of the same ones."""
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world)
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    alike: tuple[list, list] = [], []  # copied at once: a single pair of other strides would make all of them slow
    for gradient, part in zip(gradients, parts, strict=True):
        part = part.view_as(gradient)
        if strides_of(gradient) == strides_of(part):
            alike[0].append(gradient)
            alike[1].append(part)
        else:
            gradient.copy_(part)
    if alike[0]:
        torch._foreach_copy_(*alike)


def strides_of(tensor: torch.Tensor) -> list[int]:
    """The strides of those dimensions that have more than one place, by which a tensor's layout differs from another's."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
