"""Sizes in bytes in a config."""

import pytest

from mlet_dist.config.byte_sizes import bytes_of

SIZES = {
    "500B": 500,
    "12GB": 12 * 10**9,
    "1.5 MB": 1_500_000,
    "4GiB": 4 << 30,
    " 2kib ": 2048,
    "3tb": 3 * 10**12,
}


@pytest.mark.parametrize("text", SIZES)
def test_units_are_decimal_or_binary(text: str) -> None:
    assert bytes_of(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["12G", "12", "GB", "0GB", "0.1B", "-1GB", "1e3MB", "1,000MB", "12iB", "12GB of it", "infGB"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size; write a number above 0 and one of B, KB, MB, .*, TiB$"):
        bytes_of(text)
