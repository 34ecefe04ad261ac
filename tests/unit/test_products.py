"""Products of many rows: what is left out changes nothing."""

import pytest
import torch
from torch import Tensor, nn

from ais import products
from ais.products import once_where_unmoved, product, skipping_zeros


@pytest.fixture(params=["oneDNN", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With PyTorch's operation, and as where a build has none."""
    if request.param == "without":
        monkeypatch.setattr(products, "_ONEDNN", None)
    else:
        assert products._ONEDNN is not None
    name: str = request.param
    return name


@pytest.mark.usefixtures("either")
@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 512])
def test_product(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 50, bias=bias)
    inputs = torch.randn(rows, 300)
    found = product(inputs, linear.weight, linear.bias)
    exact = linear.double()(inputs.double())
    # Measured 5e-7 of the largest value.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@torch.inference_mode()
def test_product_of_other_types_is_the_plain_one() -> None:
    linear = nn.Linear(30, 5).double()
    inputs = torch.randn(4, 30, dtype=torch.float64)
    assert torch.equal(product(inputs, linear.weight, linear.bias), linear(inputs))


@pytest.mark.usefixtures("either")
@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "live"), [(600, 20), (600, 300), (600, 0), (4, 20), (4, 0)])
def test_skipping_zeros(rows: int, live: int, bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(300, 50, bias=bias)
    inputs = torch.randn(rows, 300).relu()
    inputs[:, torch.randperm(300)[live:]] = 0
    found = skipping_zeros(linear, inputs)
    exact = linear.double()(inputs.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@torch.inference_mode()
def test_skipping_keeps_what_is_not_finite() -> None:
    linear = nn.Linear(300, 5)
    inputs = torch.zeros(600, 300)
    inputs[7, 3] = torch.nan
    found = skipping_zeros(linear, inputs)
    assert found[7].isnan().all()
    assert found[:7].isfinite().all()


@pytest.mark.parametrize("moving", [[], [0], [1, 4, 5], list(range(9)), list(range(10))])
def test_once_where_unmoved(moving: list[int]) -> None:
    rows = torch.full((10, 3), 0.5)
    rows[moving] = torch.arange(30.0).reshape(10, 3)[moving]
    moved = torch.zeros(10, dtype=torch.bool)
    moved[moving] = True
    worked_on = []

    def run(some: Tensor) -> Tensor:
        worked_on.append(len(some))
        return some.square()

    assert torch.equal(once_where_unmoved(run, rows, moved), rows.square())
    assert worked_on == [len(moving) + 1 if len(moving) < 10 else 10]
