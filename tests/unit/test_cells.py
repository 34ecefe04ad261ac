"""Where cells look: the arithmetic against gradients of the real networks. Nothing is faked.

The slow, obvious twin: make every convolution a plain average of its window (all weights equal, no bias, no activation
or normalisation in between), and the gradient of one output cell with respect to the input is its receptive field,
whose centre of mass is what the cell looks at. Only cells whose field lies within the image are compared, hence the
larger inputs.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais.backbones import get_spec, inspect_layer
from ais.backbones.cells import Cells, follow_cells
from ais.heatmaps import heatmap_boxes


def averaged(network: nn.Module) -> nn.Module:
    """The same network with windows that average and nothing else."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                nn.init.constant_(child.weight, 1 / child.weight[0].numel())
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.BatchNorm2d | nn.ReLU | nn.SiLU):
                setattr(module, name, nn.Identity())
    return network


def field_centre(network: nn.Module, layer: str, side: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Cell in the middle of a map, centre of mass of its gradient (y, x), and the map's shape."""
    found: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda _m, _i, output: found.append(output))
    images = torch.ones(1, 3, side, side, requires_grad=True)
    network(images)
    handle.remove()
    shape = found[0].shape[2:]
    cell = (shape[0] // 2, shape[1] // 2)
    (gradient,) = torch.autograd.grad(found[0][0, :, cell[0], cell[1]].sum(), images)
    weight = gradient[0].double().sum(0).numpy()
    y, x = np.indices(weight.shape)
    return cell, np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum(), np.array(shape)


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("resnet152", "features.4.2.conv3", 224),
        ("resnet152", "features.5.1.conv2", 320),
        ("barlow_twins", "features.7.2.conv3", 1280),
        ("vgg16", "features.28", 512),
        ("densenet161", "features.denseblock2.denselayer2.conv2", 256),
        ("densenet161", "features.denseblock3.denselayer1.conv2", 640),
    ],
)
def test_arithmetic_equals_gradients(name, layer, side):
    """Measured worst difference 7e-6 pixels in float32 (1e-13 in float64, six times slower); offsets are of halves."""
    spec = get_spec(name)
    network = averaged(spec.adapt(spec.build()).eval())
    cells = follow_cells(network, layer, torch.zeros(1, 3, side, side))
    assert cells is not None
    cell, centre, _ = field_centre(network, layer, side)
    expected = np.array(cells.first) + np.array(cells.stride) * cell
    np.testing.assert_allclose(centre, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "extent"),
    [
        ("vgg16", (0.0, 0.0, 224.0, 224.0)),
        ("vgg19", (0.0, 0.0, 224.0, 224.0)),
        ("resnet152", (-15.5, -15.5, 208.5, 208.5)),
        ("barlow_twins", (-15.5, -15.5, 208.5, 208.5)),
        ("densenet161", (-1.5, -1.5, 222.5, 222.5)),
        ("efficientnet_b3", (-15.5, -15.5, 240.5, 240.5)),
    ],
)
def test_extent_of_the_default_layers(name, extent):
    """By hand. A 3×3 convolution of stride 2 and padding 1 adds (1 - 1) strides, a 2×2 pool half a stride."""
    info = inspect_layer(get_spec(name))
    assert info is not None
    assert info.extent == extent


def test_one_window_by_hand():
    start = Cells((1.0, 1.0), (0.0, 0.0))
    assert start.after(nn.MaxPool2d(2)) == Cells((2, 2), (0.5, 0.5))
    assert start.after(nn.Conv2d(1, 1, 7, stride=2, padding=3)) == Cells((2, 2), (0, 0))
    assert start.after(nn.Conv2d(1, 1, (3, 5), dilation=(2, 1))) == Cells((1, 1), (2, 2))
    assert start.after(nn.Conv2d(1, 1, 3, padding="same")) is None
    # Four pools of 2: cells of 16 pixels, which tile the image from its edge.
    cells = start
    for _ in range(4):
        cells = cells.after(nn.MaxPool2d(2))
        assert cells is not None
    assert cells.extent(14, 14) == (0, 0, 224, 224)


class Resizing(nn.Module):
    """A convolution of stride 2, an operation on its maps, and another convolution."""

    def __init__(self, operation):
        super().__init__()
        self.before = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.operation = operation
        self.after = nn.LazyConv2d(4, 1)

    def forward(self, images):
        return self.after(self.operation(self.before(images)))


@pytest.mark.parametrize(
    "operation",
    [
        lambda maps: F.max_pool2d(maps, 2),
        lambda maps: F.interpolate(maps, scale_factor=2),
        lambda maps: F.pad(maps, (0, 1, 0, 1)),
        lambda maps: maps[:, :, ::2, ::2],
        lambda maps: maps + F.interpolate(F.avg_pool2d(maps, 2), scale_factor=2),
        nn.AdaptiveAvgPool2d(8),
        nn.Upsample(scale_factor=2),
        nn.PixelUnshuffle(2),
    ],
)
def test_grid_is_lost_where_maps_are_resized_in_unknown_ways(operation):
    network, images = Resizing(operation), torch.zeros(1, 3, 64, 64)
    network(images)
    assert follow_cells(network, "before", images) == Cells((2, 2), (0, 0))
    assert follow_cells(network, "after", images) is None


@pytest.mark.parametrize(
    "operation",
    [
        lambda maps: F.max_pool2d(maps, 3, 1, 1),
        lambda maps: maps * maps.mean((2, 3), keepdim=True).sigmoid(),
        lambda maps: maps.view(maps.size(0), 2, 4, 32, 32).transpose(1, 2).reshape(maps.shape),
        nn.AdaptiveAvgPool2d(32),
    ],
)
def test_grid_is_kept_by_what_keeps_the_size(operation):
    network, images = Resizing(operation), torch.zeros(1, 3, 64, 64)
    network(images)
    assert follow_cells(network, "after", images) == Cells((2, 2), (0, 0))


def test_boxes_on_originals():
    """A crop of twice the input's resolution, from (10, 20): 15.5 input pixels are 31 of the original."""
    boxes = heatmap_boxes(np.array([[10.0, 20.0, 458.0, 468.0]]), (-15.5, -15.5, 208.5, 208.5), 224)
    np.testing.assert_array_equal(boxes, np.array([[-21, -11, 427, 437]], np.float32))
