"""Rows of JSONL, JSON, CSV and parquet files, each also .gz, with their line numbers; what cannot be read is named, all at
once, instead of ending the reading."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from permdistill.questions import BadRecords

SHOWN = 1000  # problems that a message lists; the rest is counted
WHOLE = 2 * 10**9  # bytes, unpacked, that are read in one piece: an array, a line, a sample of a log
_BOMS = {
    b"\xef\xbb\xbf": "UTF-8 with a byte order mark",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

Row = tuple[int, Any]  # line (or row, from 1) and what stands there


@dataclass
class Problems:
    """What is wrong with files, line by line; ``path``: the one that is read now."""

    path: Path
    unit: str = "line"
    found: list[str] = field(default_factory=list)
    n: int = 0
    files: set[Path] = field(default_factory=set)

    def add(self, line: int, problem: str) -> None:
        """Note a problem; ``line`` 0: of the file as a whole."""
        self.n += 1
        self.files.add(self.path)
        if self.n <= SHOWN:
            self.found.append(f"{self.path}, {self.unit} {line}: {problem}" if line else f"{self.path}: {problem}")

    def check(self) -> None:
        """Raise BadRecords if there are any."""
        if self.n:
            more = [f"and {self.n - SHOWN} more"] if self.n > SHOWN else []
            where = next(iter(self.files)) if len(self.files) == 1 else f"{len(self.files)} files"
            text = f"{where}: {self.n} problem(s)\n  " + "\n  ".join(self.found + more)
            raise BadRecords(text.encode("utf-8", "backslashreplace").decode())  # half a character cannot be printed


def fits(size: int, line: int, problems: Problems) -> bool:
    """Whether so many bytes may be read in one piece; if not, that is a problem."""
    if size > WHOLE:
        problems.add(line, f"more than {WHOLE:,} bytes in one piece, unpacked: write JSONL, one record a line")
    return size <= WHOLE


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield file


def rows(path: str | Path, problems: Problems) -> Iterator[Row]:
    """The rows of a file, one after the other, with their line numbers; what cannot be read goes to ``problems``."""
    path, problems.unit = Path(path), "line"
    try:
        with _opened(path) as file:
            start = file.read(4096)
            if encoding := next((name for bom, name in _BOMS.items() if start.startswith(bom)), None):
                problems.add(0, f"is {encoding}: save it as plain UTF-8")
                return
            file.seek(0)
            suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
            if start.startswith(b"PAR1") or suffix == ".parquet":
                problems.unit = "row"
                yield from _parquet(file, problems)
            elif suffix in (".csv", ".tsv"):
                yield from _csv(file, "\t" if suffix == ".tsv" else ",", problems)
            elif suffix == ".json" or start.lstrip().startswith(b"["):
                if (data := _whole(file, problems)) is not None:
                    yield from _json(data, problems)
            else:
                yield from _jsonl(_lines(file, problems), problems)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # no such file, no permission: says so itself
            raise
        problems.add(0, f"the compressed file is damaged or cut off ({error}): copy it again")


def _whole(file: BinaryIO, problems: Problems) -> bytes | None:
    """All of a file, None where it is too large."""
    data = bytearray()
    for part in iter(lambda: file.read(1 << 20), b""):
        data += part
        if not fits(len(data), 0, problems):
            return None
    return bytes(data)


def _lines(file: BinaryIO, problems: Problems) -> Iterator[bytes]:
    for number, line in enumerate(iter(lambda: file.readline(WHOLE + 1), b""), start=1):
        if not fits(len(line), number, problems):
            return
        yield line


def _text(data: bytes, number: int, problems: Problems) -> str | None:
    """Text that begins in a line of this number."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, at = number + before.count(b"\n"), error.start - before.rfind(b"\n") - 1
        problems.add(line, f"not UTF-8 (byte 0x{data[error.start]:02x} at {at}): save the file as UTF-8")
        return None


def _jsonl(lines: Iterable[bytes], problems: Problems) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        text = _text(line, number, problems)
        if text is None or not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            end = "" if line.endswith(b"\n") else "; is the file cut off here?"
            problems.add(number, f"not JSON ({_short(error)}): write one JSON object per line{end}")


def _json(data: bytes, problems: Problems) -> Iterator[Row]:
    """The records of an array, one by one; a single object as one row; JSONL under the name .json too."""
    text = _text(data, 1, problems)
    if text is None:
        return
    decoder, place, line, counted = json.JSONDecoder(), len(text) - len(text.lstrip()), 1, 0
    listed = text.startswith("[", place)
    place += listed
    try:
        while True:
            while text[place : place + 1] in (" ", "\n", "\r", "\t", ",") and place < len(text):
                place += 1
            if listed and text.startswith("]", place):
                if text[place + 1 :].strip():
                    problems.add(
                        line + text.count("\n", counted, place), "not JSON (more text after the array): give one array"
                    )
                return
            line, counted = line + text.count("\n", counted, place), place
            value, place = decoder.raw_decode(text, place)
            if not listed and text[place:].strip():
                yield from _jsonl(data.splitlines(keepends=True), problems)
                return
            yield line, value
            if not listed:
                return
    except (ValueError, RecursionError) as error:
        if not listed and text.count("\n", 0, len(text.rstrip())):
            yield from _jsonl(data.splitlines(keepends=True), problems)
            return
        end = "" if text.rstrip().endswith("]") else "; is the file cut off here?"
        problems.add(line, f"not JSON ({_short(error)}): give an array of objects{end}")


def _short(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split("; use sys.")[0]


def _cell(text: str) -> Any:
    """A CSV cell: JSON where it is JSON, "" is null, "0 2 1" (or with ; or |) is a list, anything else is text."""
    text = text.strip()
    if not text:
        return None
    parts = text.replace(";", " ").replace("|", " ").split()
    for candidate in (text, f"[{','.join(parts)}]" if len(parts) > 1 else text):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            pass
    return text


def _csv(file: BinaryIO, delimiter: str, problems: Problems) -> Iterator[Row]:
    lines = (_text(line, number, problems) or "\n" for number, line in enumerate(_lines(file, problems), start=1))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:  # an empty file, or names that cannot be read
            return
        plain = [name in ("id", "question_id", "instruction") for name in header]
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                problems.add(reader.line_num, f"{len(cells)} cells for {len(header)} columns: is the line cut off?")
                continue
            values = [text if keep else _cell(text) for text, keep in zip(cells, plain, strict=True)]
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        problems.add(reader.line_num, f"not CSV ({error}): is the file cut off here?")


def _parquet(file: BinaryIO, problems: Problems) -> Iterator[Row]:
    number = 0
    try:
        source: BinaryIO = file
        if not isinstance(file, io.BufferedReader):  # it is read from its end
            data = _whole(file, problems)
            if data is None:
                return
            source = io.BytesIO(data)
        for batch in pyarrow.parquet.ParquetFile(source).iter_batches(10_000):
            for row in batch.to_pylist():
                number += 1
                if isinstance(row.get("decision"), str):
                    row["decision"] = _cell(row["decision"])
                yield number, row
    except Exception as error:  # of pyarrow, by what is damaged
        problems.add(number, f"not parquet ({(str(error) or type(error).__name__).splitlines()[0]}): is the file cut off?")
