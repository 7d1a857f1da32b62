"""Are batches, float16 and torch the same as one by one, float32 and ONNX Runtime?"""

import copy
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from inference_bench import Bench, noise, three_looks, vit_features

_COMPARED = 60
"""Boxes per image that are compared: the best."""


def _cosines(a: Any, b: Any) -> Any:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def sameness_detector(bench: Bench) -> None:
    """Candidates on the device, in batches, against the CPU in float32 one by one, and against ONNX Runtime."""
    import torch

    from stages.models.detectors.scrfd import Scrfd, _letterbox, _proof_photos
    from stages.models.detectors.scrfd_torch import ScrfdTorch

    torch.set_num_threads(os.cpu_count() or 1)
    pictures = bench.pictures or [(str(i), image) for i, image in enumerate(noise(8, 512))]
    photos = [image for _, image in pictures]
    size, side = (2, 320) if bench.smoke else (32, 640)
    scrfd = three_looks(ScrfdTorch(bench.detector, "cpu"), side)
    reference = scrfd.detect_all(photos)
    canvases = [_letterbox(image, side).canvas for image in photos]
    lowest = 0.02 if bench.detector == bench.scrfd_10g else Scrfd.lowest
    plain = ScrfdTorch(bench.detector, "cpu")(canvases, lowest)
    name = bench.detector.stem
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(bench.detector), providers=["CPUExecutionProvider"])
        theirs = ScrfdTorch(bench.detector, "cpu")
        given = session.get_inputs()[0].name
        theirs._module = lambda pixels: [
            torch.from_numpy(out)[None] for out in session.run(None, {given: pixels.numpy()})
        ]
        bench.record(
            {
                "model": name,
                "a": "cpu float32 one by one",
                "b": "onnxruntime",
                **_apart(plain, theirs(canvases, lowest)),
            }
        )
    except ImportError as error:
        bench.record({"model": name, "b": "onnxruntime", "error": str(error)})
    kinds = [("float16", torch.float16, False), ("float32", torch.float32, False), ("tf32", torch.float32, True)]
    for label, dtype, tf32 in kinds if bench.on_gpu else kinds[1:2]:
        torch.backends.cudnn.allow_tf32 = tf32
        network = ScrfdTorch(bench.detector, bench.device, size=size, dtype=dtype)
        if bench.detector != bench.scrfd_10g:
            proof = [_letterbox(photo, side).canvas for photo in _proof_photos()]
            network.require_same(proof, Scrfd.lowest)
            bench.record({"model": name, "a": f"{bench.device} {label} batch {size}", "proof_at_start_up": "passed"})
        together = network(canvases, lowest)
        alone = [network([canvas], lowest)[0] for canvas in canvases[:6]]
        one = ScrfdTorch(bench.detector, bench.device, size=1, dtype=dtype, graphs=False)
        single = one(canvases, lowest)
        values = {"model": name, "a": f"{bench.device} {label} batch {size}", "photos": len(photos)}
        bench.record({**values, "b": "cpu float32 one by one, in pixels of the canvas", **_apart(together, plain)})
        bench.record({**values, "b": "same batch, one image", **_apart(together[:6], alone)})
        bench.record({**values, "b": "batch of 1, eager", **_apart(together, single)})
        three = three_looks(network, side).detect_all(photos)
        bench.record(
            {**values, "b": "cpu float32, three looks, in pixels of the photo", **_apart(three, reference, 0.5)}
        )
    torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(1)


def _apart(found: Sequence[Any], expected: Sequence[Any], least: float = 0.0) -> dict[str, Any]:
    """How far boxes, points and scores are from the nearest expected ones, at most and in the median."""
    boxes, points, scores, counts, certain = [], [], [], 0, 0
    for ours, theirs in zip(found, expected, strict=True):
        our_scores, our_boxes, our_points = _parts(ours)
        their_scores, their_boxes, their_points = _parts(theirs)
        counts += len(our_scores) != len(their_scores)
        certain += int((our_scores >= 0.5).sum()) != int((their_scores >= 0.5).sum())
        best = [i for i in np.argsort(-our_scores, kind="stable")[:_COMPARED] if our_scores[i] >= least]
        for i in best if len(their_scores) else ():
            distances = np.abs(their_boxes - our_boxes[i]).max(axis=1) + np.abs(their_points - our_points[i]).max(
                axis=(1, 2)
            )
            j = int(distances.argmin())
            boxes.append(float(np.abs(their_boxes[j] - our_boxes[i]).max()))
            points.append(float(np.abs(their_points[j] - our_points[i]).max()))
            scores.append(float(abs(their_scores[j] - our_scores[i])))
    row: dict[str, Any] = {
        "boxes": len(boxes),
        "images_with_other_counts": counts,
        "images_with_other_certain": certain,
    }
    for name, values in (("box", boxes), ("kps", points), ("score", scores)):
        row |= {
            f"{name}_max": round(max(values, default=0), 5),
            f"{name}_median": round(float(np.median(values or [0])), 6),
        }
    return row


def _parts(faces: Any) -> tuple[Any, Any, Any]:
    """Scores, boxes, points of Faces or Candidates."""
    return (faces.score, faces.bbox, faces.kps) if hasattr(faces, "kps") else (faces.scores, faces.boxes, faces.points)


def sameness_recogniser(bench: Bench) -> None:
    import torch

    from stages.models.face_embedders.arcface_torch import ArcFaceTorch

    files = [(bench.recogniser, "random IResNet50")]
    files += [(path, path.stem) for path in (sorted(bench.pack.glob("w600k*.onnx")) if bench.pack else [])]
    faces = np.stack(noise(6 if bench.smoke else 24, 112))
    torch.set_num_threads(os.cpu_count() or 1)
    for path, name in files:
        expected = ArcFaceTorch(path, "cpu").embed(faces)
        found = ArcFaceTorch(path, bench.device, size=4 if bench.smoke else 64)
        found.require_same(list(faces[:2]))
        together = found.embed(faces)
        alone = np.concatenate([found.embed(face[None]) for face in faces[:4]])
        row = {"model": name, "a": f"{bench.device} batch", "cosine_min_to_cpu_float32": _least(together, expected)}
        row |= {"same_batch_one_image_max": float(np.abs(together[:4] - alone).max())}
        eager = ArcFaceTorch(path, bench.device, size=1, graphs=False).embed(faces)
        row |= {"cosine_min_to_batch_of_1": _least(together, eager)}
        try:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            pixels = (faces.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5
            theirs = [session.run(None, {session.get_inputs()[0].name: one[None]})[0][0] for one in pixels]
            row |= {
                "cosine_min_to_onnxruntime": _least(together, theirs),
                "cpu_torch_to_onnxruntime": _least(expected, theirs),
            }
        except ImportError as error:
            row |= {"onnxruntime": str(error)}
        bench.record(row)
    torch.set_num_threads(1)


def _least(a: Any, b: Any) -> float:
    return round(float(_cosines(a, b).min()), 7)


def sameness_tower(bench: Bench) -> None:
    import torch

    from stages.models.torch_backend import Batches

    images = noise(4, 224)
    torch.set_num_threads(os.cpu_count() or 1)
    begin = time.monotonic()
    on_cpu = copy.deepcopy(bench.vit).cpu().float()
    bench.record({"model": "ViT-H/14", "copied_to_cpu_s": round(time.monotonic() - begin, 2)})
    with torch.inference_mode():
        expected = [
            each.numpy() for each in vit_features(on_cpu, "cpu", torch.float32)(torch.from_numpy(np.stack(images[:2])))
        ]
    del on_cpu
    torch.set_num_threads(1)
    size = 4 if bench.smoke else 32
    for dtype in (torch.float16, torch.bfloat16) if bench.on_gpu else (torch.float32,):
        model = bench.vit_half if dtype == bench.half() else copy.deepcopy(bench.vit).to(dtype)
        features = vit_features(model, bench.device, dtype)
        batches = Batches(lambda given, of=features: tuple(map(torch.Tensor.float, of(given))), size, bench.device)
        together, alone = (list(map(np.stack, zip(*batches(each), strict=True))) for each in (images, images[1:2]))
        row = {"model": "ViT-H/14", "a": f"{bench.device} {dtype} batch {size}"}
        for i, name in enumerate(("clip", "clip_hidden")):
            row[f"{name}_cosine_min_to_cpu_float32"] = _least(together[i][:2], expected[i])
            row[f"{name}_same_batch_one_image_max"] = float(np.abs(together[i][1] - alone[i][0]).max())
        bench.record(row)


def sameness_parser(bench: Bench) -> None:
    import torch

    from stages.models.segmenters.facexlib import label_batches
    from stages.models.torch_backend import IMAGENET

    side = 128 if bench.smoke else 512
    images = noise(3, side)
    expected = np.stack([labels for (labels,) in label_batches(bench.bisenet, IMAGENET, "cpu")(images)])
    batches = label_batches(copy.deepcopy(bench.bisenet), IMAGENET, bench.device, size=3 if bench.smoke else 16)
    together, alone = (np.stack([labels for (labels,) in batches(each)]) for each in (images, images[2:]))
    row = {
        "model": "BiSeNet, random",
        "labels": len(np.unique(expected)),
        "same_labels_as_cpu_float32": float((together == expected).mean()),
    }
    bench.record({**row, "same_labels_as_one_image": float((together[2] == alone[0]).mean())})
    torch.set_num_threads(1)
