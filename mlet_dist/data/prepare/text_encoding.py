"""Encodings of raw text: found by a byte order mark or named by the description, and converted to UTF-8."""

import codecs
from collections.abc import Iterable, Iterator

UTF8 = "utf-8"
UTF8_MARK = b"\xef\xbb\xbf"
INVALID = b"\xff"  # stands in the converted text for what is not of the encoding; it occurs in no UTF-8

_MARKS = (  # that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (UTF8_MARK, UTF8),
)


def canonical_encoding(name: str) -> str:
    """Return Python's name of an encoding.

    Raises:
        ValueError: there is no encoding of text of this name.
    """
    try:
        found = codecs.lookup(name).name
        if "1,a\n".encode(found).decode(found) != "1,a\n":
            raise ValueError(name)
        # Those of names on the internet, idna and punycode, cannot replace what they cannot decode.
        codecs.getincrementaldecoder(found)(_INVALID_HANDLER).decode("1,a\n".encode(found))
    except (LookupError, UnicodeError, ValueError) as error:
        raise ValueError(name) from error
    return UTF8 if found == "utf-8-sig" else found


def encoding_of(head: bytes, named: str | None) -> str:
    """Return the encoding of a text that begins with ``head``: that of its byte order mark, ``named``, or UTF-8."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), named or UTF8)


def to_utf8(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield pieces of text as UTF-8; ``INVALID`` replaces what is not of the encoding, so that its lines are found."""
    decoder = codecs.getincrementaldecoder(encoding)(_INVALID_HANDLER)
    for piece in pieces:
        yield decoder.decode(piece).encode(UTF8, "surrogateescape")
    if rest := decoder.decode(b"", final=True):
        yield rest.encode(UTF8, "surrogateescape")


def _replace_invalid(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return INVALID.decode(UTF8, "surrogateescape"), error.end


_INVALID_HANDLER = "mlet_dist.invalid"
codecs.register_error(_INVALID_HANDLER, _replace_invalid)
