"""Tells URLs from local paths."""

import re


def is_url(location: str) -> bool:
    """Return whether the text is a URL, such as s3://bucket/data, and not a path."""
    return "://" in location


def no_such_directory(path: object) -> str:
    """Return why a local directory does not exist; a URL, of which ``Path`` keeps one slash, is said to be one."""
    if re.match(r"[a-z][a-z0-9+.]+:/", str(path)):
        return "is a URL, but this must be a local directory; copy it to one first"
    return "no such directory"
