"""Products of many ablated rows with a weight, on a CPU: nothing that is zero for all rows, nothing twice.

On other devices everything here is the plain operation: what to leave out would have to be copied to the host first.

R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Copying a weight costs as much as multiplying it by this many rows (measured: 21 ms against 42 ms for 512 rows).
_ROWS_PER_COPY = 256
# Gathering rows and putting them back costs a twentieth of a product of VGG's size; see tests/benchmarks/LOG.md.
_WORTH_GATHERING = 0.9


class SkippingZeros(fx.Interpreter):
    """Runs a module with every linear layer by `skipping_zeros`."""

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        """Run the module, and hold on to none of its inputs afterwards."""
        try:
            return super().run(*args)
        finally:
            self.args_iter = iter(())

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one submodule."""
        module = self.fetch_attr(str(target))
        if type(module) is nn.Linear and args[0].ndim == 2:
            return skipping_zeros(module, args[0])
        return super().call_module(target, args, kwargs)


def skipping_zeros(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """Return ``linear(inputs)`` without multiplying what is zero in every row.

    After a ReLU the rows that belong to one image have most of their zeros in common: about two fifths with random
    weights, more with trained ones. The sum is the same but for the order of its terms. On other devices than the CPU,
    and where too little is saved, this is ``linear`` itself.

    Args:
        linear: the layer.
        inputs: ``(R, I)``.
    """
    if inputs.device.type != "cpu":
        return linear(inputs)
    if len(inputs) >= _ROWS_PER_COPY:
        live = inputs.any(0).nonzero()[:, 0]
        if not len(live):  # oneDNN knows no product over nothing
            rows = linear.weight.new_zeros(len(inputs), linear.out_features)
            return rows if linear.bias is None else rows + linear.bias
        saved = len(inputs) * (inputs.shape[1] - len(live))
        if saved > _ROWS_PER_COPY * len(live):
            return product(inputs.index_select(1, live), linear.weight.index_select(1, live), linear.bias)
    return product(inputs, linear.weight, linear.bias)


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``F.linear(inputs, weight, bias)``, computed by oneDNN on a CPU; not differentiable there.

    PyTorch multiplies float32 by MKL, which leaves half of the vector units of other processors than Intel's idle
    (measured on an AMD EPYC: 156 against 70 ms for 512 × 4096 × 4096). The operation is the one that
    ``torch.compile`` puts in the place of linear layers; where a build of PyTorch has none, ``F.linear`` does it.

    Args:
        inputs: ``(R, I)``.
        weight: ``(O, I)``.
        bias: ``(O,)``.
    """
    if inputs.device.type == "cpu" and inputs.dtype == torch.float32 and _ONEDNN is not None:
        product: Tensor = _ONEDNN(inputs, weight, bias, "none", [], "")
        return product
    return F.linear(inputs, weight, bias)


def _onednn() -> Callable[..., Tensor] | None:
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operation: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None
    return operation


_ONEDNN = _onednn()


def once_where_unmoved(run: Callable[[Tensor], Tensor], rows: Tensor, moved: Tensor) -> Tensor:
    """Return ``run(rows)``, of rows that are equal where nothing moved them.

    A feature map that is zero everywhere after its ReLU changes nothing when it is ablated: with trained weights many
    are for any one image.

    Args:
        run: works on each row alone.
        rows: ``(R, …)``.
        moved: ``(R,)`` bool; all rows that are not are equal.
    """
    kept = moved.nonzero()[:, 0]
    if rows.device.type != "cpu" or len(kept) > _WORTH_GATHERING * len(rows):
        return run(rows)
    one = (~moved).nonzero()[:1, 0]
    found = run(rows.index_select(0, torch.cat([one, kept])))
    place = torch.zeros(len(rows), dtype=torch.long)
    place[kept] = torch.arange(1, len(kept) + 1)
    return found.index_select(0, place)
