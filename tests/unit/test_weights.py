"""Weights: every form of file that a user may have, everything that can be wrong with one, and the cache.

The state dicts are written by the tests. Nothing is faked: remote files come from an HTTP server of the test on the
loopback interface, and from fsspec's in-memory filesystem. The records of published weights point there too, so that
no test needs the internet.
"""

import dataclasses
import functools
import hashlib
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import DenseNet

from ais.backbones import BackboneSpec, PublishedWeights, get_spec, load_backbone, resolve_weights
from ais.backbones.families import adapt_densenet, rename_densenet_key
from ais.errors import StorageError, WeightsError
from ais.storage import Storage, fetch, sha256_of
from tests.networks import randomise_batch_norms
from tests.tiny import TINY, TinyClassifier

State = dict[str, Tensor]


def trained() -> TinyClassifier:
    """A network whose every tensor differs from a fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        network = TinyClassifier()
    randomise_batch_norms(network, seed=7)
    return network.eval()


def state_of(network: nn.Module) -> State:
    return {key: value.clone() for key, value in network.state_dict().items()}


def save(path: Path, state: Any) -> Path:
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.fixture
def state() -> State:
    return state_of(trained())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def expected(images: Tensor) -> Tensor:
    """The embedding by the trained network itself."""
    with torch.no_grad():
        return trained().features(images).mean((2, 3))


def without(state: State, suffix: str) -> State:
    return {key: value for key, value in state.items() if not key.endswith(suffix)}


FORMS = {
    "plain .pth": ("w.pth", lambda state: state),
    "plain .pt": ("w.pt", lambda state: state),
    "safetensors": ("w.safetensors", lambda state: state),
    "wrapped in state_dict": ("w.pth", lambda state: {"state_dict": state, "epoch": 3}),
    "DataParallel": ("w.pth", lambda state: {f"module.{key}": value for key, value in state.items()}),
    "wrapped DataParallel": ("w.pth", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
    "before num_batches_tracked": ("w.pth", lambda state: without(state, "num_batches_tracked")),
    "without classifier": ("w.pth", lambda state: {k: v for k, v in state.items() if "classifier" not in k}),
    "classifier of three classes": (
        "w.pth",
        lambda state: state | {"classifier.weight": torch.ones(3, 8), "classifier.bias": torch.ones(3)},
    ),
    "another classifier": ("w.pth", lambda state: state | {"classifier.extra": torch.ones(3)}),
    "half precision": ("w.pth", lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_state_dict_loads(
    form: str, state: State, images: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    name, change = FORMS[form]
    path = save(tmp_path / name, change(state))
    backbone = load_backbone("tiny", weights=str(path))
    tolerance = 1e-2 if form == "half precision" else 1e-6
    torch.testing.assert_close(backbone(images), expected, rtol=tolerance, atol=tolerance)
    assert backbone.weights.source == str(path)
    assert backbone.weights.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not backbone.untrained
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


class WithConstants(TinyClassifier):
    """Scales by a tensor that is in no state dict."""

    def __init__(self, how: str) -> None:
        super().__init__()
        scale = torch.full((3, 1, 1), 2.0)
        if how == "buffer":
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = scale


class Scaled(nn.Module):
    def __init__(self, network: WithConstants) -> None:
        super().__init__()
        self.features = network.features
        if "scale" in network._buffers:
            self.register_buffer("scale", network.scale, persistent=False)
        else:
            self.scale = network.scale

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images * self.scale).mean((2, 3))


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_constants_that_are_in_no_state_dict_are_kept(how: str, state: State, images: Tensor, tmp_path: Path) -> None:
    spec = dataclasses.replace(
        TINY, name="constants", build=functools.partial(WithConstants, how), adapt=lambda network: Scaled(network)
    )
    path = save(tmp_path / "w.pth", state)
    before = torch.random.get_rng_state()
    backbone = load_backbone(spec, weights=str(path))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        expected = trained().features(2 * images).mean((2, 3))
    torch.testing.assert_close(backbone(images), expected)


def test_densenet_files_with_old_names_load(tmp_path: Path) -> None:
    """The published DenseNets say ``norm.1`` where today's torchvision says ``norm1``."""
    small = functools.partial(DenseNet, growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2)
    spec = dataclasses.replace(
        get_spec("densenet161"),
        name="small densenet",
        build=small,
        adapt=adapt_densenet,
        input_size=64,
        resize_size=64,
        layer="features.denseblock2.denselayer2.conv2",
        embedding_size=16,
    )
    network = small().eval()
    randomise_batch_norms(network)
    old = {}
    for key, value in without(state_of(network), "num_batches_tracked").items():
        for name in ("norm", "relu", "conv"):
            for digit in "12":
                if "denselayer" in key:
                    key = key.replace(f".{name}{digit}.", f".{name}.{digit}.")
        old[key] = value
    assert "features.denseblock1.denselayer1.norm.1.running_mean" in old
    assert "features.denseblock2.denselayer2.conv.2.weight" in old
    assert (
        rename_densenet_key("features.denseblock1.denselayer1.norm.1.bias")
        == "features.denseblock1.denselayer1.norm1.bias"
    )
    assert rename_densenet_key("features.norm5.weight") == "features.norm5.weight"
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.relu(network.features(images)).mean((2, 3))
    backbone = load_backbone(spec, weights=str(save(tmp_path / "old.pth", old)))
    torch.testing.assert_close(backbone(images), expected)


def test_barlow_twins_file_has_no_classifier(tmp_path: Path) -> None:
    """The published checkpoint is a ResNet-50 without ``fc``, by torchvision's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        resnet = models.resnet50(weights=None).eval()
    state = {key: value for key, value in resnet.state_dict().items() if not key.startswith("fc.")}
    backbone = load_backbone("barlow_twins", weights=str(save(tmp_path / "resnet50.pth", state)))
    resnet.fc = nn.Identity()  # type: ignore[assignment]
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), resnet(images))


def _changed(state: State, key: str, value: Tensor) -> State:
    return state | {key: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: without(s, "features.3.weight"), "missing features.3.weight (16, 16, 3, 3)"),
        (lambda s: without(s, "4.running_var"), "missing features.4.running_var (16,)"),
        (lambda s: _changed(s, "surprise.weight", torch.ones(1)), "unexpected surprise.weight"),
        (
            lambda s: _changed(s, "features.0.weight", torch.ones(16, 3, 5, 5)),
            "features.0.weight has shape (16, 3, 5, 5), expected (16, 3, 3, 3)",
        ),
        (
            lambda s: _changed(s, "features.1.bias", torch.tensor([float("nan")] * 16)),
            "features.1.bias has values that are not finite",
        ),
        (
            lambda s: _changed(s, "features.1.bias", torch.tensor([float("inf")] + [0.0] * 15)),
            "features.1.bias has values that are not finite",
        ),
    ],
)
def test_misfitting_state_dict_is_refused_and_every_key_named(
    change: Any, said: str, state: State, tmp_path: Path
) -> None:
    path = save(tmp_path / "w.pth", change(state))
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", weights=str(path))
    assert f"{str(path)!r} does not fit tiny" in str(caught.value)
    assert said in str(caught.value)


def test_all_problems_are_named_the_first_eight_at_length(state: State, tmp_path: Path) -> None:
    wrong = {f"other.{index}": torch.ones(1) for index in range(4)} | without(state, "weight")
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", weights=str(save(tmp_path / "w.pth", wrong)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 8 + 1 + 1
    assert lines[1] == "  missing features.0.weight (16, 3, 3, 3)"
    assert lines[-2] == "  … and 2 more"  # 6 weights and 4 others
    assert lines[-1] == "  give its weights, or another backbone.name"


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_file_is_never_run(how: str, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "w.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"features.0.weight": _Malicious(target)}, protocol=2))
    else:
        torch.save({"features.0.weight": _Malicious(target)}, path)
    with pytest.raises(WeightsError, match="cannot be read as a state dict"):
        load_backbone("tiny", weights=str(path))
    assert not target.exists()
    torch.load(path, weights_only=False) if how == "torch.save" else pickle.loads(path.read_bytes())
    assert target.exists(), "the file would have done it"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("w.pth", b"", "cannot be read as a state dict"),
        ("w.pth", b"<html>404</html>", "cannot be read as a state dict"),
        ("w.safetensors", b"\x00" * 100, "cannot be read as a state dict"),
    ],
)
def test_file_that_is_no_checkpoint_is_refused(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=said) as caught:
        load_backbone("tiny", weights=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.ones(2)])
def test_checkpoint_that_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_backbone("tiny", weights=str(save(tmp_path / "w.pth", content)))


def test_truncated_checkpoint_is_refused(state: State, tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", state)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(WeightsError, match="cannot be read as a state dict"):
        load_backbone("tiny", weights=str(path))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pth' is not a file"):
        load_backbone("tiny", weights=str(tmp_path / "nowhere.pth"))
    with pytest.raises(WeightsError, match=r"cannot be read: OSError: .*File name too long.*check its permissions"):
        load_backbone("tiny", weights=str(tmp_path / ("x" * 300)))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"the cache '.*file/weights' cannot be written: .*set XDG_CACHE_HOME"):
        load_backbone("tiny", weights="memory://weights/w.pth", cache=tmp_path / "file")


def test_digest_of_a_file_is_checked(state: State, tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", state)
    digest = sha256_of(path)
    for expected in (digest, digest.upper(), digest[:8]):
        assert load_backbone("tiny", weights=str(path), sha256=expected).weights.fingerprint == digest
    with pytest.raises(WeightsError) as caught:
        load_backbone("tiny", weights=str(path), sha256="0" * 64)
    assert all(part in str(caught.value) for part in (digest, "0" * 64, str(path)))


# Random weights


def test_random_needs_a_seed_and_a_file_refuses_one(state: State, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="needs an explicit seed, for example seed=0"):
        load_backbone("tiny", weights="random")
    path = save(tmp_path / "w.pth", state)
    with pytest.raises(WeightsError, match="seed=3 is for weights='random' only"):
        load_backbone("tiny", weights=str(path), seed=3)
    with pytest.raises(WeightsError, match="seed=0 is for weights='random' only; weights='published'"):
        load_backbone("resnet152", seed=0)


def test_random_weights_are_torchvisions_initialisation_under_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_backbone("tiny", weights="random", seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        plain = TinyClassifier()
    for key, value in plain.features.state_dict().items():
        assert torch.equal(first.network.features.state_dict()[key], value)
        assert torch.equal(again.network.features.state_dict()[key], value)
    assert not torch.equal(first.network.features[0].weight, other.network.features[0].weight)


def test_random_weights_say_what_they_are() -> None:
    first, again, other = (load_backbone("tiny", weights="random", seed=seed).weights for seed in (4, 4, 5))
    assert (first.source, first.seed, first.untrained) == ("random", 4, True)
    assert first == again
    assert first.fingerprint != other.fingerprint
    elsewhere, _ = resolve_weights(dataclasses.replace(TINY, name="elsewhere"), "random", seed=4)
    assert elsewhere.fingerprint != first.fingerprint
    assert first.as_dict() == {"source": "random", "fingerprint": first.fingerprint, "seed": 4, "licence": None}


def test_loading_a_file_leaves_the_global_random_state(state: State, tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", state)
    before = torch.random.get_rng_state()
    load_backbone("tiny", weights=str(path))
    assert torch.equal(torch.random.get_rng_state(), before)


# Remote files


@dataclasses.dataclass
class Server:
    """An HTTP server on a folder that counts what is fetched."""

    address: str
    folder: Path
    fetched: Counter[str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    fetched: Counter[str] = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched[self.path] += 1
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{http.server_port}", folder, fetched)
        http.shutdown()
        thread.join()


def published(url: str, sha256: str | None) -> BackboneSpec:
    return dataclasses.replace(TINY, published=PublishedWeights(url, sha256, "CC0-1.0", "this test"))


@pytest.mark.parametrize("word", ["published", "imagenet"])
def test_published_weights_are_fetched_once_and_their_digest_checked(
    word: str, server: Server, state: State, images: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    digest = sha256_of(save(server.folder / "w.pth", state))
    spec, cache = published(f"{server.address}/w.pth", digest[:8]), tmp_path / "cache"
    for _ in range(2):
        backbone = load_backbone(spec, weights=word, cache=cache)
        torch.testing.assert_close(backbone(images), expected)
        assert backbone.weights.fingerprint == digest
        assert backbone.weights.licence == "CC0-1.0"
        assert backbone.weights.source == f"{server.address}/w.pth"
    assert server.fetched == {"/w.pth": 1}


def test_published_is_the_default_and_cached_under_the_users_cache(server: Server, state: State) -> None:
    save(server.folder / "w.pth", state)
    load_backbone(published(f"{server.address}/w.pth", None))
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "ais" / "weights").glob("*.pth")
    assert kept.read_bytes() == (server.folder / "w.pth").read_bytes()


def test_published_weights_with_another_digest_are_refused_and_not_kept(
    server: Server, state: State, tmp_path: Path
) -> None:
    digest = sha256_of(save(server.folder / "w.pth", state))
    with pytest.raises(WeightsError, match=f"SHA-256 {digest}, expected ffffffff"):
        load_backbone(published(f"{server.address}/w.pth", "ffffffff"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.pth*partial"))
    assert not list((tmp_path / "cache").rglob("*.pth"))


def test_digest_of_the_first_download_holds_where_none_is_published(
    server: Server, state: State, tmp_path: Path
) -> None:
    digest = sha256_of(save(server.folder / "w.pth", state))
    spec = published(f"{server.address}/w.pth", None)
    assert load_backbone(spec, cache=tmp_path / "cache").weights.fingerprint == digest
    (kept,) = (tmp_path / "cache" / "weights").glob("*.pth")
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError, match=f"expected {digest}: the file is damaged") as caught:
        load_backbone(spec, cache=tmp_path / "cache")
    assert str(kept) in str(caught.value)


def test_safetensors_load_from_any_fsspec_address(
    state: State, images: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    fsspec.filesystem("memory").pipe_file("/weights-test/w.safetensors", safetensors.torch.save(state))
    for address in ("memory://weights-test/w.safetensors", save(tmp_path / "w.safetensors", state).as_uri()):
        torch.testing.assert_close(load_backbone("tiny", weights=address, cache=tmp_path)(images), expected)


def test_processes_that_start_together_fetch_once(server: Server, tmp_path: Path) -> None:
    data = os.urandom(2**20)
    (server.folder / "w.pth").write_bytes(data)
    code = (
        "import sys; from pathlib import Path; from ais.storage import Storage, fetch;"
        "print(*fetch(sys.argv[1], None, Storage(), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, f"{server.address}/w.pth", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (answer,) = answers
    path, digest = answer.split()
    assert Path(path).read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()
    assert server.fetched == {"/w.pth": 1}


def test_unreachable_published_weights_name_address_and_way_out(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/w.pth"
        with pytest.raises(StorageError) as caught:  # the same command may find it there
            load_backbone(published(address, None), cache=tmp_path)
    message = str(caught.value)
    assert address in message
    assert "give the address of a copy" in message
    assert "weights=random" in message


def test_vanished_remote_file_is_an_error_that_names_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"{server.address}/gone.pth' cannot be fetched"):
        fetch(f"{server.address}/gone.pth", None, Storage(), tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_backbone_without_published_weights_says_what_to_do() -> None:
    with pytest.raises(
        WeightsError, match="tiny has no published weights; give a file or weights='random' with a seed"
    ):
        load_backbone("tiny")
