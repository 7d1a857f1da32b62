"""The settings of the stages, a section per topic. The run's config (pipeline.dataset.config) extends them."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from schemas.section import Section


class MetadataSettings(Section):
    """What the metadata alone decides, before any download. A null never drops a row."""

    max_punsafe: float = Field(0.5, ge=0, le=1)
    """Rows with a higher probability of being not safe for work are dropped (LAION's threshold)."""
    max_pwatermark: float = Field(0.8, ge=0, le=1)
    """Rows with a higher probability of a watermark are dropped (LAION's threshold)."""
    nsfw_tags: tuple[str, ...] = ("NSFW",)
    """Safety tags that drop a row; add UNSURE to be stricter."""


class DownloadSettings(Section):
    """How images are fetched."""

    engine: Literal["native", "img2dataset"] = "native"
    """`native`: asynchronous, stops as soon as the header shows a small image. `img2dataset`: its own downloader."""
    allow_loopback: bool = False
    """Fetch from loopback addresses too (tests and the bundled sample)."""
    timeout_s: float = Field(20.0, gt=0)
    """Total deadline per URL, redirects and retries included, without the waits for its turn, seconds."""
    max_bytes: int = Field(50_000_000, gt=0, le=2**31 - 1)
    """Bodies larger than this are dropped, bytes; no column of Arrow takes more than 2 GB."""
    max_redirects: int = Field(5, ge=0)
    """Redirects followed per URL."""
    retries: int = Field(1, ge=0)
    """Further attempts after a transient failure (connection error, short body, 429, 5xx), within the deadline."""
    host_failures: int = Field(10, ge=0)
    """Failures in a row (deadlines, broken connections, 429, 5xx) after which a host is left alone; 0: never."""
    concurrency: int = Field(256, ge=1)
    """Downloads at a time, per process; look-ups of names and robots.txt do not count."""
    per_host: int = Field(16, ge=1)
    """Connections to one host at a time, per process."""
    user_agent: str = Field("faceshards/0.1 (+image dataset builder; set download.contact)", pattern=r"^[ -~]+$")
    """User-Agent header; its first word, up to a slash, is our name in robots.txt."""
    contact: str = Field("", pattern=r"^[ -~]*$")
    """Address or URL that site owners can write to; appended to the User-Agent."""
    respect_opt_out: bool = True
    """Drop images whose X-Robots-Tag says noai, noimageai, noindex, noimageindex or none."""
    respect_robots: bool = True
    """Fetch nothing that a host's robots.txt disallows for our name, or for `*` where our name is not in it."""
    removed: tuple[str, ...] = ()
    """Lists of what must not be used: text, CSV or parquet files of URLs and of files' sha256.

    The next run takes it out of finished shards too."""


class FilterSettings(Section):
    """Thresholds on measurements."""

    min_image_px: int = Field(1024, ge=1, le=2**31 - 1)
    """Both sides of the image must have at least this many pixels."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Images with more pixels are never decoded (decompression bombs)."""
    min_face_px: float = Field(128, ge=0)
    """Short side of the face box, pixels of the original."""
    max_second_score: float = Field(0.4, ge=0, le=1)
    """A further box with a score above this counts as a second face, even under models.det_thresh."""
    min_det_score: float = Field(0.0, ge=0, le=1)
    """Least score of the face; 0: any."""
    max_yaw: float = Field(90.0, gt=0, le=90)
    """Farthest turn to a side, degrees, as the five points suggest it (good to about 10); 90: any."""
    max_pitch: float = Field(90.0, gt=0, le=90)
    """Farthest look up or down, degrees, likewise; 90: any."""
    max_roll: float = Field(180.0, gt=0, le=180)
    """Farthest tilt of the eye line, degrees; 180: any."""
    min_eye_px: float = Field(0.0, ge=0)
    """Least distance of the eyes, pixels of the original; 0: any."""
    min_jpeg_quality: float = Field(0.0, ge=0, le=100)
    """Least quality of the JPEG file, by its tables; files of other formats count as 100; 0: any."""
    max_ai_marks: float = Field(1.0, ge=0, le=1)
    """0: drop files that say in EXIF, XMP, C2PA or PNG texts that a model made them; 1: any."""
    min_sharpness: float = Field(0.0, ge=0)
    """Least variance of the Laplacian of the face crop, grey levels squared; 0: any."""
    min_brightness: float = Field(0.0, ge=0, le=255)
    """Least mean grey level of the face crop; 0: any."""
    max_brightness: float = Field(255.0, ge=0, le=255)
    """Most mean grey level of the face crop; 255: any."""
    max_occlusion: float = Field(1.0, ge=0, le=1)
    """Most of the area between eyes and mouth that may be no skin, by the face mask; 1: any."""
    min_embedding_norm: float = Field(0.0, ge=0)
    """Least norm of the raw face embedding, which is low for faces that are hard to tell; 0: any."""
    min_fiqa: float = Field(0.0, ge=0, le=1)
    """Least quality of the face for recognition, as models.fiqa sees it; 0: any."""
    photo: float = Field(0.0, ge=0, le=1)
    """Least probability that the face is that of a photo, not of a painting, cartoon or statue, as CLIP sees it; 0:
    any."""
    min_aesthetic: float = Field(0.0, ge=0)
    """Least score by models.heads.aesthetic; 0: any."""
    max_nsfw: float = Field(1.0, ge=0, le=1)
    """Most that models.heads.nsfw may give a photo; 1: any."""


Level = Annotated[int, Field(ge=0, le=255)]


class SegmentSettings(Section):
    """The face mask."""

    keep: tuple[Annotated[int, Field(ge=0, le=18)], ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18)
    """CelebAMask labels (BiSeNet order) that are foreground; by default all but background and cloth."""
    fill: tuple[Level, Level, Level] = (128, 128, 128)
    """RGB that replaces the background before the image embedding."""
    min_share: float = Field(0.1, ge=0, le=1)
    """Smallest share of the face crop that must be foreground."""
    condition: Literal["segmented", "plain", "both"] = "segmented"
    """What the image features show: the face alone, before `fill`; the whole crop, as users of ComfyUI, webui and
    diffusers mostly give it; or both, in files of their own, between which training draws."""


class FaceShare(Section):
    """Face height / crop height."""

    portrait: float = Field(0.5, gt=0, le=1)
    """Head and shoulders."""
    half: float = Field(0.3, gt=0, le=1)
    """Half body: with 0.22, to the hips, most photos of 1024 to 2048 px have no room for it."""
    full: float = Field(1.0, gt=0, le=1)
    """The whole photo is taken as it is; photos whose face fills more than this share have no `full`."""


class CropSettings(Section):
    """Crops of the photo at several face proportions."""

    size: int = Field(512, ge=1)
    """Smallest side of a crop, pixels of the original: nothing is upsampled."""
    max_size: int = Field(1024, ge=1)
    """Larger square crops are reduced to this side."""
    max_long_side: int = Field(2048, ge=1, le=65_500)
    """`full` is reduced to this long side; no JPEG has more than 65,500."""
    face_share: FaceShare = FaceShare()
    """Face height / crop height per crop."""
    tolerance: float = Field(0.1, ge=0)
    """How far the face share may exceed face_share, relatively, when the photo is too small for the exact one."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """JPEG quality of all crops."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "CropSettings":
        if self.max_size < self.size or self.max_long_side < self.size:
            raise ValueError("crop.max_size and crop.max_long_side must not be smaller than crop.size")
        return self


class PackSettings(Section):
    """What goes into a sample."""

    embeddings: bool = True
    """Write the ID vector and the image features; without them shards hold no biometric numbers, and train nothing."""
    hidden: Literal["fp16", "int8"] = "fp16"
    """Features of tokens (clip_hidden, dino) as float16, or at half the size as int8 with a scale per 64 channels."""
    layout: Literal["native", "plain"] = "native"
    """`plain`: `full.jpg` is called `jpg`, and the caption stands in `txt` too, for tools that look for these."""


Score = Annotated[float, Field(ge=0, le=1)]


class ModelSettings(Section):
    """Which models do the work. Names are registry names; backends of different profiles can be mixed."""

    detector: str = "scrfd"
    """scrfd, yunet or haar."""
    segmenter: str = "facexlib"
    """facexlib or grabcut."""
    face_embedder: str = "arcface"
    """arcface or lbp."""
    image_embedder: str = "clip-vit-h"
    """clip-vit-h, dinov2 or patches."""
    pack: str = "buffalo_l"
    """Name or folder of an insightface pack (detection and recognition are used)."""
    parser: Literal["bisenet", "parsenet"] = "bisenet"
    """The face parser of facexlib."""
    runtime: dict[Literal["detector", "face_embedder"], Literal["onnxruntime", "torch"]] = Field(default_factory=dict)
    """What computes the ONNX files of the pack: onnxruntime or torch, one word for all or per task; a task that is not
    named gets onnxruntime on a CPU, which is faster there, and torch on a GPU, where it takes batches."""
    compile: bool = False
    """On a GPU, have torch.compile make kernels for the detector, the parser and the recogniser where torch computes
    them: 1.6 to 2.7 times as fast for about 10 s each at every start."""
    decoding: Literal["cpu", "gpu"] = "cpu"
    """Who decodes JPEG files in full: `gpu` is nvJPEG, in the process of the models. Its values differ by some grey
    levels, it notices less damage, and a file that crashes it crashes that process."""
    screen: str = "detector"
    """Who looks at the reduced photo first, so that only photos in which it sees anything are decoded in full: the
    `detector` itself (where it can: scrfd), that of another pack, by its name or folder (such as buffalo_sc), or
    `off`."""
    screen_thresh: float = Field(0.2, ge=0, lt=1)
    """Smallest score of any box there (between 0.1 and 0.3: in a closer look at it) that earns a photo the full look;
    `python -m pipeline screen` fits it."""
    captioner: str = ""
    """Who writes a further caption: the folder of an image-text model of transformers, or the URL of an
    OpenAI-compatible endpoint, such as http://localhost:8000/v1; empty: nobody. See `caption`."""
    fiqa: str = ""
    """Who says how good a face is for recognition (column `fiqa`): ediffiqa-t, or an .onnx file like it or like
    InspireFace's pose-quality; empty: nobody."""
    heads: dict[Literal["photo", "aesthetic", "nsfw"], str] = Field(default_factory=dict)
    """What is read off CLIP's image_embeds -> a .safetensors file of linear layers, see docs/thresholds.md. For `photo`
    the file that `models fetch photo` makes beside the weights, unless another is named; photo = "" uses none."""
    det_size: int = Field(640, ge=32, multiple_of=32)
    """Side of the square that the detector sees, pixels."""
    det_thresh: float = Field(0.5, gt=0, lt=1)
    """Smallest detector score of a face."""
    second_look: tuple[Score, Score] = (0.4, 0.7)
    """Scores, from and below, of boxes beside a face that are looked at closer before they count as a second face
    (where the detector can: scrfd); [0, 0]: none."""
    paths: dict[str, str] = Field(default_factory=dict)
    """Weight name -> file or folder, looked at before all else, such as {yunet = "/models/yunet.onnx"}."""
    licences: tuple[str, ...] = ()
    """Licences that weights may have, as `models list` says them, `*` for anything; none listed: all. The profile
    `permissive` lists those that allow commercial use."""
    accept_noncommercial: bool = False
    """Needed once for weights whose licence forbids commercial use; the licence is stamped into every manifest."""
    allow_download: bool = False
    """Fetch missing weights during a run; otherwise only `models fetch` does."""

    @field_validator("runtime", mode="before")
    @classmethod
    def _one_word_for_all(cls, value: object) -> object:
        return dict.fromkeys(("detector", "face_embedder"), value) if isinstance(value, str) else value


class CaptionSettings(Section):
    """A further caption, by `models.captioner`."""

    prompt: str = "Describe this photo in one sentence."
    """The prompt of chat models and endpoints; models that only caption (BLIP, GIT) take none."""
    max_tokens: int = Field(77, ge=1)
    """Most tokens of an answer; what exceeds them is cut off."""
    max_side: int = Field(1024, ge=16)
    """Long side of the picture that the model gets, pixels: larger ones are reduced."""
    model: str = ""
    """The endpoint's name of the model."""
    api_key_env: str = Field("", pattern=r"^([A-Za-z_]\w*)?$")
    """Environment variable that holds the endpoint's key, on each machine that computes; the key itself is stored
    nowhere."""
    concurrency: int = Field(8, ge=1)
    """Requests at a time, per process; those of a batch (executor.batch_rows) go together."""
    timeout_s: float = Field(120.0, gt=0)
    """Total deadline per picture, retries included, seconds."""
    retries: int = Field(5, ge=0)
    """Further attempts after a transient failure, within the deadline. Then the shard fails; a rerun tries it again."""


class EncodeSettings(Section):
    """What is computed ahead for training, at the price of larger shards; `--with latents,text,mirror` asks for it."""

    latents: bool = False
    """Mean and log-variance of the crops' latents, so that training needs no VAE: 64 kB per crop at 512."""
    text: bool = False
    """Embeddings of the caption, so that training needs no text encoder: 120 kB (SD1.5) or 320 kB (SDXL) per sample."""
    mirror: bool = False
    """Image features of the mirrored face too, so that training may mirror: doubles them."""
    base: str = "sd15"
    """Whose encoders: sd15, sdxl, tiny, tiny-sdxl, or a diffusers folder."""
    resolution: int = Field(512, ge=64, le=8192, multiple_of=8)
    """Side of a square picture before the VAE, pixels; other sizes have about its area. At most crop.size."""


class Settings(Section):
    """The settings of all stages."""

    metadata: MetadataSettings = MetadataSettings()
    download: DownloadSettings = DownloadSettings()
    filter: FilterSettings = FilterSettings()
    segment: SegmentSettings = SegmentSettings()
    crop: CropSettings = CropSettings()
    encode: EncodeSettings = EncodeSettings()
    caption: CaptionSettings = CaptionSettings()
    pack: PackSettings = PackSettings()
    models: ModelSettings = ModelSettings()

    @model_validator(mode="after")
    def _nothing_is_enlarged(self) -> "Settings":
        if self.encode.latents and self.encode.resolution > self.crop.size:
            raise ValueError(
                f"encode.resolution = {self.encode.resolution} would enlarge crops of crop.size = {self.crop.size}: "
                "raise crop.size, or lower encode.resolution"
            )
        return self

    @model_validator(mode="after")
    def _something_may_be_kept(self) -> "Settings":
        limits = self.filter
        if limits.min_brightness > limits.max_brightness:
            raise ValueError("filter.min_brightness is above filter.max_brightness: no face would be kept")
        if not self.segment.keep:
            raise ValueError("segment.keep is empty: no face would be kept")
        return self

    @model_validator(mode="after")
    def _an_endpoint_is_complete(self) -> "Settings":
        if "://" in self.models.captioner:
            url = urlsplit(self.models.captioner)
            if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
                raise ValueError(
                    "models.captioner must be http(s)://HOST[:PORT]/PATH and no more: name the environment variable of "
                    "a key in caption.api_key_env"
                )
            if not self.caption.model:
                raise ValueError("models.captioner is an endpoint: name its model in caption.model")
        return self
