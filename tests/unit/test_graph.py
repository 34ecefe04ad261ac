"""The cut at a layer: which kind of tail is read off the graph, and that trunk and tail are the network.

Nothing is faked: the networks are small (tests/networks.py), the traps are those of real ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais.backbones import TailKind
from ais.backbones.graph import Channels, map_shapes, split_at
from ais.errors import BackboneError
from tests.networks import CASES, MAPS, SIDE, STEM, Rest, SmallNetwork, build


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_kind_of_the_tail_is_read_off_the_graph(name: str, images: Tensor) -> None:
    split = split_at(build(CASES[name]), "layer", images)
    assert split.kind is CASES[name].kind
    assert (split.coordinates is not None) == (split.kind is TailKind.CHANNELWISE)
    assert (split.linear is not None) == (split.kind is TailKind.LINEAR)


@pytest.mark.parametrize("name", CASES)
def test_trunk_then_tail_is_the_network(name: str, images: Tensor) -> None:
    network = build(CASES[name])
    split = split_at(network, "layer", images)
    with torch.no_grad():
        whole = network(images)
        maps, *context = split.trunk(images)
        assert torch.equal(maps, network.layer(torch.relu(network.stem(images))))
        assert torch.equal(split.tail(maps, *context), whole)


@pytest.mark.parametrize("name", CASES)
def test_tail_writes_into_none_of_its_inputs(name: str, images: Tensor) -> None:
    split = split_at(build(CASES[name]), "layer", images)
    with torch.no_grad():
        inputs = split.trunk(images)
        before = [value.clone() for value in inputs]
        split.tail(*inputs)
    assert all(torch.equal(value, kept) for value, kept in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind is TailKind.LINEAR])
def test_linear_tail_is_prefix_mix_suffix(name: str, images: Tensor) -> None:
    network = build(CASES[name])
    split = split_at(network, "layer", images)
    assert split.linear is not None
    with torch.no_grad():
        maps, *context = split.trunk(images)
        mixed = split.linear.mix(split.linear.prefix(maps, *context))
        torch.testing.assert_close(split.linear.suffix(mixed, *context), network(images))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batch norm, relu, pool", Channels(0)),
        ("end of a dense block", Channels(STEM)),
        ("flatten to linear", Channels(0, unit=16)),
        ("concatenate, flatten to linear", Channels(STEM * 9, unit=9)),
        ("convolution within a dense block", Channels(STEM)),
    ],
)
def test_where_the_maps_are(name: str, expected: Channels, images: Tensor) -> None:
    split = split_at(build(CASES[name]), "layer", images)
    assert (split.linear.channels if split.linear else split.coordinates) == expected


def test_in_place_modules_of_the_network_itself_stay_as_they_are(images: Tensor) -> None:
    network = build(CASES["in-place relu"])
    split_at(network, "layer", images)
    assert network.relu.inplace


def test_tail_shares_the_parameters_of_the_network(images: Tensor) -> None:
    network = build(CASES["flatten to linear"])
    split = split_at(network, "layer", images)
    with torch.no_grad():
        network.fc2.bias.add_(1)
        torch.testing.assert_close(split.tail(*split.trunk(images)), network(images))


def test_parameters_read_directly_are_part_of_the_tail(images: Tensor) -> None:
    network = SmallNetwork(lambda n, maps, _: maps.mean((2, 3)) * n.layer.bias, {}).eval()
    split = split_at(network, "layer", images)
    with torch.no_grad():
        assert len(split.trunk(images)) == 1
        torch.testing.assert_close(split.tail(*split.trunk(images)), network(images))


def test_cut_works_without_arithmetic_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = SmallNetwork(lambda n, maps, _: n.fc(torch.flatten(maps, 1)), {"fc": nn.Linear(MAPS * SIDE**2, 2)})
        split = split_at(network.eval(), "layer", torch.zeros(1, 3, SIDE, SIDE))
    assert split.kind is TailKind.LINEAR


def test_batch_norm_in_training_mode_mixes_images_and_admits_no_shortcut(images: Tensor) -> None:
    network = build(CASES["batch norm, relu, pool"]).train()
    assert split_at(network, "layer", images).kind is TailKind.GENERAL


def test_map_shapes_lists_every_module_and_removes_its_hooks(images: Tensor) -> None:
    network = build(CASES["flatten to linear"])
    assert map_shapes(network, images) == {
        "stem": (2, STEM, SIDE, SIDE),
        "layer": (2, MAPS, SIDE, SIDE),
        "pool": (2, MAPS, 4, 4),
        "fc1": (2, 10),
        "fc2": (2, 7),
    }
    assert not any(module._forward_hooks for module in network.modules())


def _branching(_network: SmallNetwork, maps: Tensor, _before: Tensor) -> Tensor:
    return maps.mean((2, 3)) if maps.sum() > 0 else maps.amax((2, 3))


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (lambda n, maps, before: (maps + n.layer(before)).mean((2, 3)), "called 2 times"),
        (_branching, "cannot be traced"),
        (lambda _n, _maps, before: before.mean((2, 3)), "does not depend on layer 'layer'"),
        (lambda _n, maps, _before: (maps.mean((2, 3)), maps), "must return one tensor"),
        (lambda _n, maps, before: maps.reshape(before.shape[0], -1), "not a batch of tensors"),
        (lambda n, maps, _: (maps * n.layer.bias.view(1, -1, 1, 1)).mean((2, 3)), "'view', which is not a batch"),
        (lambda _n, maps, _before: maps.relu_().mean((2, 3)), "overwrites values by 'relu_'"),
        (lambda _n, maps, _before: F.relu_(maps).mean((2, 3)), "overwrites values by 'relu_'"),
    ],
)
def test_refused_with_the_reason(rest: Rest, reason: str, images: Tensor) -> None:
    with pytest.raises(BackboneError) as caught:
        split_at(SmallNetwork(rest, {}).eval(), "layer", images)
    assert reason in str(caught.value)
