"""The papers of all known weights: source, revision, sha256, licence, paper, preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from schemas.arcface import INSIGHTFACE_LICENCE, IR_SE50, IR_SE50_LICENCE, PACK_FILES


@dataclass(frozen=True)
class WeightFile:
    name: str
    task: str
    """The task that it does; empty for a config that only goes with the weights."""
    bytes: int = 0
    """Length; 0 when not known."""
    sha256: str = ""
    """Hex; empty when no public source gives it."""
    source: str = ""
    """Its URL, or its path in the weight's repository; empty when it comes in the weight's archive."""


@dataclass(frozen=True)
class Weight:
    name: str
    files: tuple[WeightFile, ...]
    licence: str
    commercial: bool
    """Whether the licence allows commercial use."""
    source: str
    """The page that publishes it."""
    revision: str
    paper: str
    preprocessing: str
    """What its input looks like."""
    repository: str = ""
    """On the Hugging Face hub, where the files come from there, at `revision`."""
    archive: WeightFile | None = None
    """The zip that holds the files."""
    made_of: Self | None = None
    """Other weights, of which `models fetch` makes the files: none of them is downloaded."""

    @property
    def downloads(self) -> tuple[WeightFile, ...]:
        """What is fetched, at `url`: the archive, the files of what it is made of, or the files themselves."""
        return (self.archive,) if self.archive else (self.made_of or self).files

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files under its own name, rather than a single file."""
        return self.archive is not None or len(self.files) > 1

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(file.task for file in self.files if file.task)

    def url(self, file: WeightFile) -> str:
        hub = f"https://huggingface.co/{self.repository}/resolve/{self.revision}/" if self.repository else ""
        return f"{hub}{file.source}"

    def under(self, root: Path) -> Path:
        """The path of the weight (a folder or a file) under a folder of weights."""
        return root / (self.name if self.is_folder else self.files[0].name)

    def paths(self, path: Path, task: str = "") -> dict[WeightFile, Path]:
        """Its files, or those that a task needs, when the weight lies at `path`."""
        needed = [file for file in self.files if not task or file.task in ("", task)]
        return {file: path / file.name if self.is_folder else path for file in needed}


_MODEL = "model.safetensors"
_WORDS = "vocab.json merges.txt tokenizer_config.json special_tokens_map.json preprocessor_config.json"
_CELEBAMASK = "code MIT; weights trained on CelebAMask-HQ: non-commercial research and education only"
_FILES: dict[str, tuple[int, str]] = {
    **{f"{name}.onnx": file for name, file in PACK_FILES.items()},
    "buffalo_l.zip": (288_621_354, "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f"),
    "buffalo_m.zip": (275_951_529, "d98264bd8f2dc75cbc2ddce2a14e636e02bb857b3051c234b737bf3b614edca9"),
    "buffalo_s.zip": (127_607_557, "d85a87f503f691807cd8bb97128bdf7a0660326cd9cd02657127fa978bab8b5e"),
    "buffalo_sc.zip": (14_969_382, "57d31b56b6ffa911c8a73cfc1707c73cab76efe7f13b675a05223bf42de47c72"),
    "antelopev2.zip": (360_662_982, "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5"),
    "face_detection_yunet_2023mar.onnx": (
        232_589,
        "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    ),
    "parsing_bisenet.pth": (53_289_463, "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567"),
    "parsing_parsenet.pth": (85_331_193, "3d558d8d0e42c20224f13cf5a29c79eba2d59913419f945545d8cf7b72920de2"),
    "recognition_arcface_ir_se50.pth": IR_SE50,
    "clip-vit-h": (2_528_373_448, "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030"),
    "clip-vit-h-text": (3_944_552_236, "036e6e2bd49697511f4f8b8cb5ee465f93025f7a69a145eadeb9a881ace9b18d"),
    "ediffiqa_tiny_jun2024.onnx": (7_272_678, "9426c899cc0f01665240cb7d9e7f98e18e24e456c178326c771a43da289bfc6a"),
    "dinov2": (1_217_522_888, "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"),
    "dinov2's config": (549, "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0"),
}
"""Bytes and sha256 of files by their names, or by those of their weights."""


def _pack(name: str, detector: str, recogniser: str) -> Weight:
    """A pack of insightface's release: only detection and recognition are taken out of its zip."""
    page, version = "https://github.com/deepinsight/insightface/releases", "v0.7"
    same = {"scrfd_10g_bnkps.onnx": "det_10g.onnx"}
    files = {detector: "detector", recogniser: "face_embedder"}
    return Weight(
        name,
        tuple(WeightFile(file, task, *_FILES[same.get(file, file)]) for file, task in files.items()),
        INSIGHTFACE_LICENCE,
        commercial=False,
        source=f"{page}/tag/{version}",
        revision=version,
        paper="SCRFD (arXiv 2105.04714), ArcFace (arXiv 1801.07698)",
        preprocessing="detector: RGB letterboxed to det_size, (x - 127.5) / 128; "
        "recogniser: RGB 112 norm_crop, (x - 127.5) / 127.5",
        archive=WeightFile(f"{name}.zip", "", *_FILES[f"{name}.zip"], f"{page}/download/{version}/{name}.zip"),
    )


def _facexlib(name: str, task: str, file: str, version: str, licence: str, paper: str, preprocessing: str) -> Weight:
    page = "https://github.com/xinntao/facexlib/releases"
    files = (WeightFile(file, task, *_FILES[file], f"{page}/download/{version}/{file}"),)
    return Weight(name, files, licence, False, f"{page}/tag/{version}", version, paper, preprocessing)


def _opencv_zoo(name: str, task: str, path: str, revision: str, licence: str, paper: str, preprocessing: str) -> Weight:
    zoo, (folder, file) = "https://github.com/opencv/opencv_zoo", path.rsplit("/", 1)
    files = (WeightFile(file, task, *_FILES[file], f"{zoo}/raw/{revision}/{path}"),)
    return Weight(name, files, licence, True, f"{zoo}/tree/main/{folder}", revision, paper, preprocessing)


def _hub(
    name: str,
    repository: str,
    revision: str,
    files: tuple[WeightFile, ...],
    licence: str,
    paper: str,
    preprocessing: str,
) -> Weight:
    page = f"https://huggingface.co/{repository}"
    return Weight(name, files, licence, True, page, revision, paper, preprocessing, repository)


_ALL = (
    _pack("buffalo_l", "det_10g.onnx", "w600k_r50.onnx"),
    _pack("buffalo_m", "det_2.5g.onnx", "w600k_r50.onnx"),
    _pack("buffalo_s", "det_500m.onnx", "w600k_mbf.onnx"),
    _pack("buffalo_sc", "det_500m.onnx", "w600k_mbf.onnx"),
    _pack("antelopev2", "scrfd_10g_bnkps.onnx", "glintr100.onnx"),
    _hub(
        "auraface",
        "fal/AuraFace-v1",
        "af6d057c9b0ec4071d4c49c80e3539258798b609",
        (WeightFile("auraface_glintr100.onnx", "face_embedder", *_FILES["auraface.onnx"], "glintr100.onnx"),),
        licence="Apache-2.0",
        paper="ArcFace (arXiv 1801.07698)",
        preprocessing="RGB 112 norm_crop, (x - 127.5) / 127.5",
    ),
    _opencv_zoo(
        "yunet",
        "detector",
        "models/face_detection_yunet/face_detection_yunet_2023mar.onnx",
        "47534e27c9851bb1128ccc0102f1145e27f23f98",
        licence="MIT",
        paper="YuNet (doi 10.1007/s11633-023-1423-y)",
        preprocessing="BGR 0..255, long side at most det_size",
    ),
    _facexlib(
        "bisenet",
        "segmenter",
        "parsing_bisenet.pth",
        "v0.2.0",
        licence=_CELEBAMASK,
        paper="BiSeNet (arXiv 1808.00897), CelebAMask-HQ (arXiv 1907.11922)",
        preprocessing="RGB 512, ImageNet mean and standard deviation",
    ),
    _facexlib(
        "parsenet",
        "segmenter",
        "parsing_parsenet.pth",
        "v0.2.2",
        licence=_CELEBAMASK,
        paper="PSFR-GAN (arXiv 2009.08709), CelebAMask-HQ (arXiv 1907.11922)",
        preprocessing="RGB 512, (x / 255 - 0.5) / 0.5",
    ),
    _facexlib(
        "arcface-ir-se50",
        "id_loss",
        "recognition_arcface_ir_se50.pth",
        "v0.1.0",
        licence=IR_SE50_LICENCE,
        paper="ArcFace (arXiv 1801.07698)",
        preprocessing="BGR 112 norm_crop, (x - 127.5) / 127.5",
    ),
    _hub(
        "clip-vit-h",
        "h94/IP-Adapter",
        "018e402774aeeddd60609b4ecdb7e298259dc729",
        (
            WeightFile("config.json", "", source="models/image_encoder/config.json"),
            WeightFile(_MODEL, "image_embedder", *_FILES["clip-vit-h"], f"models/image_encoder/{_MODEL}"),
        ),
        licence="Apache-2.0 (h94/IP-Adapter; OpenCLIP ViT-H/14 laion2B: MIT)",
        paper="OpenCLIP scaling laws (arXiv 2212.07143), IP-Adapter (arXiv 2308.06721)",
        preprocessing="RGB 224, CLIP mean and standard deviation",
    ),
    _hub(
        "clip-vit-h-text",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        (
            WeightFile("config.json", "", source="config.json"),
            WeightFile(_MODEL, "text", *_FILES["clip-vit-h-text"], _MODEL),
            *(WeightFile(name, "", source=name) for name in _WORDS.split()),
        ),
        licence="MIT",
        paper="OpenCLIP scaling laws (arXiv 2212.07143)",
        preprocessing="words, at most 77 tokens",
    ),
    _opencv_zoo(
        "ediffiqa-t",
        "fiqa",
        "models/face_image_quality_assessment_ediffiqa/ediffiqa_tiny_jun2024.onnx",
        "8bdc41bb5e3db55a99aec2902412f3d930524892",
        licence="CC-BY-4.0 (opencv_zoo; trained on VGGFace2)",
        paper="eDifFIQA (IEEE T-BIOM 2024, ieeexplore document 10468647)",
        preprocessing="RGB 112 norm_crop, (x / 255 - 0.5) / 0.5",
    ),
    _hub(
        "dinov2",
        "facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        (
            WeightFile("config.json", "", *_FILES["dinov2's config"], "config.json"),
            WeightFile(_MODEL, "image_embedder", *_FILES["dinov2"], _MODEL),
        ),
        licence="Apache-2.0",
        paper="DINOv2 (arXiv 2304.07193)",
        preprocessing="RGB 224, ImageNet mean and standard deviation",
    ),
)

WEIGHTS: dict[str, Weight] = {weight.name: weight for weight in _ALL}
"""Name -> papers, of all known weights."""
