"""Tests of mlet_dist.urls."""

from pathlib import Path

from mlet_dist.urls import is_url, no_such_directory


def test_urls_are_told_from_paths() -> None:
    assert [is_url(text) for text in ("s3://bucket/a", "memory://a", "/a/b", "a:b", "C:/a")] == [
        True,
        True,
        *3 * [False],
    ]


def test_a_url_in_place_of_a_directory_is_said_to_be_one() -> None:
    assert no_such_directory(Path("s3://bucket/run")).startswith("is a URL, but this must be a local directory")
    assert no_such_directory(Path("runs/a:b")) == "no such directory"
