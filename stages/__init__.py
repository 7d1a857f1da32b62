"""The pipeline, read top to bottom: the stages in their order."""

STAGES: dict[str, str] = {
    "metadata": "stages.metadata:Metadata",  # what the parquet says: size, safety, duplicates; before any download
    "download": "stages.download:Download",  # bytes from the web, or from an existing download
    "size": "stages.size:Size",  # header only: format, whole file, both sides at least filter.min_image_px
    "detect": "stages.detect:Detect",  # measures faces: count, box, five points, scores
    "filter": "stages.filter:Filter",  # judges the measurements: exactly one face, large enough
    "align": "stages.align:Align",  # norm_crop to 224 and 112
    "segment": "stages.segment:Segment",  # face parsing on a wider crop, warped onto the 224 crop
    "crop": "stages.crop:Crop",  # portrait, half, full
    "embed_face": "stages.embed_face:EmbedFace",  # normed ArcFace embedding
    "embed_image": "stages.embed_image:EmbedImage",  # CLIP (or DINOv2) features of the segmented face
    "encode": "stages.encode:Encode",  # only where asked for: latents and text embeddings, ready for training
    "pack": "stages.pack:Pack",  # the sample's json
}
"""Name -> class, resolved lazily with pkgutil.resolve_name."""
