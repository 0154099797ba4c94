"""What the ranks agree on without waiting for one another."""

import torch
from torch import distributed as dist


class Agreement:
    """The largest code that a rank has, of each kind. A collective call; it is waited for when it is read.

    Args:
        codes: ``(n,)`` int64, overwritten; on the device of the process group.
        process_group: the ranks.
    """

    def __init__(self, codes: torch.Tensor, process_group: dist.ProcessGroup | None) -> None:
        self._codes = codes
        self._work = self._copied = None
        if dist.get_world_size(process_group) > 1:
            self._work = dist.all_reduce(codes, dist.ReduceOp.MAX, group=process_group, async_op=True)
        if codes.is_cuda:
            # The copy is ordered behind the all-reduce here, so that reading it waits for no other stream's work.
            if self._work is not None:
                self._work.wait()
            self._work = None
            self._codes = torch.empty_like(codes, device="cpu", pin_memory=True).copy_(codes, non_blocking=True)
            self._copied = torch.cuda.current_stream(codes.device).record_event()

    def read(self) -> list[int]:
        """The codes, once the other ranks' have come; other work of a device is not waited for."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        self._work = self._copied = None
        return self._codes.tolist()
