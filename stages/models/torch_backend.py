"""What the backends on torch share: imports without network, the device, batches, and pixels as models expect them."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from schemas.arrays import Floats, Image
from schemas.errors import PlanError
from stages.runtime import Device

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of pixels in 0..1, RGB."""

DEVICE = Lock()
"""Held by the thread of this process that computes on the device: while a CUDA graph is captured, no other may."""

_FULL_PX = 1024 * 1024
"""Of a picture, up to which a batch of it has its full size: a long panorama would need all memory in such a batch."""
_MOST_SHAPES = 24
"""Of pictures, for which what computes them is kept; photos of strangers have any number of shapes."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Telemetry is off by it too."""


def prepare(device: Device) -> None:
    """Make torch ready for a device in this process; call before importing transformers or facexlib.

    One thread on the CPU: parallel work is one process per core, and sums must not depend on the thread count.

    Raises:
        PlanError: when a GPU is wanted and torch has none.
    """
    os.environ.update(_OFFLINE)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(
            "executor.gpus asks for a GPU, but torch has none here: install a CUDA build of torch, or set "
            "executor.gpus = 0."
        )
    torch.set_num_threads(1)


def normalise(images: Image, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Floats:
    """(N, H, W, 3) RGB uint8 -> (N, 3, H, W) float32 with the mean and standard deviation that a model expects."""
    mean, std = (np.array(values, np.float32) for values in mean_std)
    pixels = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


class Together:
    """A function of lists that threads share: while it computes for one, what others give gathers, and goes together.

    What is given has a kind; only what is of one kind goes together.
    """

    def __init__(self, compute: Callable[[Any, list[Any]], Sequence[Any]]) -> None:
        """`compute` takes a kind and a list, and gives a result for each of it, in order."""
        self._compute = compute
        self._waiting: deque[_Given] = deque()
        self._turn = Lock()

    def __call__(self, given: Iterable[tuple[Any, Any]]) -> list[Any]:
        """The results for pairs of kind and what is given, in their order."""
        own = [_Given(kind, value) for kind, value in given]
        self._waiting.extend(own)
        with self._turn:  # who has it computes for all that wait
            # Where another thread failed with all of them, each tries its own again.
            if missing := [each for each in own if not each.is_done]:
                gathered = dict.fromkeys(missing)
                while self._waiting:
                    gathered[self._waiting.popleft()] = None
                try:
                    self._fill(list(gathered))
                except Exception:
                    if len(gathered) == len(missing):
                        raise
                    self._fill(missing)  # it may have been another thread's that failed
        return [each.result for each in own]

    def _fill(self, given: Sequence["_Given"]) -> None:
        for kind in dict.fromkeys(each.kind for each in given):
            alike = [each for each in given if each.kind == kind]
            for each, result in zip(alike, self._compute(kind, [each.value for each in alike]), strict=True):
                each.result, each.is_done = result, True


@dataclass(eq=False)
class _Given:
    kind: Any
    value: Any
    result: Any = None
    is_done: bool = False


class Batches:
    """A function of images, or arrays, computed in batches of one size, the last one filled up with whatever is there.

    So kernels do not change with how many images there are, and an image's numbers do not depend on the others. Very
    large images have smaller batches, for each shape of one size too. On a GPU the function is captured once per shape
    of images, as a CUDA graph: one launch instead of hundreds. Threads that call it share its batches.
    """

    def __init__(
        self,
        compute: Callable[[Any], tuple[Any, ...]],
        size: int,
        device: Device,
        *,
        read: Callable[..., Sequence[Any]] | None = None,
        compiled: bool = False,
        graphs: bool = True,
    ) -> None:
        """`compute` takes a (size, H, W, 3) uint8 tensor on the device, and gives tensors there, images first.

        Other arrays than images go as well, as tensors of their type. `read` makes of the outputs, cut to the images
        that there are, a result of each on the host; by default it is a tuple of arrays. With `compiled` a GPU gets
        kernels that torch.compile makes of it, once per shape.
        """
        import torch

        self.size, self.device = size, device
        if compiled and device == "cuda":
            compute = torch.compile(compute, dynamic=False)
        self._compute = compute
        self._read = read or (lambda *outputs: list(zip(*map(to_host, outputs), strict=True)))
        self._pool = torch.cuda.graph_pool_handle() if graphs and device == "cuda" else None
        """Memory that the graphs share: one at a time is replayed, and what it gave is read before the next is."""
        self._of_shape: dict[tuple[int, ...], tuple[Any, Any, Callable[[], tuple[Any, ...]]]] = {}
        """Pinned images of two batches, their tensor on the device for one, and what computes with the latter."""
        self._together = Together(self._computed)

    def __call__(self, images: Iterable[Image], *options: Any) -> list[Any]:
        """The result of each image, in their order; `options` are passed on to `read`."""
        return self._together(((image.shape, *options), image) for image in images)

    def _computed(self, kind: tuple[Any, ...], images: Sequence[Image]) -> list[Any]:
        """The results of images of one shape and the same options."""
        import torch

        shape, *options = kind
        with DEVICE, torch.inference_mode():
            if shape not in self._of_shape:
                if len(self._of_shape) == _MOST_SHAPES:
                    del self._of_shape[next(iter(self._of_shape))]
                size = max(1, self.size * _FULL_PX // max(_FULL_PX, math.prod(shape[:2])))
                dtype = torch.from_numpy(images[0][:0].copy()).dtype
                hosts = torch.zeros((2, size, *shape), dtype=dtype, pin_memory=self.device == "cuda")
                given = torch.zeros((size, *shape), dtype=dtype, device=self.device)
                run = self._captured(given) if self._pool else partial(self._compute, given)
                self._of_shape[shape] = (hosts, given, run)
            hosts, given, run = self._of_shape[shape] = self._of_shape.pop(shape)  # the last one used is the last
        batches = [images[start : start + len(given)] for start in range(0, len(images), len(given))]
        results: list[Any] = []
        _fill(hosts[0], batches[0])
        for number, batch in enumerate(batches):
            with DEVICE, torch.inference_mode():
                given.copy_(hosts[number % 2], non_blocking=True)
                outputs = run()
                for following in batches[number + 1 : number + 2]:  # a GPU computes meanwhile
                    _fill(hosts[(number + 1) % 2], following)
                # Results are on the host when they are read, so that nothing reads the pinned memory any more either.
                results += self._read(*(output[: len(batch)] for output in outputs), *options)
        return results

    def _captured(self, given: Any) -> Callable[[], tuple[Any, ...]]:
        import torch

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels and get their memory before the capture
            for _ in range(3):
                self._compute(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._compute(given)

        def replay() -> tuple[Any, ...]:
            graph.replay()
            return outputs

        return replay


def _fill(host: Any, images: Sequence[Image]) -> None:
    pixels = host.numpy()
    for i, image in enumerate(images):
        pixels[i] = image


def on_device(module: Any, device: Device, dtype: Any) -> Any:
    """A module for inference; on a GPU channels last."""
    import torch

    module = module.eval().requires_grad_(False)
    return module.to(dtype) if device == "cpu" else module.to(device, dtype, memory_format=torch.channels_last)


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: Device, dtype: Any, white: float = 255.0
) -> Callable[[Any], Any]:
    """`normalise` on a device: (N, H, W, 3) uint8 tensor -> (N, 3, H, W), on a GPU with its channels last in memory.

    Mean and standard deviation (per channel, or one for all) are those of pixels / `white`. Nothing is copied from the
    host when it is called, so that it can be part of a CUDA graph.
    """
    import torch

    shift, scale = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))

    def normalised(images: Any) -> Any:
        pixels = ((images.float() / white - shift) / scale).to(dtype).permute(0, 3, 1, 2)
        return pixels if device == "cuda" else pixels.contiguous()

    return normalised


def to_host(tensor: Any) -> Any:
    """A tensor as a numpy array, copied through pinned memory from a GPU."""
    import torch

    if tensor.device.type == "cuda":
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.numpy()
