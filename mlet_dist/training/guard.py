"""Batches whose loss or gradient is not finite: every rank hears of them, and a batch to be skipped trains nothing."""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed as dist
from torch.nn.utils import get_total_norm
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mlet_dist.embeddings.sharded.collectives import Agreement
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.training.state import Training

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
    of it before: under ``skip`` each step waits for that. Under the other policies a loss is known of
    after the step that follows, and a gradient one later: neither a rank nor a device is waited for. Before weights are
    saved, ``settle``.

    The gradients are those of W2 and of the dense layers, combined over ranks. W1's are never at hand; one that is not
    finite has come through those layers. Their norm counts: where it overflows, Adagrad's squares do, too.
    Under ``stop`` only ``settle`` looks at them, since the next step's losses show it as well.

    Args:
        training: the run.
        device: of the losses.
        policy: ``skip`` skips batches for their loss; whatever else is found is raised, under every policy.
        limit: batches of a run that may be skipped; one more is raised.

    Attributes:
        refused: why the batch whose loss was admitted last is skipped, or None.
    """

    def __init__(self, training: Training, device: torch.device, policy: OnNonFinite, limit: int) -> None:
        self.refused: Finding | None = None
        self._training, self._policy, self._limit = training, policy, limit
        self._parameters = [
            parameter
            for name, parameter in in_backward_optimizer_filter(training.model.named_parameters())
            if not name.startswith(f"{TABLES_PREFIX}embedding_bags.")
        ]
        self._code = dist.get_rank() + 1
        self._well = torch.zeros((), dtype=torch.bool, device=device)
        self.forget()

    def forget(self) -> None:
        """Drop what was found: the run goes back."""
        self._gradient = self._well
        self._asked: deque[tuple[int, Agreement]] = deque()
        self._found: deque[Finding] = deque()

    def admit(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss for backward; of a batch then ``refused``, one that leads to no weight. A collective call."""
        step, self.refused = self._training.step + 1, None
        if step in self._training.passed_over:
            self.refused = Finding(step, "earlier")
            self._ask(step, self._well)
        else:
            self._ask(step, ~loss.detach().isfinite())
            if self._policy == "skip":
                self._hear_of(step)
                if self._found and self._found[-1].what == "loss":
                    self.refused = self._found.pop()
        return loss if self.refused is None else torch.zeros_like(loss, requires_grad=True)

    def look_at_gradients(self) -> None:
        """Between backward and the optimizer's step; waits for nothing."""
        if self._policy != "stop":  # there the loss that follows tells as much, for nothing
            self._look()

    def check(self) -> None:
        """After a step, before it is counted: what is known of the steps before it.

        Raises:
            NonFinite: a loss or gradient was not finite, or too many batches were skipped; on every rank.
        """
        self._hear_of(self._training.step)
        if self._found:
            raise NonFinite(self._found[0])
        if self.refused is not None and self._training.skipped >= self._limit:
            raise NonFinite(self.refused, f"{self._limit} batches were skipped before it, as many as may be; {_ADVICE}")

    def settle(self) -> None:
        """Before weights are saved or measured: what is wrong with any step so far. A collective call.

        Raises:
            NonFinite: a loss or gradient was not finite; on every rank.
        """
        following = self._training.step + 1
        self._look()
        self._ask(following, self._well)
        self._hear_of(following)
        if self._found:
            raise NonFinite(self._found[0])

    def _look(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._gradient = ~get_total_norm(gradients).isfinite()

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
