"""A CPU that behaves like a GPU, so that what is written for one runs, and is checked, where none is.

Tensors that were sent to `cuda` lie on the CPU and are known by their storage. An operation on such tensors and others
fails as it does on a GPU; what makes the host wait for it is counted; CUDA graphs record operations and repeat them.
"""

import functools
import importlib
from contextlib import ExitStack, contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda")
_COPIES = ("aten.copy_", "aten._foreach_copy_")
"""Also from one device to another; a list whose tensors lie on several is copied one by one."""
_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount", "aten.equal")
_TO = torch._C._nn._parse_to
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.pin_memory}


_THERE, _PINNED = {}, {}
"""Address of a storage -> it; of all pretended GPUs, as models outlive them in caches."""


def _tensors(values):
    """Those among what an operation is given or makes, which may be lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@functools.cache
def _name(func):
    """Without its overload."""
    return str(func).rpartition(".")[0]


def _is_gpu(device):
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class PretendedGpu:
    """The state that all threads share; enter `modes()` in each thread that computes."""

    def __init__(self):
        self._there, self._pinned, self.recorded = _THERE, _PINNED, None
        self.lock = None
        """Whoever touches the GPU must hold it."""
        self.waits = []
        """What the host waited for."""
        self.is_capturing = False

    def has(self, tensor):
        return tensor.untyped_storage()._cdata in self._there

    def is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in self._pinned

    def mark(self, tensor, where=None):
        storage = tensor.untyped_storage()
        (self._there if where is None else where)[storage._cdata] = StorageWeakRef(storage)  # no address comes again
        return tensor

    def wait(self, why):
        assert not self.is_capturing, f"{why} while a CUDA graph is captured"
        self.waits.append(str(why))

    def touch(self, why):
        assert self.lock is None or self.lock.locked(), f"{why} without holding the lock of the device"

    def sent(self, tensor, *, blocking):
        """A copy on the GPU."""
        self.touch("a copy to it")
        if blocking or not self.is_pinned(tensor):
            self.wait("a copy to it")
        return self.mark(tensor.clone())

    def fetched(self, tensor):
        self.touch("a copy from it")
        self.wait("a copy from it")
        copy = tensor.clone()
        del self._there[copy.untyped_storage()._cdata]
        return copy

    @contextmanager
    def modes(self):
        with _Operations(self), _Functions(self):
            yield self

    @contextmanager
    def capture(self, graph, **_):
        assert self.recorded is None
        self.recorded, self.is_capturing = graph.operations, True
        try:
            yield
        finally:
            self.recorded, self.is_capturing = None, False


class _Functions(TorchFunctionMode):
    """What names a device."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs = self._gpu, dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None:
            if func == torch.Tensor.device.__get__:
                return GPU if gpu.has(first) else func(*args)
            if func == torch.Tensor.is_cuda.__get__:
                return gpu.has(first)
            if func == torch.Tensor.is_pinned:
                return gpu.is_pinned(first)
            if func in _MOVES:
                return self._moved(func, first, args[1:], kwargs)
            if func in (torch.Tensor.numpy, torch.Tensor.__array__) and gpu.has(first):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func is torch.Tensor.tolist and gpu.has(first):
                first = gpu.fetched(first)
                return first.tolist()
        pin, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if _is_gpu(device):
            gpu.touch(func)
            kwargs["device"] = "cpu"
            if func is torch.tensor or func is torch.as_tensor:
                gpu.wait("a copy to it")
        made = func(*args, **kwargs)
        if pin:
            gpu.mark(made, gpu._pinned)
        if _is_gpu(device) or (first is not None and gpu.has(first) and getattr(func, "__name__", "")[:4] == "new_"):
            gpu.mark(made)
        return made

    def _moved(self, func, tensor, args, kwargs):
        gpu = self._gpu
        if func is torch.Tensor.pin_memory:
            return gpu.mark(tensor.clone(), gpu._pinned)
        if func is torch.Tensor.cpu:
            return gpu.fetched(tensor) if gpu.has(tensor) else tensor
        if func is torch.Tensor.cuda:
            return tensor if gpu.has(tensor) else gpu.sent(tensor, blocking=True)
        kwargs.pop("copy", None)
        if args and isinstance(args[0], torch.Tensor):
            device, dtype, blocking = args[0].device, args[0].dtype, True
            device = GPU if gpu.has(args[0]) else device
            memory_format = None
        else:
            device, dtype, non_blocking, memory_format = _TO(*args, **kwargs)
            blocking = not non_blocking
        if device is not None and _is_gpu(device) and not gpu.has(tensor):
            tensor = gpu.sent(tensor, blocking=blocking)
        elif device is not None and not _is_gpu(device) and gpu.has(tensor):
            tensor = gpu.fetched(tensor)
        same = {} if memory_format is None else {"memory_format": memory_format}
        return tensor.to(dtype or tensor.dtype, **same)


class _Operations(TorchDispatchMode):
    """What is computed."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu, kwargs = self._gpu, kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        there = [gpu.has(leaf) for leaf in given]
        name = _name(func)
        if any(there):
            gpu.touch(func)
            strangers = [leaf for leaf, is_there in zip(given, there, strict=True) if not is_there and leaf.ndim]
            if name in _COPIES:
                if not all(there) and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                    gpu.wait(func)
            elif strangers and name in ("aten.index", "aten.index_put_") and there[0]:
                gpu.wait(func)
            elif strangers:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")
            is_masked = name == "aten.index" and any(leaf.dtype == torch.bool for leaf in given[1:])
            if name in _READS or is_masked:
                gpu.wait(func)
        made = func(*args, **kwargs)
        if any(there) and name not in _COPIES:
            for leaf in _tensors([made]):
                gpu.mark(leaf)
        if gpu.recorded is not None:
            gpu.recorded.append((func, args, kwargs, made))
        return made


class Graph:
    """A CUDA graph."""

    def __init__(self):
        self.operations = []

    def replay(self):
        with torch._C._DisableTorchDispatch():
            for func, args, kwargs, made in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(_tensors([made]), _tensors([again]), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def pretended_gpu(monkeypatch):
    """A GPU for this thread; others enter its `modes`."""
    gpu = PretendedGpu()

    class Stream:
        def wait_stream(self, other):
            pass

        def is_capturing(self):
            return gpu.is_capturing

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda **_: True,
        "get_device_name": lambda *_: "NVIDIA Pretended",
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda _: ExitStack(),
        "CUDAGraph": Graph,
        "graph": gpu.capture,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: Stream())  # a build for CUDA asks it
    monkeypatch.setattr(torch, "autocast", _Autocast)
    grouped = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def by_device(*given):
        return {(GPU, dtype): rows for (_, dtype), rows in grouped(*given).items()}

    for module in ("nn.utils.clip_grad", "optim.optimizer"):
        monkeypatch.setattr(importlib.import_module(f"torch.{module}"), "_group_tensors_by_device_and_dtype", by_device)
    # Recomputed tensors are compared with those of before, whose device was read within the modes or beyond them.
    checks = importlib.import_module("torch.utils.checkpoint")._allowed_determinism_checks_to_fns
    monkeypatch.setitem(checks, "default", lambda tensor: (tensor.shape, tensor.dtype))
    with gpu.modes():
        yield gpu
