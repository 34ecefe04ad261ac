"""The regression head on a frozen backbone's embedding, and its bundle on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ais.backbones import Backbone, embedding_fingerprint
from ais.errors import HeadError
from ais.storage import Storage, reading

_ANEW = "copy the bundle whole, or train it again with jobs/train.py"
FORMAT = 1
WEIGHTS_FILE = "head.safetensors"
RECORD_FILE = "head.json"


class RegressionHead(nn.Module):
    """A 2-layer MLP with one output: embedding ``(B, D)`` → score ``(B,)`` in the units of the ratings.

    Linear → ReLU → (dropout while training) → Linear. The output layer predicts standardised ratings; ``target_mean``
    and ``target_std`` bring them back to rating units.

    Args:
        in_features: D, the backbone's ``embedding_size``.
        hidden: units of the hidden layer.
        dropout: share of hidden units dropped while training.
        target_mean: mean of the training ratings.
        target_std: standard deviation of the training ratings.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self,
        in_features: int,
        hidden: int = 512,
        dropout: float = 0.0,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, 1)
        self.register_buffer("target_mean", torch.tensor(float(target_mean)))
        self.register_buffer("target_std", torch.tensor(float(target_std)))

    @property
    def in_features(self) -> int:
        """D."""
        return self.hidden.in_features

    def standardised(self, embeddings: Tensor) -> Tensor:
        """Return predictions ``(B,)`` of the standardised ratings; what is fitted."""
        return self.output(self.dropout(torch.relu(self.hidden(embeddings))))[..., 0]

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return scores ``(B,)`` in rating units."""
        return self.target_mean + self.target_std * self.standardised(embeddings)


@dataclass(frozen=True)
class HeadRecord:
    """What a head belongs to; stored as ``head.json``.

    Args:
        backbone: name in the registry.
        weights: ``"random"`` or the address of the backbone's weights.
        seed: of random weights.
        weights_fingerprint: of the backbone's weights.
        preprocessing: ``"center_crop"`` or ``"letterbox"``.
        embedding_fingerprint: of backbone, weights and preprocessing together.
        sha256: of ``head.safetensors``.
    """

    backbone: str
    weights: str
    seed: int | None
    weights_fingerprint: str
    preprocessing: str
    embedding_fingerprint: str
    sha256: str


class HeadEnsemble(nn.Module):
    """K heads that differ in seed and split; predicts their mean ``(B,)``.

    Args:
        heads: all with the same number of inputs.
        record: what they were trained on; ``None`` for heads made by hand.
    """

    def __init__(self, heads: Iterable[RegressionHead], record: HeadRecord | None = None) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.record = record
        sizes = {head.in_features for head in self.variants}
        if len(sizes) != 1:
            raise HeadError(
                f"heads of one ensemble must have the same number of inputs, these have {sorted(sizes)}; "
                "train them on one backbone"
            )

    @property
    def variants(self) -> list[RegressionHead]:
        """The heads."""
        return [head for head in self.heads if isinstance(head, RegressionHead)]

    @property
    def in_features(self) -> int:
        """D."""
        return self.variants[0].in_features

    def each(self, embeddings: Tensor) -> Tensor:
        """Return the scores ``(K, B)`` of every head."""
        return torch.stack([head(embeddings) for head in self.variants])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the mean score ``(B,)`` of the heads."""
        return self.each(embeddings).mean(0)


def as_ensemble(head: RegressionHead | HeadEnsemble) -> HeadEnsemble:
    """Treat a single head as an ensemble of one."""
    return head if isinstance(head, HeadEnsemble) else HeadEnsemble([head])


def check_belongs(head: HeadEnsemble, backbone: Backbone, preprocessing: str) -> None:
    """Refuse a head that was trained on other embeddings.

    Raises:
        HeadError: names both fingerprints and what differs.
    """
    if head.in_features != backbone.embedding_size:
        raise HeadError(
            f"the head takes embeddings of {head.in_features} numbers; {backbone.spec.name} gives "
            f"{backbone.embedding_size}; train one for it with jobs/train.py"
        )
    if head.record is not None:
        check_record(head.record, backbone.spec.name, backbone.weights.fingerprint, preprocessing)
        expected = embedding_fingerprint(backbone.spec, backbone.weights, preprocessing)
        if head.record.embedding_fingerprint != expected:
            raise HeadError(
                f"the head was trained on embeddings {head.record.embedding_fingerprint[:16]}…, this backbone and "
                f"preprocessing give {expected[:16]}…; train a head for them with jobs/train.py"
            )


def check_record(record: HeadRecord, backbone: str, weights_fingerprint: str, preprocessing: str) -> None:
    """Compare what a head was trained on with what it is to be used on.

    Raises:
        HeadError: they differ; names both sides.
    """
    for what, trained, used in (
        ("backbone", record.backbone, backbone),
        ("backbone weights", record.weights_fingerprint, weights_fingerprint),
        ("preprocessing", record.preprocessing, preprocessing),
    ):
        if trained != used:
            raise HeadError(
                f"the head was trained with {what} {trained!r}, not {used!r}; "
                "use that or train another with jobs/train.py"
            )


def save_head(
    address: str,
    head: HeadEnsemble,
    backbone: Backbone,
    preprocessing: str,
    details: dict[str, Any],
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> HeadRecord:
    """Write ``head.safetensors`` and, last, ``head.json`` into a folder.

    Args:
        address: of the folder.
        head: the fitted heads.
        backbone: that made the embeddings.
        preprocessing: mode under which they were made.
        details: further entries of ``head.json`` for people to read.
        storage: how to reach the folder.
    """
    folder = storage.open(address)
    state = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
    data = safetensors.torch.save(state)
    record = HeadRecord(
        backbone=backbone.spec.name,
        weights=backbone.weights.source,
        seed=backbone.weights.seed,
        weights_fingerprint=backbone.weights.fingerprint,
        preprocessing=preprocessing,
        embedding_fingerprint=embedding_fingerprint(backbone.spec, backbone.weights, preprocessing),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    first = head.variants[0]
    document = {
        "format": FORMAT,
        **asdict(record),
        "in_features": first.in_features,
        "hidden": first.hidden.out_features,
        "dropout": first.dropout.p,
        "variants": len(head.variants),
        **details,
    }
    (folder / WEIGHTS_FILE).write_bytes(data)
    (folder / RECORD_FILE).write_text(json.dumps(document, indent=2) + "\n")
    return record


def load_head(address: str, storage: Storage = Storage()) -> HeadEnsemble:  # noqa: B008 - frozen
    """Read a head bundle.

    Args:
        address: of its folder (local path or any fsspec address).
        storage: how to reach it.

    Raises:
        HeadError: there is no bundle, it is of another format, or the weights are not those of the record.
    """
    record, document = read_record(address, storage)
    folder = storage.open(address)
    try:
        with reading(folder / WEIGHTS_FILE):
            data = (folder / WEIGHTS_FILE).read_bytes()
    except FileNotFoundError as error:
        raise HeadError(f"{address!r} has {RECORD_FILE} but no {WEIGHTS_FILE}; {_ANEW}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        raise HeadError(f"{WEIGHTS_FILE} in {address!r} has SHA-256 {digest}, its record says {record.sha256}; {_ANEW}")
    try:
        heads = [
            RegressionHead(int(document["in_features"]), int(document["hidden"]), float(document["dropout"]))
            for _ in range(int(document["variants"]))
        ]
        ensemble = HeadEnsemble(heads, record)
        ensemble.load_state_dict(safetensors.torch.load(data))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise HeadError(f"{address!r} is not a usable head bundle: {error}; {_ANEW}") from error
    ensemble.requires_grad_(False)
    return ensemble.eval()


@dataclass(frozen=True)
class HeadSource:
    """Everything a worker needs to load the same head as the driver checked.

    Args:
        address: of the bundle's folder.
        sha256: of the ``head.safetensors`` that the driver saw.
        storage: how to reach the address.
    """

    address: str
    sha256: str
    storage: Storage

    def load(self) -> HeadEnsemble:
        """Load it.

        Raises:
            HeadError: the bundle cannot be read, or it holds another head by now.
        """
        head = load_head(self.address, self.storage)
        assert head.record is not None
        if head.record.sha256 != self.sha256:
            raise HeadError(
                f"the head in {self.address!r} has SHA-256 {head.record.sha256} now, the job started with "
                f"{self.sha256}: it was replaced meanwhile; put the first back and start the same command again, or "
                "start anew with the new one"
            )
        return head


def read_record(address: str, storage: Storage = Storage()) -> tuple[HeadRecord, dict[str, Any]]:  # noqa: B008
    """Read only ``head.json``: the record, and the whole document.

    Raises:
        HeadError: there is none, or it is not one of ours.
    """
    folder = storage.open(address)
    try:
        with reading(folder / RECORD_FILE):
            data = (folder / RECORD_FILE).read_bytes()
        document = json.loads(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise HeadError(f"{address!r} is no head bundle: it has no {RECORD_FILE}; jobs/train.py writes one") from error
    except ValueError as error:
        raise HeadError(f"{RECORD_FILE} in {address!r} is not JSON: {error}; {_ANEW}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise HeadError(f"{RECORD_FILE} in {address!r} has format {found!r}, this version reads {FORMAT}; {_ANEW}")
    try:
        return HeadRecord(**{name: document[name] for name in HeadRecord.__dataclass_fields__}), document
    except KeyError as error:
        raise HeadError(f"{RECORD_FILE} in {address!r} lacks {error}; {_ANEW}") from error
