"""Every column of a record: name, Arrow type, and what it holds (shape, unit, colour order, frame).

A record is one image's row, from its URL to its sample in a tar. `LEDGER` columns survive a drop and
stand in the ledger; all others are payload (pixels, captions, embeddings) and are lost with it.
"""

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One typed field of a record."""

    name: str
    type: pa.DataType
    doc: str
    ledger: bool = True
    """Kept in the ledger for every row; payload otherwise."""
    optional: bool = False
    """May be null for a row that is alive after the stage that writes it."""


def _payload(name: str, doc: str, *, optional: bool = False, type: pa.DataType | None = None) -> Column:
    return Column(name, type or pa.binary(), doc, ledger=False, optional=optional)


_BBOX = pa.list_(pa.float32(), 4)
_KPS = pa.list_(pa.list_(pa.float32(), 2), 5)

_FEATURES = {
    "clip": "(1024,) float16: image_embeds",
    "clip_hidden": "(257, 1280) float16: penultimate hidden_states",
    "dino": "(257, D) float16: last hidden state of DINOv2",
}
_CONDITIONS = {"": "segmented ", "_plain": "plain (not segmented) "}
FEATURES = tuple(f"{name}{plain}{mirror}" for name in _FEATURES for plain in _CONDITIONS for mirror in ("", "_mirror"))
"""Columns of image features: of the face by `segment.condition`, and of its mirror image with `encode.mirror`."""
TOKENS = tuple(name for name in FEATURES if name.startswith(("clip_hidden", "dino")))
"""Those that hold a row per token; in int8 they are columns of their own, `<name>_int8`."""

_ALL = (
    # seed: what the metadata says
    Column("key", pa.string(), "dot-free id, <part>-<row with 9 digits>; unique in the dataset, sorts as the rows do"),
    Column("part", pa.string(), "name of the metadata part"),
    Column("row", pa.int64(), "row number in the part, from 0"),
    Column("url", pa.string(), "where the image is fetched from", optional=True),
    Column("source_kind", pa.string(), "`web`, or `made` for images that a model made", optional=True),
    Column("source_file", pa.string(), "name of an image that was there already, in its folder or tar", optional=True),
    _payload("text", "caption", optional=True, type=pa.string()),
    Column("caption_chars", pa.int32(), "length of the caption without spaces around it, 0 for none", optional=True),
    _payload("text_alternatives", "further captions", optional=True, type=pa.list_(pa.string())),
    _payload("broken", "true where the metadata of this row cannot be read", optional=True, type=pa.bool_()),
    Column("meta_width", pa.int32(), "width that the metadata claims, pixels", optional=True),
    Column("meta_height", pa.int32(), "height that the metadata claims, pixels", optional=True),
    Column("nsfw", pa.string(), "safety tag of the metadata (UNLIKELY, UNSURE, NSFW)", optional=True),
    Column("punsafe", pa.float32(), "probability that the image is not safe for work, 0..1, metadata", optional=True),
    Column("pwatermark", pa.float32(), "probability of a watermark, 0..1, metadata", optional=True),
    _payload(
        "image_ref",
        "where bytes that need no download lie, as stages.fetch.stored reads it",
        optional=True,
        type=pa.string(),
    ),
    # download
    _payload("image", "the image file as fetched, encoded bytes, EXIF not yet applied"),
    Column("sha256", pa.string(), "sha256 of the image file as fetched, hex"),
    Column("n_bytes", pa.int64(), "length of the image file, bytes"),
    # size
    Column("format", pa.string(), "container of the image file as Pillow names it (JPEG, PNG, WEBP, …)"),
    Column(
        "jpeg_quality",
        pa.int32(),
        "quality at which libjpeg takes the nearest table, 1..100; 0: no table; 100: another format",
        optional=True,
    ),
    Column(
        "ai_mark", pa.string(), "by what the file says that a model made it; empty where it does not", optional=True
    ),
    # size; download knows them only of the rows that it drops for their header
    Column("width", pa.int32(), "width after the EXIF turn, pixels; the frame of all boxes and points", optional=True),
    Column("height", pa.int32(), "height after the EXIF turn, pixels", optional=True),
    # screen
    Column(
        "screen_score",
        pa.float32(),
        "best score of any box in a look at the reduced photo, 0..1; null where there was no such look",
        optional=True,
    ),
    _payload(
        "screen_points",
        "where that look shows anything that may be a face, however unlikely: x y, pixels of the turned photo",
        optional=True,
        type=pa.list_(pa.list_(pa.float32(), 2)),
    ),
    # detect
    Column("n_faces", pa.int32(), "faces with a score of at least models.det_thresh"),
    Column("bbox", _BBOX, "box of the largest face, x1 y1 x2 y2, pixels of the turned photo", optional=True),
    Column(
        "kps", _KPS, "its points: left eye, right eye, nose, left and right mouth corner; x y, pixels", optional=True
    ),
    Column("det_score", pa.float32(), "detector score of the largest face, 0..1", optional=True),
    Column("face_px", pa.float32(), "short side of bbox, pixels of the original", optional=True),
    Column("second_score", pa.float32(), "best score (a closer look's, where it decided) of the other boxes, or 0"),
    # align
    _payload("face", "224x224 norm_crop of the photo (ArcFace template x 2), RGB, JPEG"),
    _payload(
        "face112", "112x112 norm_crop of the photo (ArcFace template), RGB, raw pixels: the input of face embedders"
    ),
    Column("sharpness", pa.float32(), "variance of the Laplacian of the grey face crop, grey levels squared"),
    Column("brightness", pa.float32(), "mean grey level of the face crop, 0..255"),
    Column("roll_deg", pa.float32(), "in-plane turn of the eye line, degrees, clockwise positive"),
    # segment
    _payload("mask", "224x224 uint8 label map aligned with face, 19 CelebAMask classes in BiSeNet order, PNG"),
    Column("mask_share", pa.float32(), "share of the face crop that is kept as foreground, 0..1"),
    Column("occlusion", pa.float32(), "share of the hull of the five points that shows no skin, 0..1", optional=True),
    # crop
    _payload(
        "portrait", "square crop, the face fills crop.face_share.portrait of its height, RGB, JPEG", optional=True
    ),
    _payload("half", "square crop, the face fills crop.face_share.half of its height, RGB, JPEG", optional=True),
    _payload("full", "the whole photo at its own aspect, long side bounded, RGB, JPEG", optional=True),
    _payload(
        "crops", "JSON: per crop its box in the photo, its size, its face share, or why it is absent", type=pa.string()
    ),
    Column("crops_made", pa.list_(pa.string()), "names of the crops that the photo gives"),
    # embed_face
    _payload(
        "arcface",
        "npy (512,) float32: normed_embedding of face112, unit length; null where pack.embeddings is off",
        optional=True,
    ),
    Column("embedding_norm", pa.float32(), "L2 norm of the raw embedding: raw = arcface x embedding_norm"),
    Column("fiqa", pa.float32(), "quality for recognition by models.fiqa, about 0..1", optional=True),
    # embed_image
    *(
        _payload(f"{name}{plain}{mirror}", f"npy {what} of the {how}{turned}face", optional=True)
        for name, what in _FEATURES.items()
        for plain, how in _CONDITIONS.items()
        for mirror, turned in (("", ""), ("_mirror", "mirrored "))
    ),
    *(
        _payload(f"{name}_int8", f"{name} as schemas.int8 has it, safetensors; with pack.hidden = int8", optional=True)
        for name in TOKENS
    ),
    Column("photo", pa.float32(), "probability that the face is that of a photo, 0..1, by CLIP", optional=True),
    Column("aesthetic", pa.float32(), "score of the photo by models.heads.aesthetic", optional=True),
    Column("nsfw_score", pa.float32(), "score of the photo by models.heads.nsfw, about 0..1", optional=True),
    # encode: only with latents or text
    _payload(
        "latents_portrait",
        "npy (8, h, w) float16: mean and log-variance of the scaled latents of portrait",
        optional=True,
    ),
    _payload(
        "latents_half", "npy (8, h, w) float16: mean and log-variance of the scaled latents of half", optional=True
    ),
    _payload(
        "latents_full", "npy (8, h, w) float16: mean and log-variance of the scaled latents of full", optional=True
    ),
    _payload("text_embeds", "npy (77, C) float16: encoder_hidden_states of the caption", optional=True),
    _payload("text_pooled", "npy (P,) float16: pooled caption, SDXL only", optional=True),
    _payload(
        "targets",
        "JSON: base and hashes of what encoded, and how each picture was cut",
        optional=True,
        type=pa.string(),
    ),
    # caption: only with models.captioner
    _payload("further_caption", "caption by models.captioner", optional=True, type=pa.string()),
    Column("further_chars", pa.int32(), "length of that caption, 0 where the model gave none", optional=True),
    # pack
    _payload("json", "the sample's metadata as UTF-8 JSON"),
    _payload("txt", "the caption, UTF-8; only with pack.layout = plain", optional=True),
    Column("sample_sha256", pa.string(), "of the sample's files, as schemas.shard.sample_sha256 takes it, hex"),
    # `group`: of datasets that it made
    Column("person", pa.int64(), "number of the person, random and of this dataset alone", optional=True),
    # the runner
    Column("verdict", pa.string(), "`kept`, or the reason of the drop"),
    Column("stage", pa.string(), "the stage that dropped it; `pack` for kept rows"),
)

COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}

SEED = tuple(COLUMNS)[: tuple(COLUMNS).index("image_ref") + 1]
"""Columns that a source fills, in order."""

LEDGER = tuple(name for name, column in COLUMNS.items() if column.ledger)
"""Columns of the ledger, in order."""

KEPT = "kept"
"""The verdict of a row that ended as a sample."""


def schema(names: tuple[str, ...]) -> pa.Schema:
    """The Arrow schema of the named columns, in the given order."""
    return pa.schema([pa.field(name, COLUMNS[name].type) for name in names])


LEDGER_SCHEMA = schema(LEDGER)
SEED_SCHEMA = schema(SEED)

LATER = (
    *("source_kind", "source_file", "caption_chars", "jpeg_quality", "ai_mark", "screen_score", "occlusion"),
    *("crops_made", "further_chars", "person", "fiqa", "photo", "aesthetic", "nsfw_score"),
)
"""Columns that ledgers of earlier releases lack: nothing that decides reads them there, so SCHEMA_VERSION stays."""


def complete(ledger: pa.Table) -> pa.Table:
    """A ledger with the columns that it lacks since an earlier release wrote it, null."""
    for name in LATER:
        if name not in ledger.column_names:
            nulls = pa.nulls(ledger.num_rows, COLUMNS[name].type)
            ledger = ledger.add_column(min(LEDGER.index(name), ledger.num_columns), name, nulls)
    return ledger
