"""Every setting of the trainer, and the published recipes as presets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.shared.configfile import explain, merge, read_values
from schemas.errors import ConfigError
from schemas.section import Section

Precision = Literal["auto", "no", "bf16", "fp16"]
ImageEncoder = Literal["clip-vit-h", "dinov2"]
Condition = Literal["segmented", "plain"]
ConditionChoice = Literal["auto", "segmented", "plain", "both"]


class CropWeights(Section):
    """How often each crop is the target, relative to the others; a crop that a sample lacks is made up for later.

    A sample that has none but crops of weight 0 is left out.
    """

    portrait: float = Field(1.0, ge=0)
    """Head and shoulders."""
    half: float = Field(1.0, ge=0)
    """Half body."""
    full: float = Field(1.0, ge=0)
    """The whole photo."""

    @model_validator(mode="after")
    def _takes_any(self) -> "CropWeights":
        if self.portrait == self.half == self.full == 0:
            raise ValueError("data.crops.portrait, .half and .full are all 0: nothing would be left")
        return self


class KindShares(Section):
    """Which share of the samples of each source kind an epoch takes; which ones is drawn anew for each."""

    web: float = Field(1.0, ge=0, le=1)
    """Photos of the web, or of one's own."""
    made: float = Field(1.0, ge=0, le=1)
    """Images that a model made (`made:` before a word of SHARDS)."""

    @model_validator(mode="after")
    def _takes_any(self) -> "KindShares":
        if self.web == self.made == 0:
            raise ValueError("data.kinds.web and data.kinds.made are both 0: nothing would be left")
        return self


class DataSettings(Section):
    """What is read from the shards, and in which order."""

    resolution: int = Field(512, ge=64, le=8192, multiple_of=8)
    """Side of a square target, pixels; other buckets have about the same area."""
    buckets: bool = True
    """Train `full` at its own aspect, in batches of one aspect; otherwise on random squares that hold the face."""
    crops: CropWeights = CropWeights()
    """Which crop is the target."""
    kinds: KindShares = KindShares()
    """How much of each source kind is read."""
    pairs: float = Field(0.0, ge=0, le=1)
    """Probability that the condition is of another photo of the person, never of the target itself; `faceid-portrait`
    takes one to five others. For datasets that `python -m pipeline group` made."""
    pair_features: Literal["both", "id", "image"] = "both"
    """What is of the other photo then: the ID vector, the image features, or both."""
    balance: Literal["photo", "person"] = "photo"
    """What is as likely as another: each photo, or each person, of whom an epoch takes one photo, another each time."""
    alternatives: float = Field(0.0, ge=0, le=1)
    """Probability that one of a sample's further captions (text_alternatives) stands in for the first."""
    allow_no_captions: bool = False
    """Train on shards of which no sample has a caption."""
    batch_size: int = Field(8, ge=1)
    """Samples per step and process. What an epoch leaves of a shape comes in smaller batches, which weigh as much."""
    workers: int = Field(2, ge=0)
    """Loader processes per training process; 0 reads in the training process."""
    shuffle: int = Field(256, ge=1)
    """Samples of the shuffle buffer (undecoded, up to 1 MB each); 1 keeps the order of the shards."""
    latents: Literal["auto", "shards", "images"] = "auto"
    """Where targets come from: precomputed latents in the shards, or images and the VAE. auto: shards."""
    text: Literal["auto", "shards", "captions"] = "auto"
    """Where text embeddings come from: precomputed, or captions through the text encoder."""
    verify: Literal["sha256", "size"] = "sha256"
    """Before step 0, check every tar against its manifest by hash, or (at once, also remote) by length."""
    allow_embedded: bool = False
    """Train a real base on shards of the `embedded` profile, whose features mean nothing."""


class AugmentSettings(Section):
    """Changes of the target. They are left out where the condition could not follow them."""

    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a mirrored target. CLIP and DINO variants need mirrored features in the shards for it."""
    colour: float = Field(0.0, ge=0, le=1)
    """Probability of a slight change of brightness, contrast and saturation; for variants that read the ID alone."""


class GuidanceSettings(Section):
    """Classifier-free dropout: one uniform draw per sample decides which condition is replaced by "none"."""

    p_uncond_image: float = Field(0.05, ge=0, le=1)
    """The face alone."""
    p_uncond_text: float = Field(0.05, ge=0, le=1)
    """The caption alone."""
    p_uncond_both: float = Field(0.05, ge=0, le=1)
    """Both."""

    @model_validator(mode="after")
    def _is_a_distribution(self) -> "GuidanceSettings":
        if self.p_uncond_image + self.p_uncond_text + self.p_uncond_both > 1:
            raise ValueError("guidance.p_uncond_image, _text and _both add up to more than 1")
        return self


class AdapterSettings(Section):
    """The adapter itself."""

    image_encoder: ImageEncoder = "clip-vit-h"
    """Whose features of the face the CLIP variants read."""
    condition: ConditionChoice = "auto"
    """Of which picture these are: the face `segmented` from its background, the `plain` crop, or `both`, where a draw
    decides for each sample. auto: what the shards hold."""
    lora_rank: int = Field(128, ge=1, le=8192)
    """Rank of the FaceID family's LoRA."""
    p_drop_clip: float = Field(0.5, ge=0, le=1)
    """faceid-plusv2: probability per sample that the CLIP branch is left out."""
    rescale_clip: bool = False
    """faceid-plusv2: divide the kept CLIP branch by 1 - p_drop_clip. Inference does not."""
    init_from: str = ""
    """A released adapter (.safetensors or .bin) to start from."""


class ObjectiveSettings(Section):
    """The loss."""

    noise_offset: float = Field(0.0, ge=0)
    """Standard deviation of noise that is constant over a channel."""
    min_snr_gamma: float = Field(0.0, ge=0)
    """Min-SNR weighting (arXiv 2303.09556; 5 there); 0 is off."""
    face_weight: float = Field(1.0, ge=1)
    """How many times as much as the rest of a target its face counts, the square that ArcFace sees; 1 is off."""
    id_loss: float = Field(0.0, ge=0)
    """Weight of 1 - cosine between the ID of the predicted clean image and the face's; 0 is off."""
    id_loss_max_t: float = Field(0.25, gt=0, le=1)
    """The ID loss is taken at timesteps below this share of the schedule, where the clean image can be predicted."""
    id_loss_weights: str = ""
    """facexlib's ArcFace weights (recognition_arcface_ir_se50.pth)."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(Section):
    """How weights move."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's."""
    eight_bit: bool = False
    """8-bit AdamW of bitsandbytes, which must be installed."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over time, after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps from zero to lr."""
    accumulate: int = Field(1, ge=1, le=2**31 - 1)
    """Batches per step."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the gradient to this norm; 0 is off."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Exponential moving average of the weights, which is exported then; 0 is off."""
    precision: Precision = "auto"
    """Of the frozen base and of computation; trained weights stay float32. auto: bf16 on a GPU, else no."""
    gradient_checkpointing: bool = False
    """Less memory, one more forward pass."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model (in channels_last), which takes some two minutes and makes it 1.3 times as fast. auto: on
    a GPU, for 200,000 samples a process or more, where targets have one shape (no `full` crops, or images and no
    data.buckets)."""
    channels_last: bool = False
    """Memory format of the UNet where it is not compiled; on an H200 slower than the plain one."""


class WatchSettings(Section):
    """What is written while it trains."""

    log_every: int = Field(10, ge=1)
    """Steps between metrics."""
    save_every: int = Field(2000, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(3, ge=1)
    """Checkpoints kept."""
    validate_every: int = Field(0, ge=0)
    """Steps between grids of validation images; 0 is never."""
    validate_faces: int = Field(4, ge=1)
    """Faces in the grid: the first of the dataset, in the order of the shards."""
    validate_prompts: tuple[str, ...] = Field(
        ("a photo of a person", "a watercolour portrait", "a person in a spacesuit"), min_length=1
    )
    """One column each."""
    validate_steps: int = Field(20, ge=1, le=1000)
    """Denoising steps, up to the 1,000 that bases are trained on."""
    guidance_scale: float = Field(5.0, ge=1)
    """Classifier-free guidance of the grid."""
    judge: str = ""
    """Folder of an insightface pack that measures ID similarity in the grid; better another than the condition's."""
    clip: str = ""
    """Folder of a whole CLIP (transformers' CLIPModel) that measures how images follow their prompts."""
    tensorboard: bool = True
    """Write TensorBoard logs to RUN/tensorboard."""
    hook: str = ""
    """A function, as `module:function`, that is called with each event, a dict: for W&B; see docs/watching.md."""


class TrainConfig(Section):
    """Everything that `--config FILE` and `--set a.b=c` can say."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Of initial weights, noise, order and augmentation."""
    steps: int = Field(200_000, ge=1)
    """Optimiser steps."""
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings()
    guidance: GuidanceSettings = GuidanceSettings()
    adapter: AdapterSettings = AdapterSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optim: OptimSettings = OptimSettings()
    watch: WatchSettings = WatchSettings()


FREE_TO_CHANGE = (
    *("steps", "watch"),
    *("data.verify", "data.allow_embedded", "data.allow_no_captions", "data.workers", "data.shuffle"),
    *("optim.accumulate", "optim.compile", "optim.channels_last", "optim.gradient_checkpointing"),
)
"""Config keys, and sections, that may differ when a run is resumed."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "steps": 20,
        "data": {"resolution": 64, "batch_size": 2, "workers": 0},
        "watch": {"log_every": 1, "save_every": 10, "validate_steps": 4},
    },
    "sd15": {"data": {"resolution": 512, "batch_size": 8}, "optim": {"lr": 1e-4}},
    "sdxl-512": {"data": {"resolution": 512, "batch_size": 8}, "optim": {"lr": 1e-4}},
    "sdxl-1024": {
        "data": {"resolution": 1024, "batch_size": 4},
        "optim": {"lr": 1e-5},
        "objective": {"noise_offset": 0.05},
    },
}
"""The published recipe per base; TOML and --set may override each of it. Batch sizes are per GPU, of 8."""


def load_train_config(
    path: Path | None, pairs: Sequence[str], preset: str | Mapping[str, Any], **options: Any
) -> TrainConfig:
    """Merge a preset, a TOML file, `--set` pairs and command-line options (None = not given), in this order.

    Instead of the name of a preset, the settings themselves may be given.

    Raises:
        ConfigError: for an unknown preset or key (names the nearest), or a value that is not allowed.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ConfigError(f"The preset {preset!r} is not known; choose one of: {', '.join(PRESETS)}.")
        preset = PRESETS[preset]
    values: dict[str, Any] = {}
    merge(values, preset)
    merge(values, read_values(path, pairs))
    merge(values, options)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, TrainConfig)) from error


def without_free_keys(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is resumed, of flat keys such as `optim.lr`."""
    free = tuple(f"{key}." for key in FREE_TO_CHANGE)
    return {key: value for key, value in identity.items() if not f"{key}.".startswith(free)}
