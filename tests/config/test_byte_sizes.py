"""Sizes in bytes in a config."""

import pytest

from mlet_dist.config.byte_sizes import bytes_of, share_of

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


def test_percentages_are_shares() -> None:
    for number in range(1, 2000):
        assert share_of(f"{number / 10}%") == number / 1000
    assert (share_of("50%"), share_of(" 12.5 % "), share_of("0.07%"), share_of("150%")) == (0.5, 0.125, 0.0007, 1.5)
    assert {share_of(text) for text in ("%", "50", "-5%", "5e1%", "12GB", "5%%")} == {None}
