"""Real text as one long sequence of bytes, of which every rank reads only its own shard.

A `Corpus` is a list of files laid end to end, in the order of their names, with nothing between them. A token
is a byte, so positions are byte offsets and no tokenizer or index is needed. Only the bytes that a read asks for
are read.
"""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distattn.errors import ConfigError

IGNORE = -100
"""The label of a position that has no next byte; what torch.nn.functional.cross_entropy ignores."""

_INSTALLED = frozenset({"site-packages", "dist-packages"})  # inside the standard library, but not of it


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: where it is, its name (the path below the source), its size in bytes, > 0.

    modified: when, in ns since 1970, as its file system says; None: whatever it says is fine.
    """

    path: Path
    name: str
    size: int
    modified: int | None = None


@dataclass(frozen=True)
class Corpus:
    """Files laid end to end as one sequence of bytes; use `open_corpus` to make one.

    Empty files have no byte in the sequence and are not listed, so no two files begin at the same position.

    Attributes:
        source: what it is, for people. files: in their order.
        text: all bytes, if they were read already; see `in_memory`.
    """

    source: str
    files: tuple[TextFile, ...]
    text: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64 [files + 1]: the position at which each file begins, then the length of the whole."""
        return np.concatenate([[0], np.cumsum([file.size for file in self.files], dtype=np.int64)])

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits from the names and sizes of all files: equal wherever ranks see the same corpus."""
        listing = "".join(f"{file.size} {file.name}\0" for file in self.files)
        return hashlib.blake2b(_encode(listing), digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Length in bytes."""
        return int(self.starts[-1])

    def require(self, seq_len: int, offset: int = 0) -> None:
        """Check that a sequence of seq_len bytes from `offset` lies inside the corpus.

        Raises:
            ConfigError: it does not; the message has both lengths.
        """
        if seq_len < 1 or offset < 0:
            raise ConfigError(f"seq_len is {seq_len} and offset {offset}; expected at least 1 and at least 0")
        if offset + seq_len > len(self):
            where = f" from byte {offset:,}" if offset else ""
            raise ConfigError(
                f"seq_len is {seq_len:,} bytes{where} but {self.source} has {len(self):,} bytes in "
                f"{len(self.files):,} files; expected a shorter sequence or a longer source"
            )

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes [start, stop), uint8 [stop - start]; opens only the files that have a byte in there.

        Raises:
            ValueError: the range does not lie inside the corpus.
            ConfigError: a file has changed or gone since the corpus was opened, or while it was read.
        """
        self._check_range(start, stop)
        if self.text is not None:
            return self.text[start:stop].copy()
        out = np.empty(stop - start, dtype=np.uint8)
        for index, first, last in self._pieces(start, stop):
            file, begin = self.files[index], int(self.starts[index])
            out[first - start : last - start] = _read(file, first - begin, last - begin)
        return out

    def in_memory(self, most: int) -> "Corpus":
        """The same corpus with all of its bytes read, or itself if these are more than ``most``: for whoever reads here
        and there again and again, since opening files is slow on some machines.

        Raises:
            ConfigError: as `read`.
        """
        return self if len(self) > most else replace(self, text=self.read(0, len(self)))

    def read_segments(self, segments: Iterable[tuple[int, int]], offset: int = 0) -> NDArray[np.uint8]:
        """The tokens of a shard.

        Args:
            segments: the half-open runs of positions that a rank owns, such as `plan.segments`.
            offset: the byte of the corpus at which the sequence begins, which is position 0.

        Returns:
            uint8 [tokens], the segments one after the other.

        Raises:
            ValueError, ConfigError: as `read`.
        """
        parts = [self.read(offset + start, offset + stop) for start, stop in segments]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)

    def labels(self, segments: Iterable[tuple[int, int]], offset: int = 0) -> NDArray[np.int64]:
        """The byte that follows each token of a shard, read from the files: the next shard's first byte
        included.

        Args:
            segments, offset: as in `read_segments`.

        Returns:
            int64 [tokens]; `IGNORE` for the very last byte of the corpus, which nothing follows.

        Raises:
            ValueError, ConfigError: as `read`.
        """
        parts = [np.empty(0, dtype=np.int64)]
        for start, stop in segments:
            self._check_range(offset + start, offset + stop)
            following = np.full(stop - start, IGNORE, dtype=np.int64)
            if stop > start:
                known = self.read(offset + start + 1, min(offset + stop + 1, len(self)))
                following[: len(known)] = known
            parts.append(following)
        return np.concatenate(parts)

    def file_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions in [start, stop) at which a file begins, ascending int64; subtract `start` for a
        sequence's own.

        Raises:
            ValueError: the range does not lie inside the corpus.
        """
        self._check_range(start, stop)
        first, last = np.searchsorted(self.starts[:-1], [start, stop])
        return self.starts[first:last]

    def document_lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """How [start, stop) divides into files: int64 lengths in bytes, all > 0, whose sum is stop - start.

        The first and the last may be parts of a file.

        Raises:
            ValueError: the range does not lie inside the corpus.
        """
        starts = self.file_starts(start, stop)
        lengths = np.diff(np.concatenate([[start], starts, [stop]]))
        return lengths[lengths > 0]

    def split(self, held_out: float) -> tuple["Corpus", "Corpus"]:
        """Divide the files in two by a hash of their names.

        A file's side depends on its name and `held_out` alone: not on the other files, the machine or the
        run.

        Args:
            held_out: share of the files to hold out, 0 < held_out < 1.

        Returns:
            the training corpus and the held-out corpus.

        Raises:
            ConfigError: held_out is out of range, or one of the two would be empty.
        """
        if not 0 < held_out < 1:
            raise ConfigError(f"held_out is {held_out}; expected a share of the files between 0 and 1, both excluded")
        sides: tuple[list[TextFile], list[TextFile]] = [], []
        for file in self.files:
            digest = hashlib.blake2b(_encode(file.name), digest_size=8).digest()
            sides[int.from_bytes(digest, "big") < held_out * 2**64].append(file)
        for side, name in zip(sides, ("training", "held-out"), strict=True):
            if not side:
                raise ConfigError(
                    f"held_out is {held_out}, which leaves no {name} file among the {len(self.files):,} of "
                    f"{self.source}; expected another share, or a folder of more files"
                )
        train, held = (tuple(side) for side in sides)
        return Corpus(f"{self.source} (training)", train), Corpus(f"{self.source} (held out)", held)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(file, first, last) for every file with bytes in [start, stop), first and last being positions."""
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            last = min(stop, int(self.starts[index + 1]))
            yield index, start, last
            start, index = last, index + 1

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"the range is [{start}, {stop}); expected one inside [0, {len(self)}) of {self.source}")


def open_corpus(source: str | Path | None = None, suffix: str | None = None) -> Corpus:
    """List the files of a source.

    Args:
        source: a file; a folder, searched through all its subfolders, in the order of the paths below it,
            without hidden files and folders and without following links to folders; or None for the source of
            the standard library of the running interpreter (12 MB in Python 3.11, and 31 MB with its tests,
            which some installations lack).
        suffix: take only files whose names end so; None takes all of a given source, ".py" of the library.

    Raises:
        ConfigError: the source is missing, is unreadable, or has no bytes.
    """
    library = source is None
    root = Path(sysconfig.get_path("stdlib")) if source is None else Path(source).expanduser()
    if suffix is None:
        suffix = ".py" if library else ""
    try:
        status = root.stat()
    except OSError as error:
        raise ConfigError(f"source is {str(root)!r}, which cannot be opened: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        folder, names = root, _names_below(root, skip=_INSTALLED if library else frozenset())
    elif stat.S_ISREG(status.st_mode):
        folder, names = root.parent, [root.name]
    else:
        raise ConfigError(f"source is {str(root)!r}, which is neither a file nor a folder")
    files = tuple(_text_files(folder, (name for name in names if name.endswith(suffix))))
    if not files:
        wanted = f" in files named *{suffix}" if suffix else ""
        raise ConfigError(f"source is {str(root)!r}, which has no bytes{wanted}; expected some text")
    return Corpus("the Python standard library" if library else str(root), files)


def _names_below(root: Path, skip: frozenset[str]) -> list[str]:
    """Paths below root, sorted, without hidden files and folders and the folders named in `skip`."""

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"source has the folder {error.filename!r}, which cannot be read: {error.strerror}"
        ) from error

    names: list[str] = []
    for folder, subfolders, entries in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        below = Path(folder).relative_to(root)
        names += [(below / name).as_posix() for name in entries if not name.startswith(".")]
    return sorted(names)


def _text_files(folder: Path, names: Iterable[str]) -> Iterator[TextFile]:
    """The regular, non-empty files among folder/name, in order."""
    for name in names:
        path = folder / name
        try:
            status = path.stat()
        except FileNotFoundError:  # a dangling link
            continue
        except OSError as error:
            raise ConfigError(f"source has the file {str(path)!r}, which has no size: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            continue
        if not os.access(path, os.R_OK):
            raise ConfigError(f"source has the file {str(path)!r}, which this user may not read")
        yield TextFile(path, name, status.st_size, status.st_mtime_ns)


def _read(file: TextFile, first: int, last: int) -> NDArray[np.uint8]:
    """The bytes [first, last) of a file. It is not mapped: touching what was cut off later would end the process."""
    try:
        with open(file.path, "rb", buffering=0) as opened:
            text = np.fromfile(opened, np.uint8, count=last - first, offset=first)
            status = os.fstat(opened.fileno())
    except OSError as error:
        raise ConfigError(f"cannot read {file.size:,} bytes of {file.path}: {error}") from error
    if status.st_size != file.size or len(text) < last - first:
        raise ConfigError(f"cannot read {file.size:,} bytes of {file.path}: it has {status.st_size:,} now")
    if file.modified not in (None, status.st_mtime_ns):
        raise ConfigError(f"cannot read {file.size:,} bytes of {file.path}: it was changed after the job began")
    return text


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # as on disk, whatever the locale
