"""No two series of a chart look the same."""

from mlet_dist.pages.series_looks import LOOKS, looks, named


def test_as_many_series_as_there_are_looks_differ_in_their_marks_their_lines_and_the_key() -> None:
    found = list(looks([f"arm {index}" for index in range(LOOKS)]).values())
    assert LOOKS == 64
    for shown in ("marks", "line", "svg"):
        assert len({str(getattr(look, shown)) for look in found}) == LOOKS
    assert {look.number for look in found} == {None}


def test_more_series_have_numbers() -> None:
    entries = named([f"arm {index}" for index in range(LOOKS + 1)])
    assert [look.number for _, look in entries] == list(range(1, LOOKS + 2))
    assert (entries[0][0], entries[-1][0]) == ("1: arm 0", f"{LOOKS + 1}: arm {LOOKS}")
