"""Finds batches whose loss or gradient is not finite, on all ranks at the same step, and skips them if asked to.

Ranks agree on their findings in an asynchronous all-reduce (``StepAgreement``) that is read one step later, so that
neither a rank nor a device waits for it; only the policy ``skip`` waits in every step.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed as dist
from torch.nn.utils import get_total_norm
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mlet_dist.errors import UserError
from mlet_dist.models.tables import row_prefixes
from mlet_dist.training.state import Training
from mlet_dist.training.step_agreement import StepAgreement

OnNonFinite = Literal["stop", "skip", "rollback"]

_ADVICE = "lower optimizer.learning_rate or the initial values"


@dataclass(frozen=True)
class Finding:
    """A batch that was found not to be finite.

    Attributes:
        step: the step that trained on it, counted from 1 over the whole run.
        what: ``loss`` or ``gradient``; ``earlier`` for a batch that was found before the run was rolled back.
        rank: the highest rank with such a loss; None for a gradient, which is combined over all ranks.
    """

    step: int
    what: Literal["loss", "gradient", "earlier"]
    rank: int | None = None

    def __str__(self) -> str:
        if self.what == "earlier":
            return f"the batch of step {self.step} was not finite before the run was rolled back"
        where = "" if self.rank is None else f" on rank {self.rank}"
        return f"the training {self.what} of step {self.step} is not finite{where}"


class NonFinite(UserError):
    """A loss or gradient is not finite, and weights may be spoiled; all ranks raise it between the same two steps."""

    def __init__(self, finding: Finding, advice: str = _ADVICE) -> None:
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


class Guard:
    """Checks every loss before backward, and the gradients after it.

    W1's rows are updated inside backward. A batch can therefore be skipped only because of its loss, and only if every
    rank knows about it before backward: the policy ``skip`` waits for that in every step. Under the other policies a
    loss is known after the following step and a gradient one step later, and nothing waits. Call ``flush`` before
    weights are saved or measured.

    The gradients checked are those of W2 and of the dense layers, combined over ranks. W1's gradients are never
    materialized, but one that is not finite has passed through those layers. The norm of the gradients is checked,
    because where it overflows Adagrad's squares overflow, too. Under ``stop`` only ``flush`` checks gradients, since
    the next step's losses reveal them as well.

    Args:
        training: the state of the run.
        device: the device of the losses.
        policy: ``skip`` skips batches because of their loss; everything else that is found raises, under every policy.
        limit: the number of batches of a run that may be skipped; one more raises.

    Attributes:
        skip_reason: why the batch whose loss was checked last is skipped, or None.
        agreement: the ranks' agreements, in which the guard takes part and which it starts and reads.
    """

    def __init__(self, training: Training, device: torch.device, policy: OnNonFinite, limit: int) -> None:
        self.skip_reason: Finding | None = None
        self.agreement = StepAgreement(device)
        self._training, self._policy, self._limit = training, policy, limit
        rows = row_prefixes(training.model)
        self._parameters = [
            parameter
            for name, parameter in in_backward_optimizer_filter(training.model.named_parameters())
            if not name.startswith(rows)
        ]
        self._rank_code = dist.get_rank() + 1
        self._no_failure = torch.zeros((), dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        """Drop all findings and pending agreements: the run is rolled back."""
        self._gradient = self._no_failure
        self.agreement.reset()
        self._findings: deque[Finding] = deque()

    def check_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss for backward; for a skipped batch, one that is connected to no weight. A collective call."""
        step, self.skip_reason = self._training.step + 1, None
        if step in self._training.excluded_steps:
            self.skip_reason = Finding(step, "earlier")
            self._start_agreement(step, self._no_failure)
        else:
            self._start_agreement(step, ~loss.detach().isfinite())
            if self._policy == "skip":
                self._read_until(step)
                if self._findings and self._findings[-1].what == "loss":
                    self.skip_reason = self._findings.pop()
        return loss if self.skip_reason is None else torch.zeros_like(loss, requires_grad=True)

    def check_gradients(self) -> None:
        """Check the gradients between backward and the optimizer step, without waiting for the result."""
        if self._policy != "stop":  # under stop the next loss reveals as much, at no cost
            self._check_gradient_norm()

    def check(self) -> None:
        """Raise what is known about earlier steps; called after each step, before it is counted.

        Raises:
            NonFinite: a loss or gradient was not finite, or too many batches were skipped; on every rank.
        """
        self._read_until(self._training.step)
        if self._findings:
            raise NonFinite(self._findings[0])
        if self.skip_reason is not None and self._training.skipped >= self._limit:
            raise NonFinite(
                self.skip_reason,
                f"{self._limit} batches were skipped before it, and train.non_finite_limit allows no more; {_ADVICE}",
            )

    def flush(self) -> None:
        """Wait for the findings of every step so far; called before weights are saved or measured. A collective call.

        Raises:
            NonFinite: a loss or gradient was not finite; on every rank.
        """
        next_step = self._training.step + 1
        self._check_gradient_norm()
        self._start_agreement(next_step, self._no_failure)
        self._read_until(next_step)
        if self._findings:
            raise NonFinite(self._findings[0])

    def _check_gradient_norm(self) -> None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # Without gradients, before the first step, the norm would be on the CPU, wherever the losses are.
        self._gradient = ~get_total_norm(gradients).isfinite() if gradients else self._no_failure

    def _start_agreement(self, step: int, loss: torch.Tensor) -> None:
        """Start to agree on the loss of ``step`` and on the gradient of the step before it; True is not finite."""
        codes = torch.stack([self._gradient, loss]).long() * self._rank_code
        self._gradient = self._no_failure
        self.agreement.start(step, codes)

    def _read_until(self, step: int) -> None:
        for of_step, gradient, loss in self.agreement.read_until(step):
            if gradient:
                self._findings.append(Finding(of_step - 1, "gradient"))
            if loss:
                self._findings.append(Finding(of_step, "loss", loss - 1))
