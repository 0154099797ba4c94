"""How long a value has not changed, for a process that may be suspended itself in the meantime."""

import time


class Silence:
    """How long a value has not changed.

    Looks are counted as well as seconds, because time also passes for a process that was suspended, wakes up and has
    not looked since.

    Args:
        seconds: how long a value may stay the same.
        looks: how many looks in a row must find it the same.
    """

    def __init__(self, seconds: float, looks: int) -> None:
        self._limit, self._fewest = seconds, looks
        self._last: object = None
        self._since, self._looks = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """The seconds since the value was first seen as it is."""
        return time.monotonic() - self._since

    def is_too_long(self, value: object) -> bool:
        """Look at the value; return whether it has not changed for too long."""
        if value != self._last:
            self._last, self._since, self._looks = value, time.monotonic(), 0
        self._looks += 1
        return self._looks > self._fewest and self.seconds >= self._limit
