"""The models: which backends there are for each task; what they must do stands in `stages.models.backends`."""

REGISTRIES: dict[str, dict[str, str]] = {
    "detector": {
        "scrfd": "stages.models.detectors.scrfd:Scrfd",
        "yunet": "stages.models.detectors.yunet:YuNet",
        "haar": "stages.models.detectors.haar:Haar",
    },
    "segmenter": {
        "facexlib": "stages.models.segmenters.facexlib:FacexlibParser",
        "grabcut": "stages.models.segmenters.grabcut:GrabCut",
    },
    "face_embedder": {
        "arcface": "stages.models.face_embedders.arcface:ArcFace",
        "lbp": "stages.models.face_embedders.lbp:Lbp",
    },
    "fiqa": {"ediffiqa-t": "stages.models.fiqa:Fiqa"},
    "image_embedder": {
        "clip-vit-h": "stages.models.image_embedders.clip:ClipVitH",
        "dinov2": "stages.models.image_embedders.dinov2:DinoV2",
        "patches": "stages.models.image_embedders.patches:Patches",
    },
}
"""Task -> the name in `models` of the settings -> backend class, resolved lazily with pkgutil.resolve_name."""
