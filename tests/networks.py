"""Small networks, one for each thing that can follow a layer, and batch norms that do something.

Each is a stem, the layer (6 maps) and a rest; what the rest does is the point.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais.backbones import Backbone, BackboneSpec, TailKind, load_backbone

STEM, MAPS, SIDE = 5, 6, 12

Rest = Callable[["SmallNetwork", Tensor, Tensor], Tensor]


class SmallNetwork(nn.Module):
    """``(B, 3, SIDE, SIDE) -> (B, D)`` through ``stem``, ``layer`` and ``rest(self, maps, stem's output)``."""

    def __init__(self, rest: Rest, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, padding=1)
        self.layer = nn.Conv2d(STEM, MAPS, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.rest = rest

    def forward(self, images: Tensor) -> Tensor:
        before = torch.relu(self.stem(images))
        return self.rest(self, self.layer(before), before)


@dataclass(frozen=True)
class SmallCase:
    """A rest, the modules it uses, and what its graph admits."""

    kind: TailKind
    rest: Rest
    modules: Callable[[], dict[str, nn.Module]]


def _pooled(maps: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(maps, 1), 1)


CHANNELWISE, LINEAR, GENERAL = TailKind.CHANNELWISE, TailKind.LINEAR, TailKind.GENERAL

CASES: dict[str, SmallCase] = {
    "batch norm, relu, pool": SmallCase(
        CHANNELWISE,
        lambda n, maps, _: _pooled(torch.relu(n.norm(maps))),
        lambda: {"norm": nn.BatchNorm2d(MAPS)},
    ),
    "functions": SmallCase(
        CHANNELWISE,
        lambda _n, maps, _: F.adaptive_max_pool2d(F.avg_pool2d(F.silu(F.max_pool2d(maps, 2)), 2), 1).flatten(1),
        dict,
    ),
    "in-place relu": SmallCase(
        CHANNELWISE, lambda n, maps, _: _pooled(n.relu(maps)), lambda: {"relu": nn.ReLU(inplace=True)}
    ),
    "in-place relu function": SmallCase(CHANNELWISE, lambda _n, maps, _: _pooled(F.relu(maps, True)), dict),
    "dropout": SmallCase(
        CHANNELWISE,
        lambda n, maps, _: _pooled(n.dropout(n.relu(maps))),
        lambda: {"dropout": nn.Dropout2d(0.5), "relu": nn.SiLU(inplace=True)},
    ),
    "end of a residual block": SmallCase(
        CHANNELWISE,
        lambda n, maps, before: _pooled(n.relu(n.norm(maps) + n.project(before))),
        lambda: {
            "norm": nn.BatchNorm2d(MAPS),
            "project": nn.Conv2d(STEM, MAPS, 1),
            "relu": nn.ReLU(inplace=True),
        },
    ),
    "end of a dense block": SmallCase(
        CHANNELWISE,
        lambda n, maps, before: _pooled(n.relu(n.norm(torch.cat([before, maps], 1)))),
        lambda: {"norm": nn.BatchNorm2d(STEM + MAPS), "relu": nn.ReLU(inplace=True)},
    ),
    "flatten to linear": SmallCase(
        LINEAR,
        lambda n, maps, _: n.fc2(torch.relu(n.fc1(torch.flatten(n.pool(torch.relu(maps)), 1)))),
        lambda: {"pool": nn.MaxPool2d(3), "fc1": nn.Linear(MAPS * 16, 10), "fc2": nn.Linear(10, 7)},
    ),
    "concatenate, flatten to linear": SmallCase(
        LINEAR,
        lambda n, maps, before: torch.tanh(n.fc(n.flatten(n.pool(torch.cat([before, maps, before], 1))))),
        lambda: {
            "pool": nn.AvgPool2d(4),
            "flatten": nn.Flatten(),
            "fc": nn.Linear((2 * STEM + MAPS) * 9, 7),
        },
    ),
    "strided, dilated, padded convolution": SmallCase(
        LINEAR,
        lambda n, maps, _: _pooled(n.relu(n.norm(n.conv(n.relu(maps))))),
        lambda: {
            "conv": nn.Conv2d(MAPS, 9, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 3)),
            "norm": nn.BatchNorm2d(9),
            "relu": nn.ReLU(inplace=True),
        },
    ),
    "convolution within a residual block": SmallCase(
        LINEAR,
        lambda n, maps, before: _pooled(n.relu(n.norm2(n.conv(n.relu(n.norm1(maps)))) + before)),
        lambda: {
            "norm1": nn.BatchNorm2d(MAPS),
            "conv": nn.Conv2d(MAPS, STEM, 1, bias=False),
            "norm2": nn.BatchNorm2d(STEM),
            "relu": nn.ReLU(inplace=True),
        },
    ),
    "convolution within a dense block": SmallCase(
        LINEAR,
        lambda n, maps, before: _pooled(
            torch.cat([before, n.conv(torch.relu(n.norm(torch.cat([before, maps], 1))))], 1)
        ),
        lambda: {"norm": nn.BatchNorm2d(STEM + MAPS), "conv": nn.Conv2d(STEM + MAPS, 4, 3, padding=1)},
    ),
    "two paths": SmallCase(
        GENERAL,
        lambda n, maps, _: _pooled(torch.relu(n.conv(torch.relu(maps)) + maps)),
        lambda: {"conv": nn.Conv2d(MAPS, MAPS, 3, padding=1)},
    ),
    "two convolutions side by side": SmallCase(
        GENERAL,
        lambda n, maps, _: _pooled(torch.cat([n.left(maps), n.right(maps)], 1)),
        lambda: {"left": nn.Conv2d(MAPS, 4, 1), "right": nn.Conv2d(MAPS, 3, 3, padding=1)},
    ),
    "squeeze and excitation": SmallCase(
        GENERAL,
        lambda n, maps, _: _pooled(maps * torch.sigmoid(n.excite(F.adaptive_avg_pool2d(maps, 1)))),
        lambda: {"excite": nn.Conv2d(MAPS, MAPS, 1)},
    ),
    "grouped convolution": SmallCase(
        GENERAL,
        lambda n, maps, _: _pooled(torch.relu(n.conv(maps))),
        lambda: {"conv": nn.Conv2d(MAPS, 8, 3, groups=2)},
    ),
    "circular convolution": SmallCase(
        GENERAL,
        lambda n, maps, _: _pooled(torch.relu(n.conv(maps))),
        lambda: {"conv": nn.Conv2d(MAPS, 8, 3, padding=1, padding_mode="circular")},
    ),
    "centred over channels": SmallCase(
        GENERAL, lambda _n, maps, _: _pooled(torch.relu(maps - maps.mean(1, keepdim=True))), dict
    ),
    "concatenated twice": SmallCase(GENERAL, lambda _n, maps, _: _pooled(torch.cat([maps, maps.sigmoid()], 1)), dict),
}


def build(case: SmallCase) -> SmallNetwork:
    """Make the network in eval mode, with batch norms that do something."""
    network = SmallNetwork(case.rest, case.modules()).eval()
    randomise_batch_norms(network)
    return network


def small_backbone(name: str, seed: int = 0) -> Backbone:
    """Load a case of `CASES` as a backbone in float64, as `ais.load_backbone` loads any other."""
    factory = functools.partial(build, CASES[name])
    with torch.no_grad():
        size = factory()(torch.zeros(1, 3, SIDE, SIDE)).shape[1]
    spec = BackboneSpec(
        name=name,
        build=factory,
        adapt=lambda network: network,
        published=None,
        input_size=SIDE,
        resize_size=SIDE,
        interpolation="bilinear",
        layer="layer",
        map_shape=(MAPS, SIDE, SIDE),
        embedding_size=size,
        tail=CASES[name].kind,
    )
    return load_backbone(spec, weights="random", seed=seed).double()


def randomise_batch_norms(network: nn.Module, seed: int = 0) -> None:
    """Give every batch norm statistics and affine parameters as training leaves them: none 0, none 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                device = module.weight.device
                for tensor, low, high in (
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.7, 1.4),
                    (module.weight, 0.7, 1.3),
                    (module.bias, -0.2, 0.2),
                ):
                    assert tensor is not None
                    values = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
                    tensor.copy_(values.to(device))
