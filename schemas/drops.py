"""Why a row is dropped: a closed list. Every reason is declared by a stage and provoked by a test."""

from enum import StrEnum
from typing import Any


class DropReason(StrEnum):
    """One word per reason, as it stands in ledgers, manifests and the funnel; `sentence` explains it."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> "DropReason":
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member

    # metadata, before any download
    BAD_URL = "bad_url", "the URL is missing, malformed, neither http nor https, or leads to no port of the web"
    DUPLICATE_URL = "duplicate_url", "an earlier row of the same part has the same URL"
    BAD_METADATA = "bad_metadata", "what the metadata says of this image cannot be read"
    UNSAFE = "unsafe", "the metadata marks the image as not safe for work (metadata.nsfw_tags, max_punsafe)"
    WATERMARK = "watermark", "the metadata says that the image carries a watermark (metadata.max_pwatermark)"
    SMALL_IMAGE = "small_image", "a side of the image is shorter than filter.min_image_px"
    # download
    FORBIDDEN_ADDRESS = "forbidden_address", "the host resolves to a private, loopback or metadata address"
    DNS_ERROR = "dns_error", "the host name does not resolve"
    CONNECTION_ERROR = "connection_error", "the connection was refused, reset or could not be made"
    TIMEOUT = "timeout", "the image did not arrive within download.timeout_s"
    NOT_FOUND = "not_found", "the server answered 404 or 410"
    ACCESS_DENIED = "access_denied", "the server answered 401, 402, 403 or 451"
    RATE_LIMITED = "rate_limited", "the server answered 429"
    HTTP_ERROR = "http_error", "the server answered with another status that is no success, or not in HTTP"
    SERVER_ERROR = "server_error", "the server answered with a 5xx status"
    REDIRECT_LOOP = "redirect_loop", "more redirects than download.max_redirects"
    TOO_MANY_BYTES = "too_many_bytes", "the body is larger than download.max_bytes"
    EMPTY_BODY = "empty_body", "the server sent no bytes, or the file has none"
    INCOMPLETE_BODY = "incomplete_body", "the connection ended before the announced length"
    OPTED_OUT = "opted_out", "the site asks by X-Robots-Tag not to be used for AI training"
    ROBOTS_TXT = "robots_txt", "the site's robots.txt asks not to fetch this URL"
    HOST_DOWN = "host_down", "the host failed so often in a row that it was left alone for a while"
    REMOVED = "removed", "the URL or the file's sha256 is on a list of download.removed"
    NOT_IN_TAR = "not_in_tar", "the existing download holds no image for this row"
    NO_FILE = "no_file", "the image file is not there any more, or may not be read"
    # decoding
    NOT_AN_IMAGE = "not_an_image", "the bytes are not an image (a web page, say)"
    UNSUPPORTED_FORMAT = (
        "unsupported_format",
        "an image format that is not decoded here, such as JPEG XL, JPEG 2000 or SVG: convert it",
    )
    TRUNCATED_IMAGE = "truncated_image", "the image file ends before its pixels do"
    CORRUPT_IMAGE = "corrupt_image", "the image file cannot be decoded"
    DECODER_CRASH = "decoder_crash", "the image file crashes its decoder, or takes it too much time or memory"
    TOO_MANY_PIXELS = "too_many_pixels", "the image has more pixels than filter.max_pixels"
    # faces
    NO_FACE = "no_face", "no face was detected with a score of models.det_thresh"
    SEVERAL_FACES = "several_faces", "more than one face was detected (filter.max_second_score)"
    SMALL_FACE = "small_face", "the short side of the face box is under filter.min_face_px"
    BAD_LANDMARKS = "bad_landmarks", "the five points do not span a face (coincident or not finite)"
    EMPTY_MASK = "empty_mask", "the segmenter kept less of the face crop than segment.min_share"
    BAD_EMBEDDING = "bad_embedding", "the face embedding is zero or not finite"
    # how good the face is: filter.* thresholds that are off by default
    LOW_DET_SCORE = "low_det_score", "the detector's score of the face is under filter.min_det_score"
    LARGE_YAW = "large_yaw", "the face is turned to a side by more than filter.max_yaw"
    LARGE_PITCH = "large_pitch", "the face looks up or down by more than filter.max_pitch"
    LARGE_ROLL = "large_roll", "the face is tilted by more than filter.max_roll"
    BLURRED = "blurred", "the sharpness of the face crop is under filter.min_sharpness"
    TOO_DARK = "too_dark", "the brightness of the face crop is under filter.min_brightness"
    TOO_BRIGHT = "too_bright", "the brightness of the face crop is over filter.max_brightness"
    FEW_EYE_PIXELS = "few_eye_pixels", "the eyes are nearer to each other than filter.min_eye_px"
    LOW_JPEG_QUALITY = "low_jpeg_quality", "the quality of the JPEG file is under filter.min_jpeg_quality"
    AI_MARKED = "ai_marked", "the file says that a model made it (filter.max_ai_marks)"
    OCCLUDED = "occluded", "more of the face is covered than filter.max_occlusion"
    WEAK_EMBEDDING = "weak_embedding", "the norm of the raw face embedding is under filter.min_embedding_norm"
    LOW_FIQA = "low_fiqa", "the face's quality for recognition, by models.fiqa, is under filter.min_fiqa"
    NOT_A_PHOTO = "not_a_photo", "the probability that the face is that of a photo is under filter.photo"
    LOW_AESTHETIC = "low_aesthetic", "the photo's score by models.heads.aesthetic is under filter.min_aesthetic"
    NSFW = "nsfw", "the photo's score by models.heads.nsfw is over filter.max_nsfw"
    # grouping by person (`group`)
    NEAR_COPY = "near_copy", "it is a copy of another photo: the same photo by its hashes and its ID vector"
    SINGLE_PHOTO = "single_photo", "no other photo of its person is in the dataset (`group --no-singles`)"
    # take-downs
    FORGOTTEN = "forgotten", "it was to be forgotten (`forget`): nothing is known of it any more"


class Dropped(Exception):
    """Raised for one row inside a `RowStage`: the row is dropped, with what was measured so far."""

    def __init__(self, reason: DropReason, **measured: Any) -> None:
        """Remember the reason and the ledger columns that are known in spite of it."""
        super().__init__(reason)
        self.reason = reason
        self.measured = measured
