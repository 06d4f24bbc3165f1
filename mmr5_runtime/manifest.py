"""The contents of ``mmr5_engine.json``: what an engine folder says about itself.

Version 3, as written by ``mmr5-export``; every key is required::

    schema_version   3
    created_by       {tool: version}
    source           {name, revision or null, files: {name: sha256}} of the checkpoint
    architecture     ModelSpec as JSON
    quant            {name, method, formats: {format name: fields of Format},
                      layers: {linear: format name}, recipe: object or null,
                      calibration: object or null}; a linear that is not listed is dense
    template         {name, sha256} of the prompt template
    pixel_budget     {min_pixels, max_pixels}
    image            {mean: [3], std: [3], patch_size, merge_size, temporal_patch_size}
    files            {name: {sha256, size in bytes}} of every other file in the folder, but not of
                     engines that TensorRT-LLM builds there; a name may be a path below it, with
                     "/" between its parts
    tensors          {stored tensor: safetensors file}
    backends         {backend: {files: [names], verified: text, ... facts of its own}} of what was
                     added for other engines than the native one
    report           object: what was measured at export; sqnr_db in it is {linear: decibels, or
                      null when nothing was lost}

Version 2 lacks ``backends`` and is read as one without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.types import EngineError

SCHEMA_VERSION = 3
_READ = (2, 3)
# For people; what an engine computes does not depend on them, and they tell of every backend.
_DESCRIPTIONS = ("README.md", "report.json")
# Of the checkpoint, beside its tensors: what the native engine reads, and readers of the folder.
_CHECKPOINT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder: hexadecimal sha256 and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        _require_whole(size=self.size)


@dataclass(frozen=True)
class Source:
    """The checkpoint an engine was made from; ``files`` maps file name to sha256."""

    name: str
    revision: str | None
    files: Mapping[str, str]


@dataclass(frozen=True)
class Quant:
    """How linears are stored, and how that came about.

    ``name`` is what was asked for (bf16, int4, ...), ``method`` how codes were chosen (none, rtn,
    gptq, ...); ``layers`` maps linears that are not dense to their format. ``recipe`` and
    ``calibration`` are for people and tools: anything that JSON can hold.
    """

    name: str
    method: str
    layers: Mapping[str, Format]
    recipe: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """With every format spelled out once, under its name."""
        formats = {format.name: format.to_json() for format in self.layers.values()}
        return {
            "name": self.name,
            "method": self.method,
            "formats": dict(sorted(formats.items())),
            "layers": {linear: format.name for linear, format in self.layers.items()},
            "recipe": self.recipe,
            "calibration": self.calibration,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quant:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        rest = {key: value for key, value in data.items() if key not in ("formats", "layers")}
        formats = {name: Format.from_json(fields) for name, fields in data["formats"].items()}
        for name, format in formats.items():
            if format.name != name:
                raise ValueError(f"the format {name} has the fields of {format.name}")
        if unknown := sorted(set(data["layers"].values()) - set(formats)):
            raise ValueError(f"the format {unknown[0]} is used but not described")
        layers = {linear: formats[name] for linear, name in data["layers"].items()}
        for key in ("recipe", "calibration"):
            if not isinstance(data[key], dict | None):
                raise ValueError(f"{key} is {data[key]!r} and not an object")
        _strings({"name": data["name"], "method": data["method"]})
        return cls(layers=layers, **rest)


@dataclass(frozen=True)
class TemplateRef:
    """The prompt template the engine was exported for."""

    name: str
    sha256: str


@dataclass(frozen=True)
class PixelRange:
    """Least and most pixels of a resized page, as the checkpoint's image processor has them."""

    min_pixels: int
    max_pixels: int

    def __post_init__(self) -> None:
        _require_whole(min_pixels=self.min_pixels, max_pixels=self.max_pixels)


@dataclass(frozen=True)
class ImageSettings:
    """What turns a page into patches; the field names are keyword arguments of ``preprocess``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: int
    merge_size: int
    temporal_patch_size: int


@dataclass(frozen=True)
class Backend:
    """What was added to an engine folder so that another engine can run the same model.

    ``files`` are names among those of the manifest, ``verified`` says exactly what was run of them,
    ``facts`` is anything else that JSON can hold, by key.
    """

    files: tuple[str, ...]
    verified: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Facts and all in one object; :meth:`from_json` reads it back."""
        return {"files": list(self.files), "verified": self.verified, **self.facts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Backend:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        facts = dict(data.items())
        files, verified = facts.pop("files"), facts.pop("verified")
        if not isinstance(files, list) or not isinstance(verified, str):
            raise ValueError("a backend has no list of files, or does not say what was verified")
        if not all(isinstance(name, str) for name in files):
            raise ValueError("the name of a file is not text")
        return cls(tuple(files), verified, facts)


@dataclass(frozen=True)
class Manifest:
    """One engine folder; see the module's text for the keys."""

    created_by: Mapping[str, str]
    source: Source
    spec: ModelSpec
    quant: Quant
    template: TemplateRef
    pixel_budget: PixelRange
    image: ImageSettings
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, str]
    report: Mapping[str, Any]
    backends: Mapping[str, Backend] = field(default_factory=dict)

    @property
    def native_files(self) -> dict[str, FileEntry]:
        """The files that the native engine runs on: not those of a backend, nor the report."""
        added = {name for backend in self.backends.values() for name in backend.files}
        return {
            name: entry
            for name, entry in self.files.items()
            if name not in added and name not in _DESCRIPTIONS
        }

    @property
    def formats(self) -> Mapping[str, Format]:
        """Storage format by linear, for those that are not dense."""
        return self.quant.layers

    @property
    def quant_name(self) -> str:
        """What was asked for: bf16, int8, int4, ..."""
        return self.quant.name

    @property
    def template_sha256(self) -> str:
        """Hash of the prompt template."""
        return self.template.sha256

    @property
    def image_settings(self) -> dict[str, Any]:
        """Keyword arguments of ``image.preprocess``."""
        return {**asdict(self.image), "mean": self.image.mean, "std": self.image.std}

    @property
    def num_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The document as ``json`` writes it; :meth:`from_json` reads it back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "created_by": dict(self.created_by),
            "source": asdict(self.source),
            "architecture": self.spec.to_json(),
            "quant": self.quant.to_json(),
            "template": asdict(self.template),
            "pixel_budget": asdict(self.pixel_budget),
            "image": asdict(self.image),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "tensors": dict(self.tensors),
            "backends": {name: backend.to_json() for name, backend in self.backends.items()},
            "report": dict(self.report),
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Manifest:
        """Reads a parsed document; ``where`` names it in errors.

        Raises :class:`EngineError` for an older, newer or unknown schema, and for a missing,
        unknown or mistyped key.
        """
        _check_schema(data, where)
        try:
            image = data["image"]
            manifest = cls(
                created_by=_strings(data["created_by"]),
                source=Source(**data["source"]),
                spec=ModelSpec.from_json(data["architecture"]),
                quant=Quant.from_json(data["quant"]),
                template=TemplateRef(**data["template"]),
                pixel_budget=PixelRange(**data["pixel_budget"]),
                image=ImageSettings(
                    **{**image, "mean": _three(image, "mean"), "std": _three(image, "std")}
                ),
                files={name: FileEntry(**entry) for name, entry in data["files"].items()},
                tensors=_strings(data["tensors"]),
                report=dict(data["report"].items()),
                backends=_backends(data),
            )
            _check_names(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise EngineError(
                f"{where} cannot be read ({reason}); export the engine again."
            ) from error
        return manifest


def _check_schema(data: Any, where: str) -> None:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, bool):  # which equals 0 or 1
        version = str(version)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise EngineError(
            f"{where} has schema version {version}, made by a newer mmr5-runtime than this one, "
            f"which reads up to {SCHEMA_VERSION}; upgrade mmr5-runtime or export the engine again."
        )
    if version == 1:
        raise EngineError(
            f"{where} was made by an older mmr5-runtime; export the engine again with this version."
        )
    if version not in _READ:
        raise EngineError(
            f"{where} has the unknown schema version {version!r}; export the engine again."
        )


def is_inside(name: str) -> bool:
    """Whether a file's name is a plain relative path that stays in the folder on every system.

    Its parts are separated by "/"; there is no backslash, colon, empty, ``.`` or ``..`` part.
    """
    parts = name.split("/")
    if any(character in name for character in ("\\", ":", "\0")):
        return False
    return all(part not in ("", ".", "..") for part in parts)


def _backends(data: Mapping[str, Any]) -> dict[str, Backend]:
    if data["schema_version"] == 2:
        return {}
    return {name: Backend.from_json(entry) for name, entry in data["backends"].items()}


def _check_names(manifest: Manifest) -> None:
    """Raises ``ValueError`` for a file outside the folder, and for a backend's that is not there.

    The native engine must not read a file of a backend: it has to stay what it is without it.
    """
    for name in manifest.files:
        if not is_inside(name):
            raise ValueError(f"it lists the file {name!r} outside its folder")
    for backend, added in manifest.backends.items():
        if unlisted := sorted(set(added.files) - set(manifest.files)):
            raise ValueError(f"the backend {backend} lacks its file {unlisted[0]!r}")
        if shared := sorted(set(added.files) & set(manifest.tensors.values())):
            raise ValueError(f"{shared[0]!r} of the backend {backend} holds tensors of the engine")
        if shared := sorted(set(added.files) & set(_CHECKPOINT)):
            raise ValueError(f"{shared[0]!r} of the backend {backend} is the engine's own")


def _require_whole(**fields: object) -> None:
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is {value!r} and not a whole number")


def _strings(value: Mapping[str, str]) -> dict[str, str]:
    found = dict(value.items())
    if not all(isinstance(item, str) for item in found.values()):
        raise ValueError("a name is not text")
    return found


def _three(image: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    red, green, blue = image[key]
    return float(red), float(green), float(blue)
