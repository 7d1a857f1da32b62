"""What the backends on torch share: imports without network, the device, batches, and pixels as models expect them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from schemas.errors import PlanError
from stages.models.backends import Floats, Image
from stages.runtime import Device

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of pixels in 0..1, RGB."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}


def prepare(device: Device) -> None:
    """Make torch ready for a device in this process; call before importing transformers or facexlib.

    One thread on the CPU: parallel work is one process per core, and sums must not depend on the thread count.

    Raises:
        PlanError: when a GPU is asked for and torch has none.
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


class Batches:
    """A function of images that is computed in batches of one size, the last one filled up with whatever is there.

    So kernels do not change with how many images there are, and an image's numbers do not depend on the others. On a
    GPU the function is captured once per shape of images, as a CUDA graph: one launch in place of hundreds.
    """

    def __init__(
        self,
        compute: Callable[[Any], tuple[Any, ...]],
        size: int,
        device: Device,
        *,
        compiled: bool = False,
        graphs: bool = True,
    ) -> None:
        """`compute` takes a (size, H, W, 3) uint8 tensor on the device, and gives tensors there, images first.

        With `compiled` a GPU gets kernels that torch.compile makes of it, once per shape.
        """
        import torch

        self.size, self.device = size, device
        if compiled and device == "cuda":
            compute = torch.compile(compute, dynamic=False)
        self._compute = compute
        self._graphs = graphs and device == "cuda"
        self._of_shape: dict[tuple[int, ...], tuple[Any, Any, Callable[[], tuple[Any, ...]]]] = {}

    def __call__(self, images: Iterable[Image]) -> Iterator[tuple[Any, ...]]:
        """Per batch the outputs, cut to its images; they are overwritten by the next one. All images of one shape."""
        import torch

        rest = iter(images)
        while batch := list(islice(rest, self.size)):
            with torch.inference_mode():
                host, given, run = self._prepared(batch[0].shape)
                if self.device == "cuda":
                    torch.cuda.current_stream().synchronize()  # the copy of the batch before may still read `host`
                pixels = host.numpy()
                for i, image in enumerate(batch):
                    pixels[i] = image
                given.copy_(host, non_blocking=True)
                outputs = run()
            yield tuple(output[: len(batch)] for output in outputs)

    def _prepared(self, shape: tuple[int, ...]) -> tuple[Any, Any, Callable[[], tuple[Any, ...]]]:
        """The pinned images of a batch, their tensor on the device, and what computes with the latter."""
        import torch

        if shape not in self._of_shape:
            full = (self.size, *shape)
            host = torch.zeros(full, dtype=torch.uint8, pin_memory=self.device == "cuda")
            given = torch.zeros(full, dtype=torch.uint8, device=self.device)
            self._of_shape[shape] = (host, given, self._captured(given) if self._graphs else self._eager(given))
        return self._of_shape[shape]

    def _eager(self, given: Any) -> Callable[[], tuple[Any, ...]]:
        return lambda: self._compute(given)

    def _captured(self, given: Any) -> Callable[[], tuple[Any, ...]]:
        import torch

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels and get their memory before the capture
            for _ in range(3):
                self._compute(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._compute(given)

        def replay() -> tuple[Any, ...]:
            graph.replay()
            return outputs

        return replay


def on_device(module: Any, device: Device, dtype: Any = None) -> Any:
    """A module for inference: on the CPU float32 as it is, on a GPU float16 (or `dtype`), channels last."""
    import torch

    module = module.eval().requires_grad_(False)
    if device == "cpu":
        return module.to(dtype or torch.float32)
    return module.to(device, dtype or torch.float16, memory_format=torch.channels_last)


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
