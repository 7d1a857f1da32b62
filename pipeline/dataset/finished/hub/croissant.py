"""Croissant 1.1 with the fields of responsible AI: what a dataset is, for programs."""

import json
from typing import Any

from pipeline.dataset.finished.hub.about import About
from pipeline.dataset.source.laion import OLD_LAION
from schemas.columns import COLUMNS
from schemas.errors import CorruptShardError
from schemas.shard import PLAIN, SUFFIXES

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileObject"),
            *("fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
            *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
            *("separator", "source", "subField", "transform"),
        )
    },
    **{name: {"@id": f"cr:{name}", "@type": "@json"} for name in ("data", "examples")},
    **{name: {"@container": "@language"} for name in ("description", "name")},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
BIASES = (
    "Who is photographed, captioned in the list's language and still online is not a sample of mankind. Detector, "
    "quality and size thresholds drop faces unevenly by skin tone, age, pose and covering; nothing here was labelled "
    "or checked by people. Captions are those of the source."
)
_FORMATS = {"jpg": "image/jpeg", "json": "application/json", "png": "image/png", "txt": "text/plain"}
CONTENTS = {suffix: COLUMNS[column].doc for suffix, column in SUFFIXES.items()}
CONTENTS |= {plain: CONTENTS[native] for native, plain in PLAIN.items()}


def croissant(about: About, base: str = "") -> str:
    """The text of croissant.json; `base` is the URL, with a slash at its end, under which the dataset is published.

    Raises:
        CorruptShardError: names a manifest without its tar.
    """
    kept = [one for one in about.manifests if one.kept]
    if lacking := [one.shard for one in kept if f"{one.shard}.tar" not in one.files]:
        raise CorruptShardError(f"{lacking[0]}.json: it names no tar")
    files = [
        {
            "@type": "cr:FileObject",
            "@id": f"{one.shard}.tar",
            "name": f"{one.shard}.tar",
            "contentUrl": f"{base}shards/{one.shard}.tar",
            "contentSize": f"{one.files[f'{one.shard}.tar']['bytes']} B",
            "encodingFormat": "application/x-tar",
            "sha256": one.files[f"{one.shard}.tar"]["sha256"],
        }
        for one in kept
    ]
    names = [one["name"] for one in about.features if one["name"].rpartition(".")[2] in _FORMATS]
    sets = [
        {
            "@type": "cr:FileSet",
            "@id": f"{name}-files",
            "name": f"{name}-files",
            "containedIn": [{"@id": file["@id"]} for file in files],
            "encodingFormat": _FORMATS[name.rpartition(".")[2]],
            "includes": f"*[0-9].{name}",  # a key ends with digits: the suffix begins at its first dot
        }
        for name in names
    ]
    records = []
    for name in names:  # key and content; the json is one field: mlcroissant does not look into those of an archive
        source = {"fileSet": {"@id": f"{name}-files"}}
        key = {**source, "extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([^.]+)"}}
        content = {**source, "extract": {"fileProperty": "content"}}
        type = "sc:ImageObject" if _FORMATS[name.rpartition(".")[2]].startswith("image/") else "sc:Text"
        described = (
            {"name": "key", "dataType": "sc:Text", "source": key},
            {"name": "content", "description": CONTENTS[name], "dataType": type, "source": content},
        )
        fields = [{"@type": "cr:Field", "@id": f"{name}/{one['name']}", **one} for one in described]
        records.append({"@type": "cr:RecordSet", "@id": name, "name": name, "field": fields})
    first, last = (date.date().isoformat() for date in about.made)
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": about.name,
        "description": f"{about.funnel.kept:,} photos with exactly one face, their captions if any, crops, masks.",
        "license": "No licence is given: the images are under the terms of their owners. README.md tells more.",
        "url": base or "README.md",
        "creator": {"@type": "sc:Organization", "name": "Whoever published this dataset"},
        "citeAs": f"{about.name}, made with faceshards, dataset {about.dataset.get('dataset_digest', '')[:16]}",
        "datePublished": last,
        "version": "1.0.0",
        "isLiveDataset": False,
        **_responsible(about, first, last),
        "distribution": [*files, *sets],
        "recordSet": records,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _responsible(about: About, first: str, last: str) -> dict[str, Any]:
    """What the vocabulary of responsible AI has words for."""
    models = "; ".join(f"{one['task']}: {one['name']} ({one['licence']})" for one in about.models)
    dropped = ", ".join(f"{reason} {n:,}" for reason, n in about.funnel.dropped.items())
    values = {
        "dataCollection": f"Rows of {', '.join(about.sources)}, whose images were fetched from their URLs or files.",
        "dataCollectionType": ["Web Scraping", "Secondary Data Analysis"],
        "dataCollectionMissingData": f"Rows that were dropped, by reason: {dropped or 'none'}.",
        "dataCollectionRawData": "Images as their sites serve them; json holds the sha256 of each file as fetched.",
        "dataCollectionTimeframe": [first, last],
        "dataImputationProtocol": "Nothing is imputed: a crop that a photo cannot give is absent.",
        "dataPreprocessingProtocol": [
            "Photos are turned by their EXIF, filtered by size and to exactly one face, cropped without upsampling, "
            "and their face is aligned to ArcFace's template. README.md lists the thresholds."
        ],
        "dataAnnotationProtocol": ["Boxes, points, masks and embeddings are those of models; people labelled nothing."],
        "machineAnnotationTools": [models],
        "annotationsPerItem": "1",
        "dataUseCases": ["Training: adapters that condition text-to-image models on a face, in research."],
        "dataLimitations": [
            "Not for identifying people, surveillance, decisions about people, or pictures of those who did not agree.",
            *([OLD_LAION] if about.is_old_laion else []),
        ],
        "dataBiases": [BIASES],
        "dataSocialImpact": "Pictures that keep a person's likeness can be made without consent: keep access closed.",
        "personalSensitiveInformation": [
            "Photos of people's faces, and captions that may name them.",
            *(["Face embeddings: biometric data that identify a person."] if about.is_biometric else []),
        ],
        "dataReleaseMaintenancePlan": "Take-downs: `python -m pipeline forget`, then `push`, which rewrites history.",
    }
    return {f"rai:{name}": value for name, value in values.items()}
