"""Sizes in bytes as a config writes them: a number with a unit, such as 12GB, or a share of another, such as 50%."""

import re
from typing import NewType

ByteSize = NewType("ByteSize", str)
"""A text that ``bytes_of`` reads."""

UNITS = {"B": 1} | {
    f"{prefix}{ending}": base**power
    for ending, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}
"""Bytes of each unit: KB, MB, GB and TB are powers of 1,000, and KiB, MiB, GiB and TiB powers of 1,024."""

_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?) ?%")
_PATTERN = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)", re.IGNORECASE)
_UNIT_OF = {unit.lower(): size for unit, size in UNITS.items()}


def bytes_of(text: str) -> int:
    """Return the bytes of a size such as ``12GB`` or ``1.5 GiB``; lower and upper case are the same.

    Raises:
        ValueError: it is not a number above 0 with one of ``UNITS``.
    """
    found = _PATTERN.fullmatch(text.strip())
    size = 0 if found is None else int(float(found[1]) * _UNIT_OF.get(found[2].lower(), 0))
    if size < 1:
        raise ValueError(f"{text!r} is not a size; write a number above 0 and one of {', '.join(UNITS)}")
    return size


_FACTOR = re.compile(r"(\d+(?:\.\d+)?) ?x", re.IGNORECASE)


def bytes_within(text: str, whole: int) -> int:
    """Return the bytes of a size, a percentage of ``whole`` bytes, or ``12x``: a twelfth of them.

    Raises:
        ValueError: it is none of these, or less than a byte.
    """
    share, factor = share_of(text), _FACTOR.fullmatch(text.strip())
    if factor is not None and float(factor[1]):
        share = 1 / float(factor[1])
    if share is None:
        return bytes_of(text)
    if int(share * whole) < 1:
        raise ValueError(f"{text!r} of {whole:,} bytes is less than a byte")
    return int(share * whole)


def share_of(text: str) -> float | None:
    """Return the share that a percentage such as ``50%`` or ``12.5 %`` is; None for any other text."""
    found = _PERCENTAGE.fullmatch(text.strip())
    return None if found is None else float(f"{found[1]}e-2")
