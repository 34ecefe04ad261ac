"""The fit of one head, epoch by epoch; one process of several, or the only one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

from ais.config import FitConfig, HeadConfig
from ais.heads import RegressionHead
from ais.training.splits import Split
from ais.training.standardisation import Standardisation

_VALIDATION_ROWS = 4096


class VariantFit:
    """Fits head k: Adam on the mean squared error, stopped early by the validation RMSE, best state kept.

    Every process holds the same embeddings and takes its share of each batch. The gradient is that of the whole batch
    however many processes there are. Initial weights, order and dropout follow from seed, variant, epoch and rank
    alone, so that a fit taken up from `state` goes on as if it had not stopped.

    Args:
        variant: k.
        split: rows of ``embeddings`` to train and to validate on.
        embeddings: ``(P, D)`` float32 on the CPU.
        scores: ``(P,)`` in rating units.
        head: the head's sizes.
        fit: how to fit.
        wrap: puts the head on its device and lets processes share gradients; the identity for one process.
        device: where the head is put.
    """

    def __init__(
        self,
        variant: int,
        split: Split,
        embeddings: NDArray[np.float32],
        scores: NDArray[np.float64],
        head: HeadConfig,
        fit: FitConfig,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        self.variant = variant
        self._split = split
        self._fit = fit
        self._device = device
        self._standardisation = Standardisation.of(embeddings, scores, split.train)
        self._embeddings = torch.from_numpy(embeddings).to(device)
        self._targets = torch.from_numpy(self._standardisation.targets(scores)).to(device)
        self._rank, self._world = 0, 1
        if torch.distributed.is_initialized():
            self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._seed_torch(epoch=0, rank=0)
        self._head = RegressionHead(embeddings.shape[1], head.hidden, head.dropout)
        self._model = wrap(self._head)
        self._optimiser = torch.optim.Adam(self._head.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
        self._best = self._copy_of_head()
        self.best_epoch = 0
        self.train_rmse: list[float] = []
        self.validation_rmse: list[float] = []

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.validation_rmse)

    @property
    def best_rmse(self) -> float:
        """The validation RMSE of the best epoch; infinite before the first."""
        return self.validation_rmse[self.best_epoch - 1] if self.best_epoch else float("inf")

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or patience is."""
        return self.epoch >= self._fit.epochs or self.epoch - self.best_epoch >= self._fit.patience

    def run_epoch(self) -> None:
        """Train on every training image once, then validate; both errors are in rating units."""
        epoch = self.epoch + 1
        self._seed_torch(epoch, self._rank)
        order = np.random.default_rng([self._fit.seed + self.variant, 2, epoch]).permutation(self._split.train)
        self._model.train()
        squared_error = torch.zeros((), dtype=torch.float64, device=self._device)
        for start in range(0, len(order), self._fit.batch_size):
            batch = order[start : start + self._fit.batch_size]
            errors = self._errors(self._model, batch[self._rank :: self._world])
            # DDP averages gradients over processes, whose shares differ in size and may be empty.
            loss = errors.square().sum() * (self._world / len(batch))
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            squared_error += errors.detach().double().square().sum()
        self.train_rmse.append(self._rmse(squared_error, len(order)))
        self.validation_rmse.append(self._validate())
        if self.validation_rmse[-1] < self.best_rmse:
            self.best_epoch, self._best = epoch, self._copy_of_head()

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: tensors, numbers and lists."""
        return {
            "head": self._copy_of_head(),
            "best": self._best,
            "optimiser": self._optimiser.state_dict(),
            "best_epoch": self.best_epoch,
            "train_rmse": list(self.train_rmse),
            "validation_rmse": list(self.validation_rmse),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Take up a fit where `state` was called."""
        self._head.load_state_dict(state["head"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.train_rmse, self.validation_rmse = list(state["train_rmse"]), list(state["validation_rmse"])

    def best_head(self) -> RegressionHead:
        """Return the best head, for raw embeddings and rating units, on the CPU."""
        head = RegressionHead(self._head.in_features, self._head.hidden.out_features, self._head.dropout.p)
        head.load_state_dict(self._best)
        return self._standardisation.fold(head)

    @torch.no_grad()
    def _validate(self) -> float:
        self._model.eval()
        mine = self._split.validation[self._rank :: self._world]
        squared_error = torch.zeros((), dtype=torch.float64, device=self._device)
        for start in range(0, len(mine), _VALIDATION_ROWS):
            squared_error += self._errors(self._head, mine[start : start + _VALIDATION_ROWS]).double().square().sum()
        return self._rmse(squared_error, len(self._split.validation))

    def _errors(self, model: nn.Module, rows: NDArray[np.intp]) -> Tensor:
        index = torch.from_numpy(rows).to(self._device)
        predicted: Tensor = model(self._standardisation.inputs(self._embeddings[index]))
        return predicted - self._targets[index]

    def _rmse(self, squared_error: Tensor, count: int) -> float:
        """Root of the mean over all processes, the same number in each, in rating units."""
        if self._world > 1:
            torch.distributed.all_reduce(squared_error)
        return float((squared_error / count).sqrt()) * self._standardisation.target_scale

    def _seed_torch(self, epoch: int, rank: int) -> None:
        entropy = [self._fit.seed + self.variant, 3, epoch, rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _copy_of_head(self) -> dict[str, Tensor]:
        return {key: value.detach().cpu().clone() for key, value in self._head.state_dict().items()}
