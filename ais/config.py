"""The configuration of every job: typed, frozen models, read from YAML and ``key=value`` overrides.

The first half is what can be configured, one model per job; the second half is how it is read. Nothing but
the file and the command line sets a value: no environment variable is looked at. Whatever is wrong is told in
one :class:`~ais.errors.ConfigError` that lists every problem found, each with its dotted key, the value and
where it came from.
"""

import difflib
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, NoReturn, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ais.errors import (
    AisError,
    BackboneError,
    ConfigError,
    DatasetError,
    HeadError,
    LeaseLostError,
    LockedError,
    RatingsError,
    TerminatedInterrupt,
)
from ais.secrets import redact, refuse_secrets

# Pillow warns of a decompression bomb above this (PIL.Image.MAX_IMAGE_PIXELS): 256 MiB of 24-bit pixels.
PILLOW_MAX_PIXELS = 89_478_485

Text = Annotated[str, Field(min_length=1)]
Address = Annotated[str, Field(min_length=1), AfterValidator(refuse_secrets)]
# YAML has lists, and strictness would ask for a tuple.
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
Addresses = Annotated[tuple[Address, ...], Field(strict=False)]
Numbers = Annotated[tuple[float, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what the generators of Python, NumPy and torch all take
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Conflict(NamedTuple):
    """Values that are each possible and together are not; ``keys[0]`` is the key to change."""

    keys: tuple[str, ...]
    reason: str


class _ConflictError(ValueError):
    def __init__(self, conflicts: list[_Conflict]) -> None:
        super().__init__("; ".join(f"{conflict.keys[0]}: {conflict.reason}" for conflict in conflicts))
        self.conflicts = conflicts


class _Section(BaseModel):
    # Strict: true is no integer and "3" no number; an integer where a number is wanted is fine.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    EXAMPLE: ClassVar[tuple[str, ...]] = ()  # overrides beside the required keys, in the example of --help

    def _conflicts(self) -> Iterator[_Conflict]:
        """Yield each rule over several keys of this section that the values break."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := list(self._conflicts()):
            raise _ConflictError(conflicts)
        return self


_STORAGE_OPTION = re.compile(r"(?P<scheme>[a-z][a-z0-9+-]*)\.(?P<option>[a-z][a-z0-9_]*)=(?P<value>.+)", re.DOTALL)
_SECRET_OPTION = re.compile(r"key|secret|token|passw|credential|sas|auth|connection_string|headers")


class StorageConfig(_Section):
    """How object stores are reached."""

    endpoint_url: Annotated[str, Field(pattern="^https?://"), AfterValidator(refuse_secrets)] | None = Field(
        default=None, description="Address of an S3-compatible server; null: AWS, or what AWS_ENDPOINT_URL says."
    )
    profile: Text | None = Field(default=None, description="Named profile of the AWS credentials file.")
    anonymous: bool = Field(default=False, description="Read public buckets without credentials.")
    requester_pays: bool = Field(default=False, description="Accept the transfer costs of requester-pays buckets.")
    max_connections: Count = Field(default=64, description="Connections per process to the object store.")
    options: Texts = Field(
        default=(),
        description="For filesystems other than S3, each scheme.option=value as fsspec names it; no secrets.",
        examples=["[gs.project=photos,abfs.account_name=photos]"],
    )

    def _conflicts(self) -> Iterator[_Conflict]:
        if self.anonymous and self.profile is not None:
            yield _Conflict(
                ("profile", "anonymous"),
                f"{_show(self.profile)} has no effect with storage.anonymous=true; set one of the two",
            )
        for option in self.options:
            match = _STORAGE_OPTION.fullmatch(option)
            if match is None:
                name = option.partition("=")[0]  # a value may be a secret
                yield _Conflict(("options",), f"expected scheme.option=value, such as gs.project=photos, got {name!r}")
            elif match["scheme"] in ("s3", "s3a"):
                yield _Conflict(("options",), f"{match['option']!r} is for S3, which has keys of its own in storage")
            elif _SECRET_OPTION.search(match["option"]):
                yield _Conflict(
                    ("options",),
                    f"{match['option']!r} is a secret; it comes from the environment, as the filesystem's own"
                    " documentation says, never from a configuration",
                )


def _weights_conflicts(weights: str, seed: int | None, sha256: str | None) -> Iterator[_Conflict]:
    if weights == "random" and seed is None:
        yield _Conflict(("seed", "weights"), "required with backbone.weights=random, for example backbone.seed=0")
    if weights != "random" and seed is not None:
        yield _Conflict(
            ("seed", "weights"),
            f"{seed} goes only with backbone.weights=random, got {_show(weights)}; set backbone.seed=null",
        )
    if weights == "random" and sha256 is not None:
        yield _Conflict(
            ("sha256", "weights"),
            "random weights come from no file and have no digest; set backbone.sha256=null",
        )


class BackboneConfig(_Section):
    """The frozen network that sees the images."""

    name: Text = Field(
        description="Name in the registry: vgg16, vgg19, resnet152, densenet161, barlow_twins,"
        " efficientnet_b3 or inception_v3 (scores only).",
        examples=["resnet152"],
    )
    layer: Text | None = Field(
        default=None,
        description="Layer whose feature maps are explained; null: the backbone's default layer.",
    )
    weights: Address = Field(
        default="published",
        description='"published" (or "imagenet"): the published weights, digest checked; "random": drawn from'
        " backbone.seed; otherwise the address of a .pth or .safetensors file.",
    )
    seed: Seed | None = Field(
        default=None, description="Seed of random weights; required with them, refused otherwise."
    )
    sha256: Sha256 | None = Field(default=None, description="Expected SHA-256 digest of the weights file.")

    def _conflicts(self) -> Iterator[_Conflict]:
        return _weights_conflicts(self.weights, self.seed, self.sha256)


class BackboneOverrides(_Section):
    """The backbone, where it is not to be loaded as the head was trained (null: as trained)."""

    name: Text | None = Field(
        default=None,
        description="Name in the registry: vgg16, vgg19, resnet152, densenet161, barlow_twins or efficientnet_b3.",
    )
    layer: Text | None = Field(default=None, description="Layer whose feature maps are explained.")
    weights: Address | None = Field(
        default=None,
        description='"published" (or "imagenet"), "random", or the address of a .pth or .safetensors file.',
    )
    seed: Seed | None = Field(default=None, description="Seed of random weights; required with weights=random.")
    sha256: Sha256 | None = Field(default=None, description="Expected SHA-256 digest of the weights file.")

    def _conflicts(self) -> Iterator[_Conflict]:
        if self.weights is not None:
            yield from _weights_conflicts(self.weights, self.seed, self.sha256)


_MODE = "Fit an image into the square input by cutting its ends (center_crop) or by padding (letterbox)"


class PreprocessingConfig(_Section):
    """How an image becomes the backbone's input."""

    mode: Literal["center_crop", "letterbox"] = Field(default="center_crop", description=f"{_MODE}.")


class PreprocessingOverrides(_Section):
    """How an image becomes the backbone's input (null: as the head was trained)."""

    mode: Literal["center_crop", "letterbox"] | None = Field(default=None, description=f"{_MODE}.")


class LimitsConfig(_Section):
    """What a single image may cost; a larger one becomes a row in errors."""

    max_bytes: Count = Field(default=64 * 2**20, description="Largest file, in bytes (default 64 MiB).")
    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_MAX_PIXELS)] = Field(
        default=PILLOW_MAX_PIXELS,
        description="Largest width times height; the bound is the one above which Pillow warns.",
    )
    max_metadata_bytes: Count = Field(
        default=16 * 2**20,
        description="Colour profile, EXIF, XMP and texts together, uncompressed, in bytes (default 16 MiB).",
    )
    seconds: Annotated[float, Field(gt=0)] = Field(
        default=30.0,
        description="Processor time that one image may take to decode, in seconds; ten times that by the clock.",
    )
    scaled_jpeg: bool = Field(
        default=False,
        description="Decode large JPEGs at a half, quarter or eighth of their size, which is faster; scores change a"
        " little (README, Speed).",
    )


@dataclass(frozen=True)
class PoolSize:
    """How many actors a stage has, as ``compute.scoring_actors`` says: ``least`` to ``most``."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "PoolSize":
        """Read ``N`` (N ≥ 1) or ``MIN..MAX`` (1 ≤ MIN ≤ MAX).

        Raises:
            ValueError: ``text`` is none of these.
        """
        if match := re.fullmatch(r"([1-9][0-9]{0,5})(?:\.\.([1-9][0-9]{0,5}))?", text):
            size = cls(int(match[1]), int(match[2] or match[1]))
            if size.least <= size.most:
                return size
        raise ValueError(
            f"expected a whole number >= 1, or MIN..MAX (whole numbers, 1 <= MIN <= MAX), got {_show(text)}"
        )


def _pool_text(value: object) -> object:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        PoolSize.parse(text)
    return text


PoolText = Annotated[str, BeforeValidator(_pool_text)]


class ComputeConfig(_Section):
    """Where and how the work is done."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: a GPU where the actor finds one, otherwise the CPU."
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of the trunk; tail, head and differences are float32 always."
    )
    compile: bool = Field(
        default=False,
        description="Compile the trunk with torch.compile: the first batches wait for it, all others are faster on a"
        " GPU.",
    )
    batch_size: Count | None = Field(
        default=None, description="Images per forward pass; null: chosen by backbone and device."
    )
    chunk: Count | None = Field(
        default=None,
        description="Feature maps ablated per pass where the tail has to be run; null: chosen by memory.",
    )
    scoring_actors: PoolText | None = Field(
        default=None,
        description="Actors that hold backbone and head: a number, or MIN..MAX to grow with the work; null: as the"
        " cluster allows.",
    )
    scoring_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs that each of them reserves; 0.5 lets two share one. null: 1 on GPUs, otherwise 0. With"
        " device=cpu it is a reservation only, to try out a cluster without its GPUs.",
    )
    fetch_actors: PoolText | None = Field(
        default=None,
        description="Actors that fetch and decode: a number, or MIN..MAX; null: as the cluster allows.",
    )
    fetch_threads: Count = Field(default=16, description="Images that one fetch actor reads at the same time.")
    decoders: Count = Field(
        default=2, description="Processes in which one fetch actor decodes; each holds one image at a time."
    )
    max_cpus: Count | None = Field(
        default=None,
        description="Logical CPUs that the cluster's workers can grow to; null: as its head says (label"
        " ais.max-cpus), otherwise those that are up.",
    )
    max_gpus: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs that the cluster can grow to; null: as its head says (label ais.max-gpus), otherwise those"
        " that are up.",
    )
    stall_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=60.0,
        description="End with exit code 1 when no image was finished for so long, waiting for nodes included; the same"
        " command continues. null: wait for ever.",
    )

    def _conflicts(self) -> Iterator[_Conflict]:
        gpus = self.scoring_gpus
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            yield _Conflict(("scoring_gpus",), f"{gpus:g}: above 1, Ray gives whole GPUs only; give 1 or 2")
        if gpus == 0 and self.device == "cuda":
            yield _Conflict(
                ("scoring_gpus", "device"), "with compute.device=cuda an actor that reserves no GPU would see none"
            )


@dataclass(frozen=True)
class PngSelection:
    """The images that get a picture, as ``png.select`` says.

    ``count`` is the N of ``top:N`` and ``bottom:N``, ``share`` the F of ``sample:F``; otherwise None.
    """

    kind: Literal["all", "none", "top", "bottom", "sample"]
    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "PngSelection":
        """Read ``all``, ``none``, ``top:N``, ``bottom:N`` (N ≥ 1) or ``sample:F`` (0 < F ≤ 1).

        Raises:
            ValueError: ``text`` is none of these.
        """
        if text == "all":
            return cls("all")
        if text == "none":
            return cls("none")
        if match := re.fullmatch("(top|bottom):([1-9][0-9]{0,17})", text):
            return cls("top" if match[1] == "top" else "bottom", count=int(match[2]))
        if match := re.fullmatch(r"sample:([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)", text):
            share = float(match[1])
            if 0 < share <= 1:
                return cls("sample", share=share)
        raise ValueError(
            "expected all, none, top:N or bottom:N (N a whole number >= 1), or sample:F (0 < F <= 1),"
            f" got {_show(text)}"
        )


class PngConfig(_Section):
    """The pictures."""

    select: str = Field(
        default="all",
        description="Images that get a picture: all, none, top:N or bottom:N (by score), sample:F (a share of them).",
    )
    kind: Literal["overlay", "heatmap", "both"] = Field(
        default="overlay", description="The heatmap on the image, alone, or both side by side."
    )
    max_side: Annotated[int, Field(ge=16, le=8192)] = Field(
        default=512, description="Longest side of a picture, in pixels; larger images are scaled down."
    )

    @field_validator("select")
    @classmethod
    def _check_select(cls, value: str) -> str:
        PngSelection.parse(value)
        return value

    @property
    def selection(self) -> PngSelection:
        """``select``, parsed."""
        return PngSelection.parse(self.select)


class _RatingsColumns(_Section):
    image_column: Text = Field(default="image", description="Column of image addresses, absolute or relative to root.")
    score_column: Text = Field(default="score", description="Column of ratings.")
    split_column: Text = Field(
        default="split", description="Column of train, validation or test; used if the table has it."
    )
    root: Address | None = Field(
        default=None, description="Where relative image addresses start; null: the folder of the table."
    )
    allow_outside_root: bool = Field(default=False, description="Accept image addresses that lead out of root.")
    duplicates: Literal["error", "mean"] = Field(
        default="error", description="Images rated more than once: refused, or their ratings averaged."
    )
    missing: Literal["error", "skip"] = Field(
        default="error", description="Rows without a finite score: refused, or skipped and counted."
    )

    def _conflicts(self) -> Iterator[_Conflict]:
        columns = {
            "image_column": self.image_column,
            "score_column": self.score_column,
            "split_column": self.split_column,
        }
        for key, column in columns.items():
            same = [other for other, value in columns.items() if value == column]
            if same[0] != key:
                yield _Conflict((key, same[0]), f"{_show(column)} is ratings.{same[0]} already")


class RatingsConfig(_RatingsColumns):
    """The rated images."""

    path: Address = Field(description="Address of the table of ratings, CSV or Parquet.", examples=["ratings.csv"])


class ValidatedRatingsConfig(_RatingsColumns):
    """The rated images, for objective=ratings."""

    path: Address | None = Field(default=None, description="Address of the table of ratings, CSV or Parquet.")

    def table(self) -> RatingsConfig:
        """The same, with a table."""
        assert self.path is not None
        return RatingsConfig(**self.model_dump())


class HeadConfig(_Section):
    """The head: Linear, ReLU, dropout, Linear."""

    hidden: Count = Field(default=512, description="Hidden units.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of hidden units dropped in training."
    )


class FitConfig(_Section):
    """Fitting the head."""

    epochs: Count = Field(default=300, description="Passes over the training split, at most.")
    patience: Count = Field(
        default=30, description="Epochs without a better validation error after which fitting stops."
    )
    batch_size: Count = Field(default=64, description="Images per optimiser step, over all workers.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="Of Adam.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=1e-4, description="Of Adam.")
    validation_share: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        default=0.15,
        description="Share of the images for early stopping, where the table marks none for it; of those outside the"
        " test split, where it has one.",
    )
    test_share: Annotated[float, Field(gt=0, lt=0.9)] = Field(
        default=0.2, description="Share of the images that only the final metrics see, where it has none."
    )
    variants: Count = Field(
        default=1,
        description="Heads trained, each with its own seed and train/validation split; together they predict"
        " mean and standard deviation.",
    )
    seed: Seed = Field(default=0, description="Seed of splits, initial weights and order.")
    workers: Count | None = Field(default=None, description="Training workers; null: one per GPU, or one on CPU.")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=3, description="Lost workers after which training gives up."
    )
    checkpoint_every: Count = Field(default=25, description="Epochs between two checkpoints.")

    def _conflicts(self) -> Iterator[_Conflict]:
        if self.validation_share + self.test_share >= 0.9:
            yield _Conflict(
                ("validation_share", "test_share"),
                f"{self.validation_share:g} and fit.test_share={self.test_share:g} leave too little to train"
                " on; their sum has to be below 0.9",
            )


class PlantedConfig(_Section):
    """Images with known truth."""

    count: Annotated[int, Field(ge=50)] = Field(default=300, description="Number of images.")
    size: Annotated[int, Field(ge=64)] = Field(default=256, description="Shorter side of an image, in pixels.")
    seed: Seed = Field(default=0, description="Seed of the images and ratings.")
    second_share: Share = Field(default=0.3, description="Share of images with a second object that lowers the rating.")


_MAX_ERROR_SHARE = "Share of images that may fail before the job as a whole fails; what is good is kept."


class HeatmapsConfig(_Section):
    """Scores and heatmaps of a collection."""

    images: Address = Field(
        description="Folder (walked through), glob, or CSV or Parquet list with a uri column; any fsspec address.",
        examples=["photos"],
    )
    output: Address = Field(description="Where the run folder goes: OUTPUT/runs/RUN_ID.", examples=["out"])
    run_id: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = Field(
        default=None,
        description="Name of the run; the same name continues it. null: derived from the configuration.",
    )
    head: Address = Field(description="Address of the head bundle.", examples=["heads/first"])
    importance: Address | None = Field(
        default=None,
        description="Address of an AIS, one value per feature map; null: the prediction AIS of each image.",
    )
    weighting: Literal["positive", "signed"] = Field(
        default="positive", description="Weights of the feature maps: max(AIS, 0), or AIS with its sign."
    )
    backbone: BackboneOverrides = BackboneOverrides()
    preprocessing: PreprocessingOverrides = PreprocessingOverrides()
    limits: LimitsConfig = LimitsConfig()
    png: PngConfig = PngConfig()
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()
    max_error_share: Share = Field(default=0.05, description=_MAX_ERROR_SHARE)
    shard_rows: Count = Field(default=512, description="Images per output shard.")
    verify: bool = Field(
        default=False,
        description="Only read the run back, every byte, and say whether it is whole (exit code 0) or not.",
    )
    repair: bool = Field(
        default=False, description="Verify the run, delete what is damaged, and do the images of that again."
    )
    retry_errors: bool = Field(
        default=False,
        description="Try images again that could not be fetched, or for which there was not enough memory.",
    )

    def _conflicts(self) -> Iterator[_Conflict]:
        for key in ("repair", "retry_errors"):
            if self.verify and getattr(self, key):
                yield _Conflict((key, "verify"), "verify=true changes nothing; set one of the two")


class DriftConfig(_Section):
    """Limits beyond which a run of scheduled scoring ends with exit code 4, "look at me" (null: none)."""

    max_psi: Annotated[float, Field(gt=0)] | None = Field(
        default=0.25,
        description="Population stability index of the new images, and of the collection, against the one before.",
    )
    max_ks: Share | None = Field(
        default=None, description="Kolmogorov-Smirnov distance, likewise; 0.1 is a tenth of the images elsewhere."
    )
    max_error_share: Share | None = Field(
        default=0.2, description="Share of the new and changed images that could not be used."
    )
    max_gone_share: Share | None = Field(
        default=0.2, description="Share of the collection's images that are not listed any more."
    )
    min_images: Count = Field(default=100, description="Of fewer images than this nothing is judged.")


class ScoreConfig(_Section):
    """Scores of a whole collection, kept up to date."""

    images: Address = Field(
        description="Folder (walked through), glob, or CSV or Parquet list with a uri column; any fsspec address."
        " A list should have the columns etag, or size and mtime, or changed images go unnoticed.",
        examples=["photos"],
    )
    output: Address = Field(
        description="Of this collection: OUTPUT/latest.parquet, and the history in OUTPUT/series.",
        examples=["scores"],
    )
    tick: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = Field(
        default=None,
        description="Name of this run, such as a scheduler's date; the same name continues it, and a complete one does"
        " nothing. null: continue the run that was interrupted, or else start one named by the time in UTC.",
    )
    head: Address = Field(description="Address of the head bundle.", examples=["heads/first"])
    heatmaps: bool = Field(default=False, description="Also write heatmaps and pictures, as jobs/heatmaps.py does.")
    retry_errors: bool = Field(
        default=True,
        description="Try images again that could not be fetched; what could not be decoded waits for a new version.",
    )
    keep: Annotated[str, Field(pattern="^[1-9][0-9]{0,4}[hdw]$")] | None = Field(
        default=None,
        description="Age, such as 30d, 12h or 8w, beyond which history is deleted that the latest scores do not need;"
        " null: keep everything.",
    )
    drift: DriftConfig = DriftConfig()
    importance: Address | None = Field(
        default=None,
        description="With heatmaps=true: address of an AIS; null: the prediction AIS of each image.",
    )
    weighting: Literal["positive", "signed"] = Field(
        default="positive", description="With heatmaps=true: weights of the feature maps."
    )
    backbone: BackboneOverrides = BackboneOverrides()
    preprocessing: PreprocessingOverrides = PreprocessingOverrides()
    limits: LimitsConfig = LimitsConfig()
    png: PngConfig = PngConfig()
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()
    max_error_share: Share = Field(
        default=0.05,
        description="Share of the collection's images that may have failed before the job as a whole fails and leaves"
        " OUTPUT/latest.parquet as it was; what is good is kept.",
    )
    shard_rows: Count = Field(default=4096, description="Images per output shard.")

    def _conflicts(self) -> Iterator[_Conflict]:
        if self.heatmaps:
            return
        default = type(self).model_fields
        values = {key: (getattr(self, key), default[key].default) for key in ("importance", "weighting")}
        for key in PngConfig.model_fields:
            values[f"png.{key}"] = (getattr(self.png, key), getattr(default["png"].default, key))
        for key, (value, unset) in values.items():
            if value != unset:
                yield _Conflict((key, "heatmaps"), f"{_show(value)} has no use with heatmaps=false")

    def as_heatmaps(self) -> HeatmapsConfig:
        """The same as a configuration of the main job, for what both have in common."""
        shared = HeatmapsConfig.model_fields.keys() & type(self).model_fields.keys()
        return HeatmapsConfig.model_construct(**{key: getattr(self, key) for key in shared}, run_id=self.tick)


class TrainConfig(_Section):
    """A head, fitted to ratings."""

    ratings: RatingsConfig
    output: Address = Field(description="Where the head bundle goes.", examples=["heads/first"])
    cache: Address | None = Field(
        default=None, description="Where embeddings are cached; null: the folder embeddings beside output."
    )
    backbone: BackboneConfig
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    limits: LimitsConfig = LimitsConfig()
    head: HeadConfig = HeadConfig()
    fit: FitConfig = FitConfig()
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()
    max_error_share: Share = Field(default=0.05, description=_MAX_ERROR_SHARE)


class CompareConfig(_Section):
    """Agreement between the heatmaps of several runs."""

    runs: Addresses = Field(
        min_length=2,
        description="Folders of complete runs over the same images, OUTPUT/runs/RUN_ID; every two are compared.",
        examples=["[out/runs/first,out/runs/second]"],
    )
    names: Texts | None = Field(default=None, description="What to call the runs, in their order; null: run ids.")
    output: Address = Field(description="Folder for tables and pictures.", examples=["agreement"])
    # The window of structural similarity is 11 cells wide.
    resolution: Annotated[int, Field(ge=16, le=512)] = Field(
        default=32,
        description="Cells along each side of the common grid, which covers what both runs looked at of an image.",
    )
    top_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of the cells that count as highest in top_overlap."
    )
    storage: StorageConfig = StorageConfig()

    def _conflicts(self) -> Iterator[_Conflict]:
        if repeated := _repeated(self.runs):
            yield _Conflict(("runs",), f"{_show(repeated)} is given twice; name each run once")
        if self.names is None:
            return
        if len(self.names) != len(self.runs):
            yield _Conflict(("names", "runs"), f"{len(self.names)} given for {len(self.runs)} runs; give one for each")
        if repeated := _repeated(self.names):
            yield _Conflict(("names",), f"{_show(repeated)} is given twice; give each run its own")


def _repeated(values: Sequence[str]) -> str | None:
    return next((value for index, value in enumerate(values) if value in values[:index]), None)


class ConvertConfig(_Section):
    """A published data set, made into a table of ratings or a similarity matrix."""

    dataset: Literal["ava", "koniq10k", "aigciqa2023", "peterson"] = Field(
        description="Which one: ratings of AVA, KonIQ-10k or AIGCIQA2023, or similarities of Peterson et al. (2018).",
        examples=["koniq10k"],
    )
    source: Text = Field(
        description="Folder of the data set as it was unpacked, or its file of ratings or similarities.",
        examples=["koniq10k"],
    )
    output: Address = Field(
        description="Where the table of ratings goes, .csv or .parquet; for peterson the matrix, .npz or .csv.",
        examples=["ratings.csv"],
    )
    images: Address | None = Field(
        default=None,
        description="Folder of the images; for peterson also a list in the order of the matrix. null: where the data"
        " set keeps them below source.",
    )
    aspect: Literal["quality", "authenticity", "correspondence"] | None = Field(
        default=None, description="For aigciqa2023: what was rated; null: quality."
    )
    order: Literal["name", "number"] | None = Field(
        default=None,
        description="For peterson: order of the images in the matrix, by name as text or by the number in it; null:"
        " refused where the two differ.",
    )
    missing: Literal["error", "skip"] = Field(
        default="error", description="Rated images that are not there: refused, or left out and counted."
    )
    storage: StorageConfig = StorageConfig()

    def _conflicts(self) -> Iterator[_Conflict]:
        for key, dataset in (("aspect", "aigciqa2023"), ("order", "peterson")):
            if getattr(self, key) is not None and self.dataset != dataset:
                yield _Conflict((key, "dataset"), f"{_show(getattr(self, key))} goes only with dataset={dataset}")
        suffixes = (".npz", ".csv") if self.dataset == "peterson" else (".csv", ".parquet")
        if not self.output.endswith(suffixes):
            yield _Conflict(
                ("output", "dataset"),
                f"{_show(self.output)} has to end with {' or '.join(suffixes)}, which says the format",
            )


class ImportanceConfig(_Section):
    """The AIS of every feature map over a set of images."""

    EXAMPLE = ("ratings=ratings.csv", "head=heads/first")
    objective: Literal["prediction", "error", "similarity"] = Field(
        description="prediction: effect on the score; error: effect on the error against ratings; similarity: effect on"
        " the agreement with a human similarity matrix.",
        examples=["error"],
    )
    output: Address = Field(description="Where the bundle goes.", examples=["importance/first"])
    images: Address | None = Field(
        default=None,
        description="For prediction: a folder, glob or list. For similarity: a list, in the order of the matrix.",
    )
    ratings: Address | None = Field(default=None, description="For error: table of ratings, CSV or Parquet.")
    matrix: Address | None = Field(
        default=None,
        description="For similarity: square matrix, larger is more alike; .npy, .npz or .csv. A .csv with the images as"
        " header and an .npz with an array images say the order themselves.",
    )
    level: Literal["collective", "individual"] = Field(
        default="collective",
        description="For similarity: one map ablated in all images at once, or in one image at a time (averaged).",
    )
    head: Address | None = Field(default=None, description="Head bundle; for prediction and error.")
    held_out: bool = Field(
        default=True,
        description="For error: use only those rated images that are in the head's test split; false: all, for ratings"
        " of images that the head was not trained on.",
    )
    backbone: BackboneOverrides = BackboneOverrides()
    preprocessing: PreprocessingOverrides = PreprocessingOverrides()
    limits: LimitsConfig = LimitsConfig()
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()
    max_error_share: Share = Field(default=0.05, description=_MAX_ERROR_SHARE)

    def _conflicts(self) -> Iterator[_Conflict]:
        wanted = {
            "prediction": ("images", "head"),
            "error": ("ratings", "head"),
            "similarity": ("matrix",),
        }[self.objective]
        for key in ("images", "ratings", "matrix", "head"):
            value = getattr(self, key)
            if key in wanted and value is None:
                yield _Conflict((key, "objective"), f"required with objective={self.objective}")
            optional = self.objective == "similarity" and key in ("images", "head")
            if key not in wanted and not optional and value is not None:
                yield _Conflict((key, "objective"), f"{_show(value)} has no use with objective={self.objective}")
        if self.objective != "error" and not self.held_out:
            yield _Conflict(("held_out", "objective"), f"false has no use with objective={self.objective}")
        if self.objective == "similarity" and self.head is None and self.backbone.name is None:
            yield _Conflict(
                ("backbone.name", "objective"), "required with objective=similarity, unless a head is given"
            )


class ValidateConfig(_Section):
    """Whether the heatmaps of a head are true."""

    EXAMPLE = ("ratings.path=ratings.csv", "head=heads/first")
    objective: Literal["ratings", "similarity"] = Field(
        default="ratings",
        description="ratings: a head and its heatmaps, on rated images; similarity: the maps of a backbone, on images"
        " that people compared.",
    )
    ratings: ValidatedRatingsConfig = ValidatedRatingsConfig()
    head: Address | None = Field(
        default=None, description="Address of the head bundle. For similarity it only says which backbone."
    )
    matrix: Address | None = Field(
        default=None,
        description="For similarity: square matrix, larger is more alike; .npy, .npz or .csv, as for"
        " jobs/importance.py.",
    )
    images: Address | None = Field(
        default=None,
        description="For similarity: a list in the order of the matrix, unless the matrix names its images.",
    )
    output: Address = Field(description="Folder for figures, pictures and the verdict.", examples=["validation/first"])
    held_out: bool = Field(
        default=True,
        description="Use only those rated images that are in the head's test split; false: all, for ratings of images"
        " that the head was not trained on. The table that it was fitted to is refused.",
    )
    masks: Address | None = Field(
        default=None,
        description="Folder with a mask for each image, under the same file name, which no two images may share: white"
        " inside what matters.",
    )
    weighting: Literal["positive", "signed"] = Field(
        default="positive", description="Weights of the feature maps: max(AIS, 0), or AIS with its sign."
    )
    protocol: bool = Field(default=True, description="Run the paper's protocol; false leaves it out.")
    protocol_counts: Count | None = Field(
        default=None,
        description="Numbers of maps at which its curves are measured, evenly spaced; null: 256 for ratings, all for"
        " similarity, and 16 where what follows the layer mixes the maps and has to be run for each of them.",
    )
    folds: Annotated[int, Field(ge=2)] = Field(default=5, description="Folds of the protocol.")
    seeds: Count = Field(default=8, description="Times that the images are dealt into folds.")
    protocol_images: Annotated[int, Field(ge=6)] = Field(
        default=300, description="Rated images used, at most; more are drawn from by chance."
    )
    images_limit: Annotated[int, Field(ge=2)] = Field(
        default=64,
        description="Of these, images whose heatmaps are tested by deletion and insertion, at most. Fewer than 8 show"
        " nothing.",
    )
    steps: Annotated[int, Field(ge=2)] = Field(
        default=16,
        description="Steps of a deletion or insertion curve; each image costs about 10 forward passes a step and fill.",
    )
    fill: Literal["both", "blurred", "mean"] = Field(
        default="both",
        description="What deleted parts show: the image blurred, its mean colour, or each in turn.",
    )
    seed: Seed = Field(default=0, description="Seed of everything that is drawn by chance.")
    backbone: BackboneOverrides = BackboneOverrides()
    preprocessing: PreprocessingOverrides = PreprocessingOverrides()
    limits: LimitsConfig = LimitsConfig()
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()
    max_error_share: Share = Field(default=0.05, description=_MAX_ERROR_SHARE)

    def _conflicts(self) -> Iterator[_Conflict]:
        similarity = self.objective == "similarity"
        if similarity and self.matrix is None:
            yield _Conflict(("matrix", "objective"), "required with objective=similarity")
        if similarity and self.head is None and self.backbone.name is None:
            yield _Conflict(
                ("backbone.name", "objective"), "required with objective=similarity, unless a head is given"
            )
        if similarity and not self.protocol:
            yield _Conflict(("protocol", "objective"), "false leaves nothing to do with objective=similarity")
        for key, value in (("ratings.path", self.ratings.path), ("head", self.head)):
            if not similarity and value is None:
                yield _Conflict((key, "objective"), "required with objective=ratings")
        useless = (
            (("ratings.path", self.ratings.path), ("masks", self.masks))
            if similarity
            else (("matrix", self.matrix), ("images", self.images))
        )
        for key, value in useless:
            if value is not None:
                yield _Conflict((key, "objective"), f"{_show(value)} has no use with objective={self.objective}")


class GalleryConfig(_Section):
    """The images that are shown, and how large. A run of fewer images than all these together is shown whole."""

    top: Several = Field(default=24, description="Images with the highest scores.")
    bottom: Several = Field(default=24, description="Images with the lowest scores.")
    quantiles: Several = Field(default=21, description="Images at evenly spaced ranks, from the lowest to the highest.")
    sample: Several = Field(default=30, description="Images drawn by chance, the same every time.")
    near: Numbers = Field(default=(), description="Scores to show images near to, for example [4.5,5.5].")
    near_count: Count = Field(default=12, description="Images shown near each of them.")
    errors: Several = Field(default=8, description="Images listed for each reason why images could not be used.")
    max_side: Annotated[int, Field(ge=64, le=1024)] = Field(
        default=320, description="Longest side of a thumbnail and of its heatmap, in pixels."
    )
    page_bytes: Annotated[int, Field(ge=100_000)] = Field(
        default=8_000_000,
        description="What opening one page may cost, pictures included; the gallery has as many pages as it takes.",
    )


class ReportConfig(_Section):
    """A run as pages to look at."""

    run: Address = Field(description="Run folder of jobs/heatmaps.py, OUTPUT/runs/RUN_ID.", examples=["out/runs/first"])
    output: Address = Field(description="Folder for the pages; open its index.html.", examples=["report"])
    title: Text | None = Field(default=None, description="Heading of the pages; null: the run's name.")
    head: Address | None = Field(
        default=None, description="Head bundle; null: the one that the run was made with, where it can be read."
    )
    importance: Addresses = Field(
        default=(), description="Bundles of jobs/importance.py; the run's own is added where it can be read."
    )
    validation: Address | None = Field(default=None, description="Output of jobs/validate.py for this head.")
    comparison: Address | None = Field(default=None, description="Output of jobs/compare.py.")
    gallery: GalleryConfig = GalleryConfig()
    limits: LimitsConfig = LimitsConfig()
    storage: StorageConfig = StorageConfig()


class DemoConfig(_Section):
    """The demo: planted images, a head fitted to them, the heatmaps job, and how well it points."""

    EXAMPLE = ("output=demo",)
    output: Address = Field(default="demo", description="Folder for everything that the demo writes.")
    planted: PlantedConfig = PlantedConfig()
    backbone: BackboneConfig = BackboneConfig(name="barlow_twins", weights="random", seed=0)
    head: HeadConfig = HeadConfig()
    fit: FitConfig = FitConfig()
    png: PngConfig = PngConfig()
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()


class ValidateDemoConfig(_Section):
    """The demo of the validation: planted images, several backbones, heads fitted to true and to shuffled ratings."""

    EXAMPLE = ("output=demo/validation",)
    output: Address = Field(default="demo/validation", description="Folder for everything that the demo writes.")
    planted: PlantedConfig = PlantedConfig(count=240)
    backbones: Texts = Field(
        default=("barlow_twins", "efficientnet_b3", "densenet161"),
        min_length=2,
        description="Names in the registry; their weights are random, so that nothing is downloaded.",
    )
    backbone_seed: Seed = Field(default=0, description="Seed of their weights.")
    head: HeadConfig = HeadConfig()
    fit: FitConfig = FitConfig(variants=3, weight_decay=1.0)
    weighting: Literal["positive", "signed"] = Field(default="signed", description="Weights of the feature maps.")
    images_limit: Annotated[int, Field(ge=2)] = Field(
        default=10, description="Images whose heatmaps are tested by deletion and insertion; fewer than 8 show nothing."
    )
    steps: Annotated[int, Field(ge=2)] = Field(default=5, description="Steps of a deletion or insertion curve.")
    storage: StorageConfig = StorageConfig()
    compute: ComputeConfig = ComputeConfig()


ConfigT = TypeVar("ConfigT", bound=_Section)


@dataclass(frozen=True)
class Loaded(Generic[ConfigT]):
    """What a command line asked for."""

    config: ConfigT
    dry_run: bool


def load_config(model: type[ConfigT], argv: Sequence[str], *, doc: str) -> Loaded[ConfigT]:
    """Read a job's command line: ``[--config FILE] [--dry-run] [key=value ...]`` or ``--help``.

    Overrides beat the file, a later override beats an earlier one. ``--help`` prints an example, ``doc`` and the
    keys of ``model`` on one screen, ``--help NAME`` everything about a key or a section, ``--help-all`` all of it.

    Raises:
        ConfigError: anything is wrong with the flags, the file or a value; all problems are listed.
        SystemExit: with code 0, after ``--help``.
    """
    if (text := _help_wanted(model, argv, doc)) is not None:
        print(text)
        raise SystemExit(0)
    arguments = _read_arguments(argv)
    text, source = ("", "") if arguments.file is None else (_read_text(arguments.file), arguments.file)
    config = parse_config(model, text, arguments.overrides, source=source)
    _refuse_lost_outputs(config)
    return Loaded(config, arguments.dry_run)


def _help_wanted(model: type[_Section], argv: Sequence[str], doc: str) -> str | None:
    """What to print if the command line asks for help, whatever else is on it."""
    if "--help-all" in argv:
        return _help_all(model)
    for index, argument in enumerate(argv):
        name = argument.partition("=")[2]
        if argument in ("--help", "-h"):
            following = argv[index + 1] if index + 1 < len(argv) else "-"
            name = "" if following.startswith("-") or "=" in following else following
        elif not argument.startswith("--help="):
            continue
        return _help_about(model, name) if name else _help(model, doc)
    return None


# Where Ray unpacks the working directory of a submitted job, on every node anew.
_UNPACKED = "/runtime_resources/working_dir_files/"


def _refuse_lost_outputs(config: BaseModel) -> None:
    """Refuse what a submitted job would write into its unpacked copy of the working directory, which is deleted."""
    if _UNPACKED not in os.getcwd():
        return
    lost = [
        f"{key}: {_show(value)} is relative, and this job runs in a copy of the submitted folder that is deleted after"
        " it; give the full path of a folder that all nodes share, or a remote address"
        for key in ("output", "cache")
        if (value := getattr(config, key, None)) and "://" not in value and not os.path.isabs(os.path.expanduser(value))
    ]
    if lost:
        raise _config_error(lost)


def parse_config(
    model: type[ConfigT], text: str, overrides: Sequence[str] = (), *, source: str = "configuration"
) -> ConfigT:
    """Read a configuration from YAML ``text`` and ``key=value`` overrides.

    Scalars are those of the YAML 1.2 core schema, in decimal and without leading zeros: ``1e-3`` is a number,
    ``007``, ``1:30``, ``yes`` and ``2026-11-23`` are text (https://yaml.org/spec/1.2.2/#103-core-schema). An
    override of a key that holds text is taken as it stands, except ``null``. A section with nothing under it
    keeps its defaults.

    Args:
        source: what messages call ``text``, such as its path.

    Raises:
        ConfigError: listing every unknown, repeated or missing key and every impossible value.
    """
    keys = _keys(model)
    settings, problems = _read_yaml(text, source)
    for override in overrides:
        try:
            key, setting = _read_override(override, keys)
        except ConfigError as error:
            problems.append(str(error))
        else:
            settings[key] = setting

    sections = _sections(keys)
    for key, setting in settings.items():
        if key in keys:
            continue
        if key in sections:
            if setting.value not in (None, {}):
                problems.append(
                    f"{key}: a section, got {_show(setting.value)}; its keys are {_names(key, keys)} ({setting.origin})"
                )
        else:
            problems.append(f"{key}: unknown key; {_suggest_key(key, keys)} ({setting.origin})")
    try:
        config = model.model_validate(_values(keys, settings))
    except ValidationError as error:
        problems += dict.fromkeys(_describe(error, keys, settings))  # a list may have several items of one problem
    if problems:
        raise _config_error(problems)
    return config


def _values(keys: Mapping[str, "_Key"], settings: Mapping[str, "_Setting"]) -> dict[str, Any]:
    """The nested values that the settings and, where there is none, the defaults give."""
    values: dict[str, Any] = {section: {} for section in _sections(keys)}
    for name, key in keys.items():
        section, _, leaf = name.rpartition(".")
        target = values[section] if section else values
        if name in settings:
            target[leaf] = settings[name].value
        elif not key.is_required:
            target[leaf] = key.default
    return values


def to_yaml(config: BaseModel) -> str:
    """The whole configuration as YAML; :func:`parse_config` makes an equal one of it."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def config_fingerprint(config: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256, 64 hex digits, of a configuration (or what it dumps to) as JSON with sorted keys."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# Errors that the same command would meet again.
_IN_VAIN = (ConfigError, BackboneError, HeadError, RatingsError, DatasetError)


def run_job(main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main`` on the command line and exit with its code.

    An :class:`~ais.errors.AisError` is printed without traceback. The codes of every job:

    ===  ====================================================================================================
      0  all is done, or was before
      1  work did not end well; what is good is kept, and the same command continues
      2  the configuration is wrong, or something that it names cannot be used: the same command would fail again
      3  somebody else writes the same output (`LockedError`, `LeaseLostError`); try again when they are done
    130  Ctrl-C, as shells do
    143  told to end (SIGTERM), as shells do
    ===  ====================================================================================================
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows how far a job is, not only that it ended
    told: list[int] = []

    def terminate(number: int, frame: object) -> NoReturn:  # noqa: ARG001 - the signature of a signal's handler
        told.append(number)
        raise TerminatedInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = main(sys.argv[1:])
    except AisError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        code = 2 if isinstance(error, _IN_VAIN) else 3 if isinstance(error, LockedError | LeaseLostError) else 1
    except KeyboardInterrupt as interrupt:
        told_to = bool(told) or isinstance(interrupt, TerminatedInterrupt)  # of which Ray makes a plain one
        print("told to end" if told_to else "interrupted", file=sys.stderr)
        code = 128 + signal.SIGTERM if told_to else 130
    sys.exit(code)


class _Arguments(NamedTuple):
    file: str | None
    overrides: list[str]
    dry_run: bool


def _read_arguments(argv: Sequence[str]) -> _Arguments:
    files: list[str] = []
    overrides: list[str] = []
    problems: list[str] = []
    dry_run = False
    rest = iter(argv)
    for argument in rest:
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument.startswith("-"):
            hint = f"; write {argument.lstrip('-')}" if "=" in argument else ""
            flags = "the flags are --config FILE, --dry-run, --help [NAME] and --help-all"
            problems.append(f"{argument}: unknown flag{hint}; {flags} (command line)")
        else:
            overrides.append(argument)
    if "" in files:
        problems.append("--config: expected the path of a YAML file after it, got nothing (command line)")
    if len(files) > 1:
        problems.append(f"--config: expected one file, got {', '.join(map(_show, files))} (command line)")
    if problems:
        raise _config_error(problems)
    return _Arguments(files[0] if files else None, overrides, dry_run)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise _config_error([f"--config: cannot read {_show(path)}: {error.strerror}"]) from error
    except ValueError as error:  # UnicodeDecodeError, or a path with a null character
        raise _config_error([f"--config: cannot read {_show(path)} as UTF-8 text: {error}"]) from error


# Python refuses to read a number of thousands of digits (ValueError), and brackets nested as deep.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are null, booleans and decimal numbers as in YAML 1.2, otherwise text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # An alias can make a value contain itself, and a tag can ask for any type: no job needs them.
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="aliases (*) and tags (!) are not allowed; put text that starts so in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that a YAML 1.1 reader or :class:`_Loader` would take for something else."""


_Loader.yaml_implicit_resolvers = {}  # forget those of YAML 1.1
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


class _Setting(NamedTuple):
    value: Any
    origin: str  # "configs/train.yaml:12" or "command line"


def _read_yaml(text: str, source: str) -> tuple[dict[str, _Setting], list[str]]:
    """The settings by dotted key, and what is wrong with the keys; a syntax error is raised at once."""
    settings: dict[str, _Setting] = {}
    problems: list[str] = []
    origins: dict[str, str] = {}

    def collect(mapping: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in mapping.value:
            origin = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{prefix or source}: a key has to be a word ({origin})")
                continue
            key = prefix + key_node.value
            if key in origins:
                problems.append(f"{key}: given twice, first at {origins[key]} ({origin})")
                continue
            origins[key] = origin
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                collect(value_node, f"{key}.")
            else:
                settings[key] = _Setting(loader.construct_object(value_node, deep=True), origin)

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            collect(root, "")
        elif root is not None:
            found = _show(loader.construct_object(root, deep=True))
            raise _config_error([f"{source}: expected a mapping of keys to values, got {found}"])
    except _YAML_ERRORS as error:
        raise _config_error([_yaml_problem(error, source)]) from error
    return settings, problems


def _yaml_problem(error: Exception, source: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{source}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    return f"{source}: not valid YAML: {' '.join(str(error).split())}"


def _read_override(override: str, keys: Mapping[str, "_Key"]) -> tuple[str, _Setting]:
    name, equals, raw = override.partition("=")
    if not name or not equals:
        raise ConfigError(f"{override}: expected key=value (command line)")
    if not raw:
        # A shell variable that is not set must not pass for null.
        raise ConfigError(f"{name}: no value after =; write {name}=null to leave it unset (command line)")
    key = keys.get(name)
    if key is None or (key.is_text and raw != "null"):
        return name, _Setting(raw, "command line")
    try:
        return name, _Setting(_Loader(raw).get_single_data(), "command line")
    except _YAML_ERRORS as error:
        raise ConfigError(f"{name}: expected {key.expected}, got {_show(raw)} (command line)") from error


class _Key(NamedTuple):
    """One key of a model, as messages and ``--help`` present it."""

    expected: str  # "whole number >= 1 or null"
    choices: list[str]
    is_text: bool
    is_required: bool
    default: Any
    example: str
    description: str


def _keys(model: type[BaseModel]) -> dict[str, _Key]:
    """Every key of ``model`` by its dotted name, those of sections after the others."""
    schema = model.model_json_schema()
    keys: dict[str, _Key] = {}
    sections: dict[str, _Key] = {}
    for name, entry in schema["properties"].items():
        if "$ref" not in entry:
            keys[name] = _key(entry, name in schema.get("required", ()), entry.get("default"))
            continue
        section = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        for leaf, leaf_entry in section["properties"].items():
            if "default" in entry:
                required, default = False, entry["default"][leaf]
            else:
                required, default = leaf in section.get("required", ()), leaf_entry.get("default")
            sections[f"{name}.{leaf}"] = _key(leaf_entry, required, default)
    return keys | sections


_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "array": "list [text, ...]",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _key(entry: dict[str, Any], required: bool, default: object) -> _Key:
    constraints = entry["anyOf"][0] if "anyOf" in entry else entry  # [the type, null]
    choices = list(constraints.get("enum", ()))
    expected = f"one of {', '.join(choices)}" if choices else _KINDS[constraints["type"]]
    if constraints.get("items", {}).get("type") == "number":
        expected = "list [number, ...]"
    if "minItems" in constraints:
        expected += f" of at least {constraints['minItems']}"
    bounds = [f"{sign} {constraints[name]}" for name, sign in _BOUNDS.items() if name in constraints]
    if bounds:
        expected += f" {' and '.join(bounds)}"
    if "pattern" in constraints:
        expected += f" matching {constraints['pattern']}"
    return _Key(
        expected=f"{expected} or null" if "anyOf" in entry else expected,
        choices=choices,
        is_text=constraints["type"] == "string",
        is_required=required,
        default=default,
        example=entry["examples"][0] if "examples" in entry else "",
        description=entry["description"],
    )


def _sections(keys: Mapping[str, _Key]) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key))


def _names(section: str, keys: Mapping[str, _Key]) -> str:
    return ", ".join(key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section)


def _suggest_key(unknown: str, keys: Mapping[str, _Key]) -> str:
    section, _, leaf = unknown.rpartition(".")
    by_leaf: dict[str, list[str]] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
    # The right leaf in a wrong or misspelt section first, then a misspelt key, then both wrong.
    same_leaf = by_leaf.get(leaf, [])
    similar = difflib.get_close_matches(unknown, same_leaf, n=1, cutoff=0.8) or same_leaf
    similar = similar or difflib.get_close_matches(unknown, keys, n=1, cutoff=0.75)
    for leaf_match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.75):
        similar = similar or by_leaf[leaf_match]
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    if section in _sections(keys):
        return f"the keys of {section} are {_names(section, keys)}"
    return f"the keys are {_names('', keys)} and those of the sections {', '.join(_sections(keys))}"


def _describe(error: ValidationError, keys: Mapping[str, _Key], settings: Mapping[str, _Setting]) -> Iterator[str]:
    """One line per problem that the model found."""
    for detail in error.errors(include_url=False):
        name = ".".join(part for part in detail["loc"] if isinstance(part, str))  # without the index in a list
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, _ConflictError):
            for conflict in cause.conflicts:
                involved = [".".join([*map(str, detail["loc"]), key]) for key in conflict.keys]
                origins = dict.fromkeys(settings[key].origin for key in involved if key in settings)
                yield f"{involved[0]}: {conflict.reason} ({', '.join(origins)})"
            continue
        key = keys[name]
        if name not in settings:
            example = f", for example {name}={key.example}" if key.example else ""
            yield f"{name}: required and not given; expected {key.expected}{example}"
            continue
        value, origin = settings[name]
        if cause is not None:
            yield f"{name}: {cause} ({origin})"
        else:
            yield f"{name}: expected {key.expected}, got {_show(value)}{_hint(value, key)} ({origin})"


def _hint(value: object, key: _Key) -> str:
    if isinstance(value, str):
        similar = difflib.get_close_matches(value.lower(), key.choices, n=1)
        return f"; did you mean {similar[0]}?" if similar else ""
    if key.is_text and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""


def _show(value: object) -> str:
    """A value as YAML would write it on one line."""
    return json.dumps(value, ensure_ascii=False)


def _config_error(problems: Sequence[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError("\n".join([f"{count} in the configuration (--help-all lists every key):", *problems]))


_HELP_WIDTH = 110
_HELP_LINES = 40  # a screen


def _help(model: type[_Section], doc: str) -> str:
    """One screen: an example, what the job does, its flags and keys, a line each."""
    keys = _keys(model)
    own = [name for name, key in keys.items() if key.is_required or "." not in name]
    own.sort(key=lambda name: not keys[name].is_required)
    sections = _sections(keys)
    width = max(len(name) for name in [*own, *(f"{section}.*" for section in sections)])
    lines = [
        *_usage(model, keys),
        "",
        doc.strip(),
        "",
        "  --config FILE   read the configuration from a YAML file; key=value beats the file",
        "  --dry-run       print the resolved configuration and what would be done, and do nothing",
        "  --help NAME     everything about one key or one section; --help-all: about all of them",
        "",
    ]
    for name in own:
        default = "REQUIRED" if keys[name].is_required else _show(keys[name].default)
        lines.append(_shortened(f"  {name:<{width}}  {default:<10}  {keys[name].description}"))
    listed = []
    for name in sections:
        number = sum(key.startswith(f"{name}.") for key in keys)
        count = f"{number} key{'s' if number > 1 else ''}"
        listed.append(
            _shortened(f"  {name + '.*':<{width}}  {count:<10}  {model.model_fields[name].annotation.__doc__}")
        )
    if len("\n".join([*lines, *listed]).splitlines()) >= _HELP_LINES:
        listed = textwrap.wrap(f"Sections: {', '.join(f'{name}.*' for name in sections)}", _HELP_WIDTH)
    lines += ["", *listed]
    return "\n".join(lines)


def _usage(model: type[_Section], keys: Mapping[str, _Key]) -> list[str]:
    program = f"python {os.path.relpath(sys.argv[0])}"
    required = [f"{name}={key.example}" for name, key in keys.items() if key.is_required]
    required = [shlex.quote(override) for override in [*required, *model.EXAMPLE]]
    example = " ".join(["Example:  " + program, *required])
    if len(example) > _HELP_WIDTH:
        example = " \\\n            ".join(["Example:  " + program, *required])
    return [example, f"Usage:    {program} [--config FILE] [--dry-run] [key=value ...]"]


def _shortened(line: str) -> str:
    return line if len(line) <= _HELP_WIDTH else line[: _HELP_WIDTH - 1].rpartition(" ")[0].rstrip(",;:") + "…"


def _help_all(model: type[_Section]) -> str:
    """Every key with what it takes, its default and its meaning."""
    keys = _keys(model)
    parts = [
        "\n".join(_usage(model, keys)),
        *(_help_section(model, keys, section) for section in ["", *_sections(keys)]),
    ]
    return "\n\n".join(parts)


def _help_about(model: type[BaseModel], name: str) -> str:
    """Everything about one key or one section.

    Raises:
        ConfigError: there is no such name.
    """
    keys = _keys(model)
    name = name.removesuffix(".*")
    if name in _sections(keys):
        return _help_section(model, keys, name)
    if name in keys:
        return _help_key(name, keys[name])
    near = difflib.get_close_matches(name, _sections(keys), n=1)
    hint = f"did you mean {near[0]}?" if near else _suggest_key(name, keys)
    raise _config_error([f"--help {name}: no key and no section; {hint} (command line)"])


def _help_section(model: type[BaseModel], keys: Mapping[str, _Key], section: str) -> str:
    heading = f"{section}: {model.model_fields[section].annotation.__doc__}" if section else "Keys:"
    own = [_help_key(name, key) for name, key in keys.items() if name.rpartition(".")[0] == section]
    return "\n".join([heading, *own])


def _help_key(name: str, key: _Key) -> str:
    default = "REQUIRED" if key.is_required else _show(key.default)
    indent = " " * 6
    meaning = textwrap.wrap(key.description, _HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([f"  {name} ({key.expected}): {default}", *meaning])
