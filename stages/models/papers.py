"""The papers of all known weights: source, revision, sha256, licence, paper, preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from schemas.arcface import INSIGHTFACE_LICENCE, PACK_FILES


@dataclass(frozen=True)
class WeightFile:
    """One file of a weight."""

    name: str
    task: str
    """The task that it does; empty for a config that only goes with the weights."""
    bytes: int = 0
    """Length; 0 when not known."""
    sha256: str = ""
    """Hex; empty when no public source was found for it."""
    source: str = ""
    """Its URL, or its path in the weight's repository; empty when it comes in the weight's archive."""


@dataclass(frozen=True)
class Weight:
    """A known weight: its papers and its files."""

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


_CELEBAMASK = "code MIT; weights trained on CelebAMask-HQ: non-commercial research and education only"
_SCRFD = "SCRFD (arXiv 2105.04714), ArcFace (arXiv 1801.07698)"
_SCRFD_INPUT = (
    "detector: RGB letterboxed to det_size, (x - 127.5) / 128; recogniser: RGB 112 norm_crop, (x - 127.5) / 127.5"
)
_ZIPS = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_OPENCV_ZOO = "https://github.com/opencv/opencv_zoo/raw/47534e27c9851bb1128ccc0102f1145e27f23f98"
_EDIFFIQA = "8bdc41bb5e3db55a99aec2902412f3d930524892"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download"


def _insightface_pack(name: str, detector: WeightFile, recogniser: WeightFile, size: int, sha256: str) -> Weight:
    """A pack of insightface's release: only detection and recognition are taken out of its zip."""
    return Weight(
        name=name,
        files=(detector, recogniser),
        archive=WeightFile(f"{name}.zip", "", size, sha256, f"{_ZIPS}/{name}.zip"),
        licence=INSIGHTFACE_LICENCE,
        commercial=False,
        source="https://github.com/deepinsight/insightface/releases/tag/v0.7",
        revision="v0.7",
        paper=_SCRFD,
        preprocessing=_SCRFD_INPUT,
    )


_ALL = (
    _insightface_pack(
        "buffalo_l",
        WeightFile("det_10g.onnx", "detector", *PACK_FILES["det_10g"][:2]),
        WeightFile("w600k_r50.onnx", "face_embedder", *PACK_FILES["w600k_r50"][:2]),
        288_621_354,
        "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
    ),
    _insightface_pack(
        "buffalo_m",
        WeightFile("det_2.5g.onnx", "detector", *PACK_FILES["det_2.5g"][:2]),
        WeightFile("w600k_r50.onnx", "face_embedder", *PACK_FILES["w600k_r50"][:2]),
        275_951_529,
        "d98264bd8f2dc75cbc2ddce2a14e636e02bb857b3051c234b737bf3b614edca9",
    ),
    _insightface_pack(
        "buffalo_s",
        WeightFile("det_500m.onnx", "detector", *PACK_FILES["det_500m"][:2]),
        WeightFile("w600k_mbf.onnx", "face_embedder", *PACK_FILES["w600k_mbf"][:2]),
        127_607_557,
        "d85a87f503f691807cd8bb97128bdf7a0660326cd9cd02657127fa978bab8b5e",
    ),
    _insightface_pack(
        "buffalo_sc",
        WeightFile("det_500m.onnx", "detector", *PACK_FILES["det_500m"][:2]),
        WeightFile("w600k_mbf.onnx", "face_embedder", *PACK_FILES["w600k_mbf"][:2]),
        14_969_382,
        "57d31b56b6ffa911c8a73cfc1707c73cab76efe7f13b675a05223bf42de47c72",
    ),
    _insightface_pack(
        "antelopev2",
        WeightFile("scrfd_10g_bnkps.onnx", "detector", *PACK_FILES["det_10g"][:2]),
        WeightFile("glintr100.onnx", "face_embedder", *PACK_FILES["glintr100"][:2]),
        360_662_982,
        "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
    ),
    Weight(
        name="auraface",
        files=(
            WeightFile(
                "auraface_glintr100.onnx",
                "face_embedder",
                *PACK_FILES["auraface"][:2],
                "glintr100.onnx",
            ),
        ),
        licence="Apache-2.0",
        commercial=True,
        source="https://huggingface.co/fal/AuraFace-v1",
        repository="fal/AuraFace-v1",
        revision="af6d057c9b0ec4071d4c49c80e3539258798b609",
        paper="ArcFace (arXiv 1801.07698)",
        preprocessing="RGB 112 norm_crop, (x - 127.5) / 127.5",
    ),
    Weight(
        name="yunet",
        files=(
            WeightFile(
                "face_detection_yunet_2023mar.onnx",
                "detector",
                232_589,
                "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
                f"{_OPENCV_ZOO}/models/face_detection_yunet/face_detection_yunet_2023mar.onnx",
            ),
        ),
        licence="MIT",
        commercial=True,
        source="https://github.com/opencv/opencv_zoo/tree/main/models/face_detection_yunet",
        revision="47534e27c9851bb1128ccc0102f1145e27f23f98",
        paper="YuNet (doi 10.1007/s11633-023-1423-y)",
        preprocessing="BGR 0..255, long side at most det_size",
    ),
    Weight(
        name="bisenet",
        files=(
            WeightFile(
                "parsing_bisenet.pth",
                "segmenter",
                53_289_463,
                "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
                f"{_FACEXLIB}/v0.2.0/parsing_bisenet.pth",
            ),
        ),
        licence=_CELEBAMASK,
        commercial=False,
        source="https://github.com/xinntao/facexlib/releases/tag/v0.2.0",
        revision="v0.2.0",
        paper="BiSeNet (arXiv 1808.00897), CelebAMask-HQ (arXiv 1907.11922)",
        preprocessing="RGB 512, ImageNet mean and standard deviation",
    ),
    Weight(
        name="parsenet",
        files=(
            WeightFile(
                "parsing_parsenet.pth",
                "segmenter",
                85_331_193,
                "3d558d8d0e42c20224f13cf5a29c79eba2d59913419f945545d8cf7b72920de2",
                f"{_FACEXLIB}/v0.2.2/parsing_parsenet.pth",
            ),
        ),
        licence=_CELEBAMASK,
        commercial=False,
        source="https://github.com/xinntao/facexlib/releases/tag/v0.2.2",
        revision="v0.2.2",
        paper="PSFR-GAN (arXiv 2009.08709), CelebAMask-HQ (arXiv 1907.11922)",
        preprocessing="RGB 512, (x / 255 - 0.5) / 0.5",
    ),
    Weight(
        name="arcface-ir-se50",
        files=(
            WeightFile(
                "recognition_arcface_ir_se50.pth",
                "id_loss",
                175_367_323,
                "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
                f"{_FACEXLIB}/v0.1.0/recognition_arcface_ir_se50.pth",
            ),
        ),
        licence="code MIT; weights trained on MS-Celeb-1M: non-commercial research only",
        commercial=False,
        source="https://github.com/xinntao/facexlib/releases/tag/v0.1.0",
        revision="v0.1.0",
        paper="ArcFace (arXiv 1801.07698)",
        preprocessing="BGR 112 norm_crop, (x - 127.5) / 127.5",
    ),
    Weight(
        name="clip-vit-h",
        files=(
            WeightFile("config.json", "", source="models/image_encoder/config.json"),
            WeightFile(
                "model.safetensors",
                "image_embedder",
                2_528_373_448,
                "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
                "models/image_encoder/model.safetensors",
            ),
        ),
        licence="Apache-2.0 (h94/IP-Adapter; OpenCLIP ViT-H/14 laion2B: MIT)",
        commercial=True,
        source="https://huggingface.co/h94/IP-Adapter",
        repository="h94/IP-Adapter",
        revision="018e402774aeeddd60609b4ecdb7e298259dc729",
        paper="OpenCLIP scaling laws (arXiv 2212.07143), IP-Adapter (arXiv 2308.06721)",
        preprocessing="RGB 224, CLIP mean and standard deviation",
    ),
    Weight(
        name="clip-vit-h-text",
        files=(
            WeightFile("config.json", "", source="config.json"),
            WeightFile(
                "model.safetensors",
                "text",
                3_944_552_236,
                "036e6e2bd49697511f4f8b8cb5ee465f93025f7a69a145eadeb9a881ace9b18d",
                "model.safetensors",
            ),
            *(
                WeightFile(name, "", source=name)
                for name in (
                    *("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
                    "preprocessor_config.json",
                )
            ),
        ),
        licence="MIT",
        commercial=True,
        source="https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        repository="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        paper="OpenCLIP scaling laws (arXiv 2212.07143)",
        preprocessing="words, at most 77 tokens",
    ),
    Weight(
        name="ediffiqa-t",
        files=(
            WeightFile(
                "ediffiqa_tiny_jun2024.onnx",
                "fiqa",
                7_272_678,
                "9426c899cc0f01665240cb7d9e7f98e18e24e456c178326c771a43da289bfc6a",
                f"https://github.com/opencv/opencv_zoo/raw/{_EDIFFIQA}/models/"
                "face_image_quality_assessment_ediffiqa/ediffiqa_tiny_jun2024.onnx",
            ),
        ),
        licence="CC-BY-4.0 (opencv_zoo; trained on VGGFace2)",
        commercial=True,
        source="https://github.com/opencv/opencv_zoo/tree/main/models/face_image_quality_assessment_ediffiqa",
        revision=_EDIFFIQA,
        paper="eDifFIQA (IEEE T-BIOM 2024, ieeexplore document 10468647)",
        preprocessing="RGB 112 norm_crop, (x / 255 - 0.5) / 0.5",
    ),
    Weight(
        name="dinov2",
        files=(
            WeightFile(
                "config.json",
                "",
                549,
                "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0",
                "config.json",
            ),
            WeightFile(
                "model.safetensors",
                "image_embedder",
                1_217_522_888,
                "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
                "model.safetensors",
            ),
        ),
        licence="Apache-2.0",
        commercial=True,
        source="https://huggingface.co/facebook/dinov2-large",
        repository="facebook/dinov2-large",
        revision="47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        paper="DINOv2 (arXiv 2304.07193)",
        preprocessing="RGB 224, ImageNet mean and standard deviation",
    ),
)

WEIGHTS: dict[str, Weight] = {weight.name: weight for weight in _ALL}
"""Name -> papers, of all known weights."""
