"""The machine: what it multiplies fast, how fast, and how much memory a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
from types import TracebackType
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedModel


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 matrix products are native, so that they are faster than float32's."""
    if torch.device(device).type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


SPARE = 4 << 30  # bytes of a GPU that a model's weights leave free, for the passes


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model where it computes: on the CPU where there is no GPU, on one GPU that holds it, else over all GPUs, and
    main memory where they do not suffice (accelerate's device_map="auto"), whole layers at a time."""
    if not torch.cuda.is_available():
        return model
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size + SPARE <= torch.cuda.mem_get_info()[0]:
        return model.to("cuda")  # type: ignore[arg-type]  # a decorated method of torch
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or [])
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    return spread(model, infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole))


def spread(model: PreTrainedModel, device_map: dict[str, Any], **settings: Any) -> PreTrainedModel:
    """accelerate's dispatch_model, with the places at which logits are wanted left on the CPU: the output layer may lie on
    another device than the input, and indices on the CPU suit any."""
    from accelerate import dispatch_model  # takes a second, and only models on several devices need it

    skipped = [*(model._skip_keys_device_placement or []), "logits_to_keep"]
    return dispatch_model(model, device_map, skip_keys=skipped, **settings)


# --------------------------------------------------------------------------------------------------------------------
# Packed weights


class PackedLinear(torch.nn.Module):
    """A linear layer whose weight lies in oneDNN's blocked layout, once and for all. For inference on a CPU."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 512)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def with_packed_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Pack the weights of linear layers once instead of at every call; elsewhere than on a CPU the model stays as it is.

    The same products: measured 1.5 times as fast in bfloat16 on Intel's matrix units, and in float32 twice as fast on an
    AMD CPU, where torch's default library does not use AVX-512.
    """
    if model.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return model
    head = model.get_output_embeddings()
    linears = {id(m.weight) for m in model.modules() if _packable(m)}
    # The checkpoint's files are memory-mapped. What stays as it is lets go of them first, then each linear layer as it is
    # packed, so that the unpacked and the packed weights never lie in memory together.
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in linears:
            tensor.data = tensor.data.clone()
    if _packable(head):  # a weight tied to the embedding is packed as a copy
        hooks = head._forward_pre_hooks
        packed = PackedLinear(head)
        packed._forward_pre_hooks.update(hooks)
        model.set_output_embeddings(packed)
    for module in [m for m in model.modules() if not isinstance(m, torch.nn.Linear)]:
        for name, child in module.named_children():
            if _packable(child):
                setattr(module, name, PackedLinear(child))
    return model


def _packable(module: torch.nn.Module | None) -> TypeGuard[torch.nn.Linear]:
    if type(module) is not torch.nn.Linear:  # not of a subclass, which may compute something else
        return False
    return module.weight.dtype == torch.float32 or (module.weight.dtype == torch.bfloat16 and has_bfloat16())


# --------------------------------------------------------------------------------------------------------------------
# Measurements


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest matrix product of several sizes, each tried for ``seconds``: the machine's limit in practice."""
    best = 0.0
    for rows, inner, columns in ((512, 1536, 1536), (512, 1536, 8960), (1024, 4096, 4096)):
        plain = torch.nn.Linear(inner, columns, bias=False, device=device, dtype=dtype)
        linear = PackedLinear(plain) if device.type == "cpu" and _packable(plain) else plain
        x = torch.randn(rows, inner, device=device).to(dtype)
        with torch.inference_mode():
            linear(x)
            synchronise(device)
            n, started = 0, time.perf_counter()
            while (passed := time.perf_counter() - started) < seconds:
                linear(x)
                synchronise(device)
                n += 1
        best = max(best, 2 * rows * inner * columns * n / passed)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given: a clock means nothing before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU (torch.OutOfMemoryError) or on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(re.search("not enough memory|can't allocate memory|ALLOC_FAILED", str(error)))


class PeakMemory:
    """Bytes that a ``with`` block takes at most, above what the process held before: ``with PeakMemory(device) as m: ..``
    and then ``m.bytes``. On a CPU the resident memory, looked at every 5 ms; on a GPU what torch allocated."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work freed must not hide what this work takes
        except (OSError, AttributeError):
            pass  # another C library
        import psutil

        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._peak = max(self._peak, self._process.memory_info().rss)
        self._done.set()
        self._thread.join()
        self.bytes = self._peak - self._before
