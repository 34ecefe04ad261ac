"""What can be configured: typed, frozen models, one for every job. `ais.settings` reads and writes them."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from ais.secrets import refuse_secrets

# Pillow warns of a decompression bomb above this (PIL.Image.MAX_IMAGE_PIXELS): 256 MiB of 24-bit pixels.
PILLOW_MAX_PIXELS = 89_478_485

LEAST_PER_FOLD = 3  # images

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


class Conflict(NamedTuple):
    """Values that are each possible and together are not; ``keys[0]`` is the key to change."""

    keys: tuple[str, ...]
    reason: str


class ConflictError(ValueError):
    """All conflicts of one section, as pydantic carries them."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        super().__init__("; ".join(f"{conflict.keys[0]}: {conflict.reason}" for conflict in conflicts))
        self.conflicts = conflicts


class Section(BaseModel):
    """Base of every job's configuration and of its sections; the docstring of a section heads its keys in --help."""

    # Strict: true is no integer and "3" no number; an integer where a number is wanted is fine.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    EXAMPLE: ClassVar[tuple[str, ...]] = ()  # overrides beside the required keys, in the example of --help

    def _conflicts(self) -> Iterator[Conflict]:
        """Yield each rule over several keys of this section that the values break."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := list(self._conflicts()):
            raise ConflictError(conflicts)
        return self


_STORAGE_OPTION = re.compile(r"(?P<scheme>[a-z][a-z0-9+-]*)\.(?P<option>[a-z][a-z0-9_]*)=(?P<value>.+)", re.DOTALL)
_SECRET_OPTION = re.compile(r"key|secret|token|passw|credential|sas|auth|connection_string|headers")


class StorageConfig(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        if self.anonymous and self.profile is not None:
            yield Conflict(
                ("profile", "anonymous"),
                f"{show(self.profile)} has no effect with storage.anonymous=true; set one of the two",
            )
        for option in self.options:
            match = _STORAGE_OPTION.fullmatch(option)
            if match is None:
                name = option.partition("=")[0]  # a value may be a secret
                yield Conflict(("options",), f"expected scheme.option=value, such as gs.project=photos, got {name!r}")
            elif match["scheme"] in ("s3", "s3a"):
                yield Conflict(("options",), f"{match['option']!r} is for S3, which has keys of its own in storage")
            elif _SECRET_OPTION.search(match["option"]):
                yield Conflict(
                    ("options",),
                    f"{match['option']!r} is a secret; it comes from the environment, as the filesystem's own"
                    " documentation says, never from a configuration",
                )


def _weights_conflicts(weights: str, seed: int | None, sha256: str | None) -> Iterator[Conflict]:
    if weights == "random" and seed is None:
        yield Conflict(("seed", "weights"), "required with backbone.weights=random, for example backbone.seed=0")
    if weights != "random" and seed is not None:
        yield Conflict(
            ("seed", "weights"),
            f"{seed} goes only with backbone.weights=random, got {show(weights)}; set backbone.seed=null",
        )
    if weights == "random" and sha256 is not None:
        yield Conflict(
            ("sha256", "weights"),
            "random weights come from no file and have no digest; set backbone.sha256=null",
        )


class BackboneConfig(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        return _weights_conflicts(self.weights, self.seed, self.sha256)


class BackboneOverrides(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        if self.weights is not None:
            yield from _weights_conflicts(self.weights, self.seed, self.sha256)


_MODE = "Fit an image into the square input by cutting its ends (center_crop) or by padding (letterbox)"


class PreprocessingConfig(Section):
    """How an image becomes the backbone's input."""

    mode: Literal["center_crop", "letterbox"] = Field(default="center_crop", description=f"{_MODE}.")


class PreprocessingOverrides(Section):
    """How an image becomes the backbone's input (null: as the head was trained)."""

    mode: Literal["center_crop", "letterbox"] | None = Field(default=None, description=f"{_MODE}.")


class LimitsConfig(Section):
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
            f"expected a whole number >= 1, or MIN..MAX (whole numbers, 1 <= MIN <= MAX), got {show(text)}"
        )


def _pool_text(value: object) -> object:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        PoolSize.parse(text)
    return text


PoolText = Annotated[str, BeforeValidator(_pool_text)]


class ComputeConfig(Section):
    """Where and how the work is done."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: a GPU where the actor finds one, otherwise the CPU."
    )
    batch_size: Count | None = Field(
        default=None, description="Images per forward pass; null: chosen by backbone and device."
    )
    scoring_actors: PoolText | None = Field(
        default=None,
        description="Actors that hold backbone and head: a number, or MIN..MAX to grow with the work; null: one a"
        " GPU, or as many as the CPUs allow, at most one a core, and fewer where there are few images.",
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

    def _conflicts(self) -> Iterator[Conflict]:
        gpus = self.scoring_gpus
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            yield Conflict(("scoring_gpus",), f"{gpus:g}: above 1, Ray gives whole GPUs only; give 1 or 2")
        if gpus == 0 and self.device == "cuda":
            yield Conflict(
                ("scoring_gpus", "device"), "with compute.device=cuda an actor that reserves no GPU would see none"
            )


class AblatingComputeConfig(ComputeConfig):
    """Where and how the work is done."""

    chunk: Count | None = Field(
        default=None,
        description="Feature maps ablated per pass where the tail has to be run; null: chosen by memory.",
    )


class ExplainingComputeConfig(AblatingComputeConfig):
    """Where and how the work is done."""

    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Of the trunk; tail, head and differences are float32 always."
    )
    compile: bool = Field(
        default=False,
        description="Compile the trunk with torch.compile: the first batches wait for it, all others are faster on a"
        " GPU.",
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
            f"expected all, none, top:N or bottom:N (N a whole number >= 1), or sample:F (0 < F <= 1), got {show(text)}"
        )


class PngConfig(Section):
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


class _RatingsColumns(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        columns = {
            "image_column": self.image_column,
            "score_column": self.score_column,
            "split_column": self.split_column,
        }
        for key, column in columns.items():
            same = [other for other, value in columns.items() if value == column]
            if same[0] != key:
                yield Conflict((key, same[0]), f"{show(column)} is ratings.{same[0]} already")


class RatingsConfig(_RatingsColumns):
    """The rated images."""

    path: Address = Field(description="Address of the table of ratings, CSV or Parquet.", examples=["ratings.csv"])


class OptionalRatingsConfig(_RatingsColumns):
    """The rated images, where the objective is of ratings."""

    path: Address | None = Field(default=None, description="Address of the table of ratings, CSV or Parquet.")

    def table(self) -> RatingsConfig:
        """The same, with a table."""
        assert self.path is not None
        return RatingsConfig(**self.model_dump())


class HeadConfig(Section):
    """The head: Linear, ReLU, dropout, Linear."""

    hidden: Count = Field(default=512, description="Hidden units.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Share of hidden units dropped in training; which ones depends on the number of workers, too.",
    )


class FitConfig(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        if self.validation_share + self.test_share >= 0.9:
            yield Conflict(
                ("validation_share", "test_share"),
                f"{self.validation_share:g} and fit.test_share={self.test_share:g} leave too little to train"
                " on; their sum has to be below 0.9",
            )


class PlantedConfig(Section):
    """Images with known truth."""

    count: Annotated[int, Field(ge=50)] = Field(default=300, description="Number of images.")
    size: Annotated[int, Field(ge=64)] = Field(default=256, description="Shorter side of an image, in pixels.")
    seed: Seed = Field(default=0, description="Seed of the images and ratings.")
    second_share: Share = Field(default=0.3, description="Share of images with a second object that lowers the rating.")


_MAX_ERROR_SHARE = "Share of images that may fail before the job as a whole fails; what is good is kept."


class HeatmapsConfig(Section):
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
    compute: ExplainingComputeConfig = ExplainingComputeConfig()
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

    def _conflicts(self) -> Iterator[Conflict]:
        for key in ("repair", "retry_errors"):
            if self.verify and getattr(self, key):
                yield Conflict((key, "verify"), "verify=true changes nothing; set one of the two")


class DriftConfig(Section):
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


class ScoreConfig(Section):
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
    compute: ExplainingComputeConfig = ExplainingComputeConfig()
    max_error_share: Share = Field(
        default=0.05,
        description="Share of the collection's images that may have failed before the job as a whole fails and leaves"
        " OUTPUT/latest.parquet as it was; what is good is kept.",
    )
    shard_rows: Count = Field(default=4096, description="Images per output shard.")

    def _conflicts(self) -> Iterator[Conflict]:
        if self.heatmaps:
            return
        default = type(self).model_fields
        values = {key: (getattr(self, key), default[key].default) for key in ("importance", "weighting")}
        for key in PngConfig.model_fields:
            values[f"png.{key}"] = (getattr(self.png, key), getattr(default["png"].default, key))
        for key, (value, unset) in values.items():
            if value != unset:
                yield Conflict((key, "heatmaps"), f"{show(value)} has no use with heatmaps=false")

    def as_heatmaps(self) -> HeatmapsConfig:
        """The same as a configuration of the main job, for what both have in common."""
        shared = HeatmapsConfig.model_fields.keys() & type(self).model_fields.keys()
        return HeatmapsConfig.model_construct(**{key: getattr(self, key) for key in shared}, run_id=self.tick)


class TrainConfig(Section):
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


class CompareConfig(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        if repeated := _repeated(self.runs):
            yield Conflict(("runs",), f"{show(repeated)} is given twice; name each run once")
        if self.names is None:
            return
        if len(self.names) != len(self.runs):
            yield Conflict(("names", "runs"), f"{len(self.names)} given for {len(self.runs)} runs; give one for each")
        if repeated := _repeated(self.names):
            yield Conflict(("names",), f"{show(repeated)} is given twice; give each run its own")


def _repeated(values: Sequence[str]) -> str | None:
    return next((value for index, value in enumerate(values) if value in values[:index]), None)


class ConvertConfig(Section):
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

    def _conflicts(self) -> Iterator[Conflict]:
        for key, dataset in (("aspect", "aigciqa2023"), ("order", "peterson")):
            if getattr(self, key) is not None and self.dataset != dataset:
                yield Conflict((key, "dataset"), f"{show(getattr(self, key))} goes only with dataset={dataset}")
        suffixes = (".npz", ".csv") if self.dataset == "peterson" else (".csv", ".parquet")
        if not self.output.endswith(suffixes):
            yield Conflict(
                ("output", "dataset"),
                f"{show(self.output)} has to end with {' or '.join(suffixes)}, which says the format",
            )


class ImportanceConfig(Section):
    """The AIS of every feature map over a set of images."""

    EXAMPLE = ("ratings.path=ratings.csv", "head=heads/first")
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
    ratings: OptionalRatingsConfig = OptionalRatingsConfig()
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
    compute: AblatingComputeConfig = AblatingComputeConfig()
    max_error_share: Share = Field(default=0.05, description=_MAX_ERROR_SHARE)

    def _conflicts(self) -> Iterator[Conflict]:
        wanted = {
            "prediction": ("images", "head"),
            "error": ("ratings.path", "head"),
            "similarity": ("matrix",),
        }[self.objective]
        given = {
            "images": self.images,
            "ratings.path": self.ratings.path,
            "matrix": self.matrix,
            "head": self.head,
        }
        for key, value in given.items():
            if key in wanted and value is None:
                yield Conflict((key, "objective"), f"required with objective={self.objective}")
            optional = self.objective == "similarity" and key in ("images", "head")
            if key not in wanted and not optional and value is not None:
                yield Conflict((key, "objective"), f"{show(value)} has no use with objective={self.objective}")
        if self.objective != "error" and not self.held_out:
            yield Conflict(("held_out", "objective"), f"false has no use with objective={self.objective}")
        if self.objective == "similarity" and self.head is None and self.backbone.name is None:
            yield Conflict(("backbone.name", "objective"), "required with objective=similarity, unless a head is given")


class ValidateConfig(Section):
    """Whether the heatmaps of a head are true."""

    EXAMPLE = ("ratings.path=ratings.csv", "head=heads/first")
    objective: Literal["ratings", "similarity"] = Field(
        default="ratings",
        description="ratings: a head and its heatmaps, on rated images; similarity: the maps of a backbone, on images"
        " that people compared.",
    )
    ratings: OptionalRatingsConfig = OptionalRatingsConfig()
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
    compute: ExplainingComputeConfig = ExplainingComputeConfig()
    max_error_share: Share = Field(default=0.05, description=_MAX_ERROR_SHARE)

    def _conflicts(self) -> Iterator[Conflict]:
        similarity = self.objective == "similarity"
        if similarity and self.matrix is None:
            yield Conflict(("matrix", "objective"), "required with objective=similarity")
        if similarity and self.head is None and self.backbone.name is None:
            yield Conflict(("backbone.name", "objective"), "required with objective=similarity, unless a head is given")
        if similarity and not self.protocol:
            yield Conflict(("protocol", "objective"), "false leaves nothing to do with objective=similarity")
        if not similarity and self.protocol_images < LEAST_PER_FOLD * self.folds:
            yield Conflict(
                ("protocol_images", "folds"),
                f"{self.protocol_images} are too few for folds={self.folds}; at least {LEAST_PER_FOLD * self.folds}",
            )
        for key, value in (("ratings.path", self.ratings.path), ("head", self.head)):
            if not similarity and value is None:
                yield Conflict((key, "objective"), "required with objective=ratings")
        useless = (
            (("ratings.path", self.ratings.path), ("masks", self.masks))
            if similarity
            else (("matrix", self.matrix), ("images", self.images))
        )
        for key, value in useless:
            if value is not None:
                yield Conflict((key, "objective"), f"{show(value)} has no use with objective={self.objective}")


class GalleryConfig(Section):
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


class ReportConfig(Section):
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


class DemoConfig(Section):
    """The demo: planted images, a head fitted to them, the heatmaps job, and how well it points."""

    EXAMPLE = ("output=demo",)
    output: Address = Field(default="demo", description="Folder for everything that the demo writes.")
    planted: PlantedConfig = PlantedConfig()
    backbone: BackboneConfig = BackboneConfig(name="barlow_twins", weights="random", seed=0)
    head: HeadConfig = HeadConfig()
    fit: FitConfig = FitConfig()
    png: PngConfig = PngConfig()
    storage: StorageConfig = StorageConfig()
    compute: ExplainingComputeConfig = ExplainingComputeConfig()


class ValidateDemoConfig(Section):
    """The demo of the validation: planted images, several backbones, heads fitted to true and to shuffled ratings."""

    EXAMPLE = ("output=demo/validation",)
    output: Address = Field(default="demo/validation", description="Folder for everything that the demo writes.")
    planted: PlantedConfig = PlantedConfig(count=240)
    backbones: Texts = Field(
        default=("barlow_twins", "efficientnet_b3", "densenet161:features.norm5"),
        min_length=2,
        description="Names in the registry, with :LAYER behind one for another layer than its own; their weights are "
        "random, so that nothing is downloaded.",
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
    compute: ExplainingComputeConfig = ExplainingComputeConfig()

    def layers(self) -> dict[str, str | None]:
        """The layer asked for of each backbone, by its name; ``None``: its own."""
        parts = (given.partition(":") for given in self.backbones)
        return {name: layer or None for name, _, layer in parts}

    def _conflicts(self) -> Iterator[Conflict]:
        if repeated := _repeated([given.partition(":")[0] for given in self.backbones]):
            yield Conflict(("backbones",), f"{show(repeated)} is given twice; name each backbone once")


ConfigT = TypeVar("ConfigT", bound=Section)


def config_fingerprint(config: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256, 64 hex digits, of a configuration (or what it dumps to) as JSON with sorted keys."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def show(value: object) -> str:
    """A value as YAML would write it on one line."""
    return json.dumps(value, ensure_ascii=False)
