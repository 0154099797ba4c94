"""Kubernetes's quantities, such as 500m and 16Gi, as numbers."""

_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | int) -> float:
    """Return the value of a quantity, in cores, bytes or pieces."""
    number = str(text).rstrip("mkMGTi")
    return float(number) * _UNITS.get(str(text)[len(number) :], 1)
