"""Every column of a record: name, Arrow type, and what it holds (shape, unit, colour order, frame).

A record is one image's row, from its URL to its sample in a tar. `LEDGER` columns survive a drop and
stand in the ledger; all others are payload (pixels, captions, embeddings) and are lost with it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from schemas.arrow import spare_pandas

spare_pandas()  # before the first array, which any of those who import this may make


@dataclass(frozen=True)
class Column:
    name: str
    type: pa.DataType
    doc: str
    ledger: bool = True
    """Kept in the ledger for every row; payload otherwise."""
    optional: bool = False
    """May be null for a row that is alive after the stage that writes it."""


_optional = partial(Column, optional=True)
_payload = partial(Column, ledger=False)
_extra = partial(Column, ledger=False, optional=True)

_INT, _FLOAT, _TEXT, _BYTES = pa.int32(), pa.float32(), pa.string(), pa.binary()
# Not of a fixed size, as a type: pyarrow before 26 cannot read such lists from parquet where a row has none.
_BBOX = pa.list_(_FLOAT)
_KPS = pa.list_(pa.list_(_FLOAT))
_SIZES = {"bbox": (4,), "kps": (5, 2)}

CROPS = ("portrait", "half", "full")

_FEATURES = {
    f"{name}{plain}{mirror}": f"npy {what} of the {how}{turned}face"
    for name, what in (
        ("clip", "(1024,) float16: image_embeds"),
        ("clip_hidden", "(257, 1280) float16: penultimate hidden_states"),
        ("dino", "(257, D) float16: last hidden state of DINOv2"),
    )
    for plain, how in (("", "segmented "), ("_plain", "plain (not segmented) "))
    for mirror, turned in (("", ""), ("_mirror", "mirrored "))
}
FEATURES = tuple(_FEATURES)
"""Columns of image features: of the face by `segment.condition`, and of its mirror image with `encode.mirror`."""
TOKENS = tuple(name for name in FEATURES if name.startswith(("clip_hidden", "dino")))
"""Those that hold a row per token; in int8 they are columns of their own, `<name>_int8`."""

_ALL = (
    # seed: what the metadata says
    Column("key", _TEXT, "dot-free id: part, `-`, row with 9 digits; unique in the dataset, sorts as the rows do"),
    Column("part", _TEXT, "name of the metadata part"),
    Column("row", pa.int64(), "row number in the part, from 0"),
    _optional("url", _TEXT, "where the image is fetched from"),
    _optional("source_kind", _TEXT, "`web`, or `made` for images that a model made"),
    _optional("source_file", _TEXT, "name of an image that was there already, in its folder or tar"),
    _extra("text", _TEXT, "caption"),
    _optional("caption_chars", _INT, "length of the caption without spaces around it, 0 for none"),
    _extra("text_alternatives", pa.list_(_TEXT), "further captions"),
    _extra("broken", pa.bool_(), "true where the metadata of this row cannot be read"),
    _optional("meta_width", _INT, "width that the metadata claims, pixels"),
    _optional("meta_height", _INT, "height that the metadata claims, pixels"),
    _optional("nsfw", _TEXT, "safety tag of the metadata (UNLIKELY, UNSURE, NSFW)"),
    _optional("punsafe", _FLOAT, "probability that the image is not safe for work, 0..1, metadata"),
    _optional("pwatermark", _FLOAT, "probability of a watermark, 0..1, metadata"),
    _extra("image_ref", _TEXT, "where bytes that need no download lie, as stages.fetch.stored reads it"),
    # download
    _payload("image", _BYTES, "the image file as fetched, encoded bytes, EXIF not yet applied"),
    Column("sha256", _TEXT, "sha256 of the image file as fetched, hex"),
    Column("n_bytes", pa.int64(), "length of the image file, bytes"),
    # size
    Column("format", _TEXT, "container of the image file as Pillow names it (JPEG, PNG, WEBP, …)"),
    _optional(
        "jpeg_quality",
        _INT,
        "quality at which libjpeg takes the nearest table, 1..100; 0: no table; 100: another format",
    ),
    _optional("ai_mark", _TEXT, "by what the file says that a model made it; empty where it does not"),
    # size; download knows them only of the rows that it drops for their header
    _optional("width", _INT, "width after the EXIF turn, pixels; the frame of all boxes and points"),
    _optional("height", _INT, "height after the EXIF turn, pixels"),
    # screen
    _optional(
        "screen_score",
        _FLOAT,
        "best score of any box in a look at the reduced photo, 0..1; null where there was no such look",
    ),
    _extra(
        "screen_points",
        pa.list_(pa.list_(_FLOAT, 2)),
        "where that look shows anything that may be a face, however unlikely: x y, pixels of the turned photo",
    ),
    # detect
    Column("n_faces", _INT, "faces with a score of at least models.det_thresh"),
    _optional("bbox", _BBOX, "box of the largest face, x1 y1 x2 y2, pixels of the turned photo"),
    _optional("kps", _KPS, "its points: left eye, right eye, nose, left and right mouth corner; x y, pixels"),
    _optional("det_score", _FLOAT, "detector score of the largest face, 0..1"),
    _optional("face_px", _FLOAT, "short side of bbox, pixels of the original"),
    _optional(
        "yaw_deg", _FLOAT, "turn to a side that the points suggest, degrees, good to about 10; right is positive"
    ),
    _optional("pitch_deg", _FLOAT, "turn up or down that they suggest, degrees, good to about 10; down is positive"),
    _optional("eye_px", _FLOAT, "distance of the eyes, pixels of the original"),
    Column("second_score", _FLOAT, "best score (a closer look's, where it decided) of the other boxes, or 0"),
    # align
    _payload("face", _BYTES, "224x224 norm_crop of the photo (ArcFace template x 2), RGB, JPEG"),
    _payload(
        "face112",
        _BYTES,
        "112x112 norm_crop of the photo (ArcFace template), RGB, raw pixels: the input of face embedders",
    ),
    Column("sharpness", _FLOAT, "variance of the Laplacian of the grey face crop, grey levels squared"),
    Column("brightness", _FLOAT, "mean grey level of the face crop, 0..255"),
    Column("roll_deg", _FLOAT, "in-plane turn of the eye line, degrees, clockwise positive"),
    # segment
    _payload("mask", _BYTES, "224x224 uint8 label map aligned with face, 19 CelebAMask classes in BiSeNet order, PNG"),
    Column("mask_share", _FLOAT, "share of the face crop that is kept as foreground, 0..1"),
    _optional("occlusion", _FLOAT, "share of the hull of the five points that shows no skin, 0..1"),
    # crop
    _extra("portrait", _BYTES, "square crop, the face fills crop.face_share.portrait of its height, RGB, JPEG"),
    _extra("half", _BYTES, "square crop, the face fills crop.face_share.half of its height, RGB, JPEG"),
    _extra("full", _BYTES, "the whole photo at its own aspect, long side bounded, RGB, JPEG"),
    _payload("crops", _TEXT, "JSON: per crop its box in the photo, its size, its face share, or why it is absent"),
    Column("crops_made", pa.list_(_TEXT), "names of the crops that the photo gives"),
    # embed_face
    _extra(
        "arcface",
        _BYTES,
        "npy (512,) float32: normed_embedding of face112, unit length; null where pack.embeddings is off",
    ),
    Column("embedding_norm", _FLOAT, "L2 norm of the raw embedding: raw = arcface x embedding_norm"),
    _optional("fiqa", _FLOAT, "quality for recognition by models.fiqa, about 0..1"),
    # embed_image
    *(_extra(name, _BYTES, doc) for name, doc in _FEATURES.items()),
    *(
        _extra(f"{name}_int8", _BYTES, f"{name} as schemas.int8 has it, safetensors; with pack.hidden = int8")
        for name in TOKENS
    ),
    _optional("photo", _FLOAT, "probability that the face is that of a photo, 0..1, by CLIP"),
    _optional("aesthetic", _FLOAT, "score of the photo by models.heads.aesthetic"),
    _optional("nsfw_score", _FLOAT, "score of the photo by models.heads.nsfw, about 0..1"),
    # encode: only with latents or text
    *(
        _extra(
            f"latents_{crop}",
            _BYTES,
            f"npy (8, h, w) float16: mean and log-variance of the scaled latents of {crop}",
        )
        for crop in CROPS
    ),
    _extra("text_embeds", _BYTES, "npy (77, C) float16: encoder_hidden_states of the caption"),
    _extra("text_pooled", _BYTES, "npy (P,) float16: pooled caption, SDXL only"),
    _extra("targets", _TEXT, "JSON: base and hashes of what encoded, and how each picture was cut"),
    # caption: only with models.captioner
    _extra("further_caption", _TEXT, "caption by models.captioner"),
    _optional("further_chars", _INT, "length of that caption, 0 where the model gave none"),
    # pack
    _payload("json", _BYTES, "the sample's metadata as UTF-8 JSON"),
    _extra("txt", _BYTES, "the caption, UTF-8; only with pack.layout = plain"),
    Column("sample_sha256", _TEXT, "of the sample's files, as schemas.shard.sample_sha256 takes it, hex"),
    # `group`: of datasets that it made
    _optional("person", pa.int64(), "number of the person, random and of this dataset alone"),
    # the runner
    Column("verdict", _TEXT, "`kept`, or the reason of the drop"),
    Column("stage", _TEXT, "the stage that dropped it; `pack` for kept rows"),
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
    *("yaw_deg", "pitch_deg", "eye_px"),
)
"""Columns that ledgers of earlier releases lack: nothing that decides reads them there, so SCHEMA_VERSION stays."""


def complete(ledger: pa.Table, columns: Collection[str] = LEDGER) -> pa.Table:
    """A ledger as this release writes it: with those of `columns` that it lacks since an earlier one did, null.

    Raises:
        pa.ArrowException: when a box or points are not lists of their sizes.
    """
    for name in _SIZES.keys() & {*ledger.column_names}:
        lists = ledger[name].cast(COLUMNS[name].type)
        if not has_sizes(name, lists):
            raise pa.ArrowInvalid(f"{name} holds lists of other sizes than {_SIZES[name]}")
        ledger = ledger.set_column(ledger.column_names.index(name), name, lists)
    for name in sorted(LATER, key=LEDGER.index):  # each goes behind those before it, which are there by then
        if name in columns and name not in ledger.column_names:
            nulls = pa.nulls(ledger.num_rows, COLUMNS[name].type)
            ledger = ledger.add_column(min(LEDGER.index(name), ledger.num_columns), name, nulls)
    return ledger


def has_sizes(name: str, column: pa.ChunkedArray) -> bool:
    """Whether a box has four numbers, and points are five of two, in each row that has any."""
    column = column.drop_null()
    for size in _SIZES.get(name, ()):
        if pc.unique(pc.list_value_length(column)).to_pylist() not in ([], [size]):
            return False
        column = pc.list_flatten(column)
    return True
