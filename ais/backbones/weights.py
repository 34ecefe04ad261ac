"""Weights: the published ones, anybody's file, or random ones that say so. Never a silent fallback."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ais.backbones.spec import BackboneSpec
from ais.errors import WeightsError
from ais.storage import Storage, fetch

PUBLISHED = ("published", "imagenet")
RANDOM = "random"


@dataclass(frozen=True)
class Weights:
    """Which weights a backbone has; carried in every output.

    Args:
        source: ``"random"`` or the address they came from.
        fingerprint: for a file, its SHA-256; for random weights, a name that says what made them.
        seed: of random weights.
        licence: of published weights.
    """

    source: str
    fingerprint: str
    seed: int | None = None
    licence: str | None = None

    @property
    def untrained(self) -> bool:
        """Whether the weights are random."""
        return self.source == RANDOM

    def as_dict(self) -> dict[str, str | int | None]:
        """Plain data for JSON."""
        return asdict(self)


def resolve_weights(
    spec: BackboneSpec,
    weights: str,
    seed: int | None = None,
    sha256: str | None = None,
    storage: Storage = Storage(),  # noqa: B008 - frozen
    cache: Path | None = None,
) -> tuple[Weights, Path | None]:
    """Find the weights and their fingerprint, downloading them if need be; the network is not built.

    Args:
        spec: of the backbone.
        weights: ``"published"`` (or ``"imagenet"``), ``"random"``, or the address of a ``.pth``, ``.pt`` or
            ``.safetensors`` file.
        seed: of random weights; required there and refused elsewhere.
        sha256: expected digest of the file.
        storage: how to reach remote addresses.
        cache: folder for downloads.

    Raises:
        WeightsError: contradictory arguments, or there is no such file, or it is not what its digest says.
        StorageError: the file cannot be fetched, for now.
    """
    if weights == RANDOM:
        if seed is None:
            raise WeightsError("weights='random' needs an explicit seed, for example seed=0")
        # torch promises the same random stream within a release only.
        name = f"{spec.name}/random/seed={seed}/torch={torch.__version__.split('+')[0]}"
        return Weights(RANDOM, hashlib.sha256(name.encode()).hexdigest(), seed=seed), None
    if seed is not None:
        raise WeightsError(
            f"seed={seed} is for weights='random' only; weights={weights!r} are read from a file; leave the seed out"
        )
    if weights in PUBLISHED or (spec.published is not None and weights == spec.published.url):
        if spec.published is None:
            raise WeightsError(f"{spec.name} has no published weights; give a file or weights='random' with a seed")
        path, digest = fetch(spec.published.url, sha256 or spec.published.sha256, storage, cache)
        return Weights(spec.published.url, digest, licence=spec.published.licence), path
    path, digest = fetch(weights, sha256, storage, cache)
    return Weights(weights, digest), path


def build_random(spec: BackboneSpec, seed: int) -> nn.Module:
    """Build the network with torchvision's own initialisation under a seed; the global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.build()


def build_from_file(spec: BackboneSpec, path: Path) -> nn.Module:
    """Build the network and load a state dict into it.

    ``.safetensors`` files are read as such, anything else by ``torch.load(weights_only=True)``: no code in the file
    is ever run.

    Raises:
        WeightsError: the file is no state dict, or a key is missing, unexpected or of another shape; all are named.
    """
    with torch.device("meta"):
        network = spec.build()
    complete = _is_in_state_dict(network)
    state = _read_state(path)
    if spec.rename_key is not None:
        state = {spec.rename_key(key): value for key, value in state.items()}
    _check_state(spec, network.state_dict(), state, path)
    # What the embedding never uses, and counters that old files lack, may be absent.
    network = network.to_empty(device="cpu") if complete else build_random(spec, seed=0)
    with torch.no_grad():
        for key, value in network.state_dict().items():
            value.copy_(state[key]) if key in state else value.zero_()
    return network


def _is_in_state_dict(network: nn.Module) -> bool:
    """Whether a network's state dict holds all of its tensors: no buffer that is not persistent, no plain attribute."""
    kept = network.state_dict()
    plain = (value for module in network.modules() for value in vars(module).values())
    return all(name in kept for name, _ in network.named_buffers()) and not any(isinstance(v, Tensor) for v in plain)


def _read_state(path: Path) -> dict[str, Tensor]:
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own kinds
        raise WeightsError(
            f"{str(path)!r} cannot be read as a state dict: {_first_line(error)}; "
            "give a .pth or .safetensors file of tensors"
        ) from error
    # Training scripts wrap state dicts once, and DataParallel prefixes keys.
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(
            f"{str(path)!r} holds no state dict (names to tensors); save one with torch.save(model.state_dict(), path)"
        )
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _check_state(spec: BackboneSpec, expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    problems = []
    for key, tensor in expected.items():
        optional = key.startswith(spec.classifier) or key.endswith("num_batches_tracked")
        if key not in found:
            if not optional:
                problems.append(f"missing {key} {tuple(tensor.shape)}")
        elif found[key].shape != tensor.shape:
            if key.startswith(spec.classifier):
                del found[key]  # a classifier of another number of classes
            else:
                problems.append(f"{key} has shape {tuple(found[key].shape)}, expected {tuple(tensor.shape)}")
        elif found[key].is_floating_point() and not bool(torch.isfinite(found[key]).all()):
            problems.append(f"{key} has values that are not finite")
    problems += [f"unexpected {key}" for key in found if key not in expected and not key.startswith(spec.classifier)]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightsError(
            f"{str(path)!r} does not fit {spec.name}:\n  {shown}\n  give its weights, or another backbone.name"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
