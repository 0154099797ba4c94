"""Batches whose loss or gradient is not finite: every rank hears of them, and a batch to be skipped trains nothing."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed as dist
from torch.nn.utils import get_total_norm
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mlet_dist.embeddings.agreement import Agreement
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX

OnNonFinite = Literal["stop", "skip", "rollback"]

_ADVICE = "lower optimizer.learning_rate or the initial values"


@dataclass(frozen=True)
class Finding:
    """What is wrong with a batch.

    Attributes:
        step: its place among the batches of the run, from 1.
        what: ``loss`` or ``gradient``; ``earlier`` is a batch that was found before the run went back.
        rank: the last rank with such a loss; None for a gradient, which is that of all ranks.
    """

    step: int
    what: Literal["loss", "gradient", "earlier"]
    rank: int | None = None

    def __str__(self) -> str:
        if self.what == "earlier":
            return f"the batch of step {self.step} was not finite before the run went back"
        where = "" if self.rank is None else f" on rank {self.rank}"
        return f"the training {self.what} of step {self.step} is not finite{where}"


class NonFinite(UserError):
    """A loss or gradient is not finite and weights may be spoiled; raised by every rank, between the same two steps."""

    def __init__(self, finding: Finding, advice: str = _ADVICE) -> None:
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


class Guard:
    """Looks at every loss before backward, and at the gradients after it.

    Rows are updated inside backward, so a batch can be skipped only for its loss, and only where every rank has heard
    of it before: under ``skip`` each step waits for that. Under the other policies what is found in a step is read
    after the next one, and neither a rank nor a device is waited for. Before weights are saved, ``settle``.

    The gradients are those of W2 and of the dense layers, combined over ranks. W1's are never at hand; one that is not
    finite has come through those layers. Their norm counts: where it overflows, Adagrad's squares do, too.

    Args:
        model: sharded.
        device: of the losses.
        policy: ``skip`` skips batches for their loss; whatever else is found is raised, under every policy.
        limit: batches of a run that may be skipped; one more is raised.
        step: batches that the run has taken before.
        skipped: how many of those were skipped.
        passed_over: steps whose batches are skipped whatever they hold.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        device: torch.device,
        policy: OnNonFinite = "stop",
        *,
        limit: int = 10,
        step: int = 0,
        skipped: int = 0,
        passed_over: Collection[int] = (),
    ) -> None:
        self.skipped = skipped
        self.refused: Finding | None = None
        self._policy, self._limit, self._step, self._passed_over = policy, limit, step, passed_over
        self._parameters = [
            parameter
            for name, parameter in in_backward_optimizer_filter(model.named_parameters())
            if not name.startswith(f"{TABLES_PREFIX}embedding_bags.")
        ]
        self._code = dist.get_rank() + 1
        self._well = torch.zeros((), dtype=torch.bool, device=device)
        self._gradient = self._well
        self._asked: deque[tuple[int, Agreement]] = deque()
        self._found: deque[Finding] = deque()

    def admit(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss for backward; of a batch then ``refused``, one that leads to no weight. A collective call."""
        self._step += 1
        self.refused = None
        if self._step in self._passed_over:
            self.refused = Finding(self._step, "earlier")
            self._ask(self._step, self._well)
        else:
            self._ask(self._step, ~loss.detach().isfinite())
            if self._policy == "skip":
                self._hear_of(self._step)
                if self._found and self._found[-1].what == "loss":
                    self.refused = self._found.pop()
        if self.refused is None:
            return loss
        self.skipped += 1
        return torch.zeros_like(loss, requires_grad=True)

    def look_at_gradients(self) -> None:
        """Between backward and the optimizer's step; waits for nothing."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._gradient = ~get_total_norm(gradients).isfinite()

    def check(self) -> None:
        """After each step: what is known of the steps before it.

        Raises:
            NonFinite: a loss or gradient was not finite, or too many batches were skipped; on every rank.
        """
        self._hear_of(self._step - 1)
        if self._found:
            raise NonFinite(self._found[0])
        if self.refused is not None and self.skipped > self._limit:
            raise NonFinite(self.refused, f"{self._limit} batches were skipped before it, as many as may be; {_ADVICE}")

    def settle(self) -> None:
        """Before weights are saved or measured: what is wrong with any step so far. A collective call.

        Raises:
            NonFinite: as ``check``.
        """
        self._ask(self._step + 1, self._well)
        self._hear_of(self._step + 1)
        self.check()

    def _ask(self, step: int, loss: torch.Tensor) -> None:
        """Agree on the loss of a step and on the gradient of the step before it."""
        codes = torch.stack([self._gradient, loss]).long() * self._code
        self._gradient = self._well
        self._asked.append((step, Agreement(codes, None)))

    def _hear_of(self, step: int) -> None:
        while self._asked and self._asked[0][0] <= step:
            asked, agreement = self._asked.popleft()
            gradient, loss = agreement.read()
            if gradient:
                self._found.append(Finding(asked - 1, "gradient"))
            if loss:
                self._found.append(Finding(asked, "loss", loss - 1))
