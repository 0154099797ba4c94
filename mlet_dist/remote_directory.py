"""Publishes a local directory at a URL: one writer at a time, and complete only once its last file is there."""

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mlet_dist.errors import UserError
from mlet_dist.progress import Progress
from mlet_dist.storage import as_os_error, has_directories, open_filesystem

CLAIM = ".mlet-writer"
"""An object beside the files, created before the first and removed after the last, which names the writer."""

_THREADS = 8  # files that are uploaded at a time


class RemoteDirectory:
    """A directory at a URL, which does not exist yet.

    Object stores cannot rename directories. So a writer first creates the object ``CLAIM``, which only one can; it
    uploads all files but the last, then the last, whose presence marks the directory as complete, and removes
    ``CLAIM``. The claim's text is kept in a local file, so that the same writer can go on after it was killed.

    Args:
        url: the directory's URL.

    Raises:
        UserError: the URL cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("://") else url.rstrip("/")
        self._filesystem, root = open_filesystem(self.url)
        self._root = root.rstrip("/")
        if self.url.startswith(("http://", "https://")):
            raise UserError(f"{url}: cannot be written by HTTP; name a directory, or a URL such as s3://bucket/NAME")
        if not self.name or "/" not in self._root.strip("/"):
            raise UserError(f"{url}: names no directory inside the store; use one such as {self.url}/NAME")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._root.rpartition("/")[2]

    @property
    def local_name(self) -> str:
        """A name for local work on this directory, which differs for another URL."""
        return f"{self.name}-{hashlib.sha256(self.url.encode()).hexdigest()[:8]}"

    def check_free(self, claim: Path) -> bool:
        """Check that no files are there, except those of the writer whose claim is in the local file ``claim``.

        Returns:
            Whether that writer has begun.

        Raises:
            UserError: there are other files, or the store cannot be read.
        """
        with self._errors("read"):
            found = self._sizes()
            owner = self._owner() if CLAIM in found else None
        if owner is not None and not (claim.exists() and claim.read_text(encoding="utf-8") == owner):
            raise UserError(
                f"{self}: another process is writing there, or was killed while it did ({owner}); wait until it has "
                f"finished, or remove {self.url}/ and start again"
            )
        if found and owner is None:
            raise UserError(f"{self}: exists and is not empty; name another directory or remove this one")
        return owner is not None

    def is_published(self, source: Path, last: str) -> bool:
        """Return whether ``source`` was published: its last file is there, and no writer is at work."""
        if not (source / last).exists():
            return False
        with self._errors("read"):
            found = self._sizes()
            if last not in found or CLAIM in found:
                return False
            return bool(self._filesystem.cat_file(f"{self._root}/{last}") == (source / last).read_bytes())

    def publish(self, source: Path, last: str, claim: Path) -> None:
        """Upload the files of ``source``, with the file ``last`` at the end.

        Args:
            claim: a local file, kept while ``source`` is, with which a second call goes on after the first was killed.

        Raises:
            UserError: there are other files, another process writes there, or the store cannot be written. The files
                that were uploaded stay, and the same call goes on.
        """
        if not claim.exists():
            claim.write_text(f"writer {uuid.uuid4().hex}", encoding="utf-8")
        begun = self.check_free(claim)
        mine = claim.read_bytes()
        with self._errors("written"):
            self._create(CLAIM, mine)
            present = self._sizes()
            files = {str(p.relative_to(source)): p for p in sorted(source.rglob("*")) if p.is_file()}
            own = {CLAIM, *files} if begun else {CLAIM}
            if foreign := sorted(present.keys() - own):  # another writer has finished since `check_free`
                if not begun:
                    self._filesystem.rm_file(f"{self._root}/{CLAIM}")
                raise UserError(f"{self}: exists and is not empty: it holds {foreign[0]}; name another directory")
            sizes = {name: path.stat().st_size for name, path in files.items()}
            left = [name for name in files if name != last and present.get(name) != sizes[name]]
            with Progress("upload", sum(sizes[name] for name in left), "bytes") as progress:
                for name in self._uploaded(left, files):
                    progress.update(sizes[name])
            if self._owner().encode() != mine:
                raise UserError(f"{self}: another process has begun to write there; name another directory")
            self._create(last, files[last].read_bytes())
            self._filesystem.rm_file(f"{self._root}/{CLAIM}")
        claim.unlink()

    def _uploaded(self, names: Sequence[str], files: dict[str, Path]) -> Iterator[str]:
        def upload(name: str) -> str:
            self._filesystem.put_file(str(files[name]), f"{self._root}/{name}")
            return name

        pool = ThreadPoolExecutor(_THREADS)
        try:
            yield from pool.map(upload, names)
        finally:
            pool.shutdown(cancel_futures=True)

    def _create(self, name: str, content: bytes) -> None:
        """Create an object, which must not exist; one with the same content is that of a request that was repeated."""
        path = f"{self._root}/{name}"
        try:
            self._filesystem.pipe_file(path, content, mode="create")
        except FileExistsError:
            if self._filesystem.cat_file(path) != content:
                raise UserError(f"{self}: another process is writing there; name another directory") from None

    def _owner(self) -> str:
        try:
            return bytes(self._filesystem.cat_file(f"{self._root}/{CLAIM}")).decode(errors="replace")
        except FileNotFoundError:
            return "nobody"

    def _sizes(self) -> dict[str, int]:
        """Return the size of each file by its path in the directory."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(self._root, detail=True)
        except FileNotFoundError:
            if has_directories(self._filesystem):
                return {}
            raise  # no bucket
        return {path.removeprefix(f"{self._root}/"): entry["size"] for path, entry in found.items()}

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            with as_os_error():
                yield
        except OSError as error:
            raise UserError(f"{self}: cannot be {what}: {error.strerror}") from error
