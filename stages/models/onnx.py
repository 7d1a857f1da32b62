"""ONNX models of insightface packs, loaded by insightface's own model zoo on the device that the plan asks for."""

from pathlib import Path
from typing import Any

import cv2
import onnxruntime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from schemas.errors import PlanError, WeightsError
from stages.runtime import Device

ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    DecodeError,
)
"""What ONNX Runtime raises for a file, or for what a file does not take."""


def session_options() -> onnxruntime.SessionOptions:
    """One thread: parallel work is one process per core, and sums must not depend on the thread count."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def cpu_session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])


def load(path: Path, task: str, device: Device) -> Any:
    """The model that insightface makes of an ONNX file; `task` is detection or recognition.

    Raises:
        WeightsError: when the file is not a model for the task.
        PlanError: when a GPU is wanted and ONNX Runtime does not run the model there.
    """
    # Its package imports image augmentation too, a second of it: who only lists models need not wait for that.
    from insightface.model_zoo import get_model
    from insightface.model_zoo.package_manifest import has_model_package_manifest

    cv2.setNumThreads(1)
    providers = ["CPUExecutionProvider"]
    if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    declared = task if has_model_package_manifest(path.parent) else None
    try:
        model = get_model(str(path), model_task=declared, providers=providers, sess_options=session_options())
    except ERRORS as error:
        raise WeightsError(f"{path} cannot be loaded by ONNX Runtime ({error}): fetch it again.") from error
    if getattr(model, "taskname", None) != task:
        raise WeightsError(f"{path} is not a {task} model of insightface: set models.pack to a folder that holds one.")
    require_device(model.session, device)
    return model


def require_device(session: Any, device: Device) -> None:
    """Refuse a session that quietly fell back to the CPU; a PlanError says what to install or set."""
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise PlanError(
            "executor.gpus asks for a GPU, but ONNX Runtime has none here: install onnxruntime-gpu in place of "
            "onnxruntime (README, GPU), or set executor.gpus = 0."
        )
