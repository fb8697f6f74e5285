"""A corpus is its files end to end; every read, label and boundary is checked against that."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.data import IGNORE, Corpus, TextFile, open_corpus
from distattn.errors import ConfigError

FILES = {
    "b.txt": b"second file\n",
    "a/z.txt": b"first? no: a/z sorts before b\n",
    "a/empty.txt": b"",
    "a/deep/er.txt": bytes(range(256)),
    "c.md": b"# not text\n",
    ".hidden/x.txt": b"never",
    "a/.y.txt": b"never",
}
IN_ORDER = ["a/deep/er.txt", "a/z.txt", "b.txt"]
WHOLE = b"".join(FILES[name] for name in IN_ORDER)
STARTS = [0, 256, 256 + len(FILES["a/z.txt"])]

positions = st.integers(0, len(WHOLE))  # of the ends of ranges


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(write(tmp_path_factory.mktemp("texts"), FILES), suffix=".txt")


def test_folder_is_its_files_in_order_of_their_paths(corpus: Corpus) -> None:
    assert [file.name for file in corpus.files] == IN_ORDER
    assert len(corpus) == len(WHOLE)
    assert corpus.read(0, len(corpus)).tobytes() == WHOLE
    assert corpus.read(0, 0).tolist() == []


@settings(max_examples=25, deadline=None)
@given(st.tuples(positions, positions).map(sorted))
def test_ranges_equal_the_whole(corpus: Corpus, ends: list[int]) -> None:
    start, stop = ends
    text = corpus.read(start, stop)
    assert text.dtype == np.uint8 and text.tobytes() == WHOLE[start:stop]
    assert corpus.file_starts(start, stop).tolist() == [s for s in STARTS if start <= s < stop]
    lengths = corpus.document_lengths(start, stop)
    assert lengths.sum() == stop - start and (lengths > 0).all()
    assert (start + np.cumsum(lengths))[:-1].tolist() == [s for s in STARTS if start < s < stop]


@settings(max_examples=25, deadline=None)
@given(st.lists(positions, min_size=2, max_size=8).map(sorted), st.integers(0, 20))
def test_segments_and_their_labels(corpus: Corpus, cuts: list[int], offset: int) -> None:
    segments = [(max(0, a - offset), max(0, b - offset)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    tokens, labels = corpus.read_segments(segments, offset), corpus.labels(segments, offset)
    at = [offset + i for start, stop in segments for i in range(start, stop)]
    assert tokens.dtype == np.uint8 and tokens.tolist() == [WHOLE[i] for i in at]
    assert labels.dtype == np.int64
    assert labels.tolist() == [WHOLE[i + 1] if i + 1 < len(WHOLE) else IGNORE for i in at]


def test_only_files_with_wanted_bytes_are_opened(tmp_path: Path) -> None:
    root = write(tmp_path, {"1": b"one", "2": b"two", "3": b"three"})
    corpus = open_corpus(root)
    (root / "1").unlink()
    (root / "3").unlink()
    assert corpus.read(3, 6).tobytes() == b"two"
    with pytest.raises(ConfigError, match="cannot read 3 bytes of .*1"):
        corpus.read(2, 6)
    (root / "2").write_bytes(b"t")
    with pytest.raises(ConfigError, match="cannot read 3 bytes of .*2"):
        corpus.read(3, 4)


def test_files_that_change_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, {"1": b"one", "2": b"two", "3": b"three", "4": b"four"})
    corpus = open_corpus(root)
    (root / "1").write_bytes(b"ONE")  # as long as before
    os.utime(root / "1", ns=(1, 1))
    with pytest.raises(ConfigError, match="cannot read 3 bytes of .*1: it was changed"):
        corpus.read(0, 1)
    (root / "2").write_bytes(b"two and more")
    with pytest.raises(ConfigError, match="cannot read 3 bytes of .*2: it has 12 now"):
        corpus.read(3, 4)
    (root / "3").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot read 5 bytes of .*3: it has 0 now"):
        corpus.read(6, 11)
    (root / "4").unlink()
    (root / "4").mkdir()  # cannot be read, even by root
    with pytest.raises(ConfigError, match="cannot read 4 bytes of .*4: .*directory"):
        corpus.read(11, 12)


def test_single_file_and_suffix(tmp_path: Path) -> None:
    write(tmp_path, {"x.txt": b"hello", "y.md": b"."})
    corpus = open_corpus(tmp_path / "x.txt")
    assert corpus.read(1, 4).tobytes() == b"ell" and corpus.files[0].name == "x.txt"
    assert len(open_corpus(tmp_path)) == 6
    with pytest.raises(ConfigError, match=r"no bytes in files named \*\.md"):
        open_corpus(tmp_path / "x.txt", suffix=".md")


def test_standard_library_is_long_enough_for_a_million_tokens() -> None:
    corpus = open_corpus()
    corpus.require(1_048_576)
    assert all(file.name.endswith(".py") and "site-packages" not in file.name for file in corpus.files)
    assert sum(file.size for file in corpus.files if "test" not in file.name) >= 1_048_576
    middle = len(corpus.files) // 2
    start, stop = corpus.starts[middle : middle + 2]
    assert corpus.read(int(start), int(stop)).tobytes() == corpus.files[middle].path.read_bytes()


def test_split_is_stable_disjoint_and_about_the_share() -> None:
    files = tuple(TextFile(Path("/nowhere") / f"{i}.py", f"{i}.py", 10) for i in range(2000))
    corpus = Corpus("made up", files)
    train, held_out = corpus.split(0.25)
    assert set(train.files) | set(held_out.files) == set(files)
    assert not set(train.files) & set(held_out.files)
    assert 0.22 < len(held_out.files) / len(files) < 0.28
    # a file stays on its side when others come and go, and as the share grows
    _, fewer = Corpus("made up", files[::2]).split(0.25)
    assert set(fewer.files) == set(held_out.files) & set(files[::2])
    assert set(held_out.files) < set(corpus.split(0.5)[1].files)
    # the same on every machine and in every release
    chosen = {int(file.path.stem) for file in held_out.files}
    assert chosen & set(range(40)) == {0, 1, 4, 9, 11, 12, 23, 24, 25, 31, 32, 33}


def test_fingerprint_tells_listings_apart(tmp_path: Path) -> None:
    one = open_corpus(write(tmp_path / "one", {"a": b"xy", "b": b"z"}))
    same = open_corpus(write(tmp_path / "same", {"a": b"xy", "b": b"z"}))
    other = open_corpus(write(tmp_path / "other", {"a": b"x", "b": b"yz"}))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 32


def test_errors_say_what_was_given(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="source is .*missing.*No such file"):
        open_corpus(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="source is .*empty.*no bytes"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(ConfigError, match=f"seq_len is 1,000,000 bytes but .* has {len(WHOLE)} bytes in 3"):
        corpus.require(1_000_000)
    with pytest.raises(ConfigError, match=f"seq_len is {len(WHOLE)} bytes from byte 1 but"):
        corpus.require(len(WHOLE), offset=1)
    with pytest.raises(ConfigError, match="seq_len is 0"):
        corpus.require(0)
    for start, stop in ((-1, 3), (3, 2), (0, len(WHOLE) + 1)):
        for call in (corpus.read, corpus.file_starts, corpus.document_lengths):
            with pytest.raises(ValueError, match=rf"the range is \[{start}, {stop}\)"):
                call(start, stop)
        with pytest.raises(ValueError, match=rf"the range is \[{start}, {stop}\)"):
            corpus.labels([(start, stop)])
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ConfigError, match=f"held_out is {share}"):
            corpus.split(share)
    with pytest.raises(ConfigError, match="leaves no held-out file among the 3"):
        corpus.split(1e-9)


def test_odd_files(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"x"})
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "fifo")
    assert [file.name for file in open_corpus(tmp_path).files] == ["a"]
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        open_corpus(tmp_path / "fifo")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"x"})
    (tmp_path / "a").chmod(0)
    with pytest.raises(ConfigError, match="may not read"):
        open_corpus(tmp_path)
