"""Read the text of VASP's volumetric files. Count every number, and refuse shifted values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._units import counted, most_bytes
from zarrcache.arrays.columns import (
    BARE_EXPONENT,
    BEFORE,
    Columns,
    columns_of,
    numbers_in,
    parse_columns,
)
from zarrcache.errors import SchemaError

__all__ = ["VaspText", "parse_vasp_text"]

_GRID_LINE = re.compile(rb"[ \t]*(\d{1,18})[ \t]+(\d{1,18})[ \t]+(\d{1,18})[ \t]*\r?\n?")
_NEXT_GRID_LINE = re.compile(
    rb"^[ \t]*\d{1,18}[ \t]+\d{1,18}[ \t]+\d{1,18}[ \t]*\r?\n", re.MULTILINE
)
_HEADING = b"augmentation occupancies"
#: VASP writes the number of the atom in four columns: from 1000 on it touches the words, and from
#: 10000 on it is stars.
_OCCUPANCIES = re.compile(_HEADING + rb"(?:.*[\s)])?[\d*]+\s+(\d{1,9})", re.IGNORECASE)
_STARS = re.compile(rb"\*{3}")
_NOT_FINITE = re.compile(rb"nan|inf(inity)?|[ED](?=[-+]?\d)", re.IGNORECASE)
_NEWLINE, _SPACE, _PLUS, _MINUS, _ZERO, _NINE = b"\n +-09"
#: Letters and what follows them in ASCII; those of an exponent are part of a number.
_LETTERS, _EXPONENTS = ord("A"), np.frombuffer(b"EeDd", np.uint8)
_LINE_BYTES = 1 << 20
#: Bytes read at a time. They, and what is computed from them, stay in the second-level cache.
_READ_BYTES = 1 << 20
_TAIL_BYTES = 200


@dataclass
class VaspText:
    """Grids of one file.

    Attributes
    ----------
    head : list of bytes
        The lines above the grids, a POSCAR, without white space around them.
    grids : list of ndarray, shape (nx, ny, nz), float64, Fortran order
    notes : list of str
        Suspicious findings, one sentence each.
    """

    head: list[bytes]
    grids: list[NDArray[np.float64]]
    notes: list[str] = field(default_factory=list)


def parse_vasp_text(file: Any, name: str, limit_bytes: int) -> VaspText:
    """Parse a CHGCAR or another volumetric file of VASP.

    Parameters
    ----------
    file : binary file object
        Of the decompressed text.
    name : str
        Path or URL, for messages.
    limit_bytes : int
        Most bytes of text to read.

    Raises
    ------
    SchemaError
        Not such a file, cut short, or larger than allowed; a grid has more or fewer numbers than it
        announces, or other content follows it.
    """
    title = _line(file, name)  # may be blank
    head = [title]
    # Read up to the blank line below the atoms, where the grids begin.
    while (line := _line(file, name)).strip():
        head.append(line)
    counts = next(
        (
            line.split()
            for line in head[5:7]
            if line.split() and all(map(bytes.isdigit, line.split()))
        ),
        [],
    )
    atoms = sum(map(int, counts))
    if atoms > len(head):
        raise SchemaError(
            f"{name} announces {counted(atoms, 'atom')} and has {counted(len(head), 'line')} for "
            "them. Get the file again."
        )
    body = _Body(name, len(head) + 2, atoms)
    rest = _line(file, name)
    grid = _GRID_LINE.fullmatch(rest)
    points = math.prod(map(int, grid.groups())) if grid else 0
    body.refuse_if_too_large(points)
    total, is_whole = _feed(file, rest, body, name, limit_bytes)
    if 2 * points > total:
        raise SchemaError(
            f"{name} announces a grid of {points} points and ends after {total} bytes. It is cut "
            "short; get it again."
        )
    grids = body.finish()
    parsed = VaspText([line.strip() for line in head], grids)
    if len(grids) not in (1, 2, 4):
        parsed.notes.append(
            f"has {len(grids)} grids; VASP writes 1, 2 (spin) or 4 (non-collinear). It may be "
            "cut short; only the first is used."
        )
    if not is_whole:
        parsed.notes.append("does not end with a line end: its last number may be cut short.")
    return parsed


def _feed(file: Any, rest: bytes, body: _Body, name: str, limit_bytes: int) -> tuple[int, bool]:
    """Feed the lines of a file to ``body``, from one buffer that is filled again and again.

    Returns their bytes, and whether the last one ends with a line end.
    """
    buffer = bytearray(BEFORE + _LINE_BYTES + _READ_BYTES)
    view = memoryview(buffer)
    # The whole lines begin at BEFORE; `end` is where the bytes end that were read.
    end = BEFORE + len(rest)
    view[BEFORE:end] = rest
    buffer[BEFORE - 1] = _NEWLINE
    total = len(rest)
    while count := file.readinto(view[end : end + _READ_BYTES]):
        end += count
        total += count
        if total > limit_bytes:
            raise SchemaError(
                f"{name} decompresses to more than {limit_bytes} bytes of text, too many for a "
                "density. Get the file again."
            )
        whole = buffer.rfind(b"\n", BEFORE, end) + 1
        if end - max(whole, BEFORE) > _LINE_BYTES:
            raise _endless(name)
        if whole > BEFORE:
            body.add(view, BEFORE, whole)
            left = end - whole
            # With the bytes before it, which the parser of columns may read.
            view[: BEFORE + left] = bytes(view[whole - BEFORE : end])
            end = BEFORE + left
    last = bytes(view[BEFORE:end])
    is_whole = not last or last.endswith(b"\n")
    if not is_whole:
        *before, cut = last[-_TAIL_BYTES:].split()[-5:]
        if _is_cut(before, cut):
            raise SchemaError(
                f"{name} ends within a number ({cut.decode('ascii', 'replace')!r}). It is cut "
                "short; get it again."
            )
        view[end] = _NEWLINE
        end += 1
    if end > BEFORE:
        body.add(view, BEFORE, end)
    return total, is_whole


def _is_cut(before: list[bytes], last: bytes) -> bool:
    """Whether a number is shorter than all those before it, or has fewer digits behind its point.

    VASP's columns are ``0.12E+01`` and ``-.12E+01``.
    """
    for lengths, length in (
        ({len(number.lstrip(b"+-")) for number in before}, len(last.lstrip(b"+-"))),
        ({len(number.partition(b".")[2]) for number in before}, len(last.partition(b".")[2])),
    ):
        if len(lengths) == 1 and length < max(lengths):
            return True
    return False


class _Body:
    """Collects the lines below the atoms: their numbers, and the lines that are not numbers.

    ``first`` is the number of the first line in the file, from 1.
    """

    def __init__(self, name: str, first: int, atoms: int) -> None:
        self._name = name
        self._first = first
        self._atoms = atoms
        self._counts: list[NDArray[np.int32]] = []
        self._lines = 0
        #: Size by line, of lines that begin a grid.
        self._shapes: dict[int, tuple[int, int, int]] = {}
        self._texts: dict[int, bytes] = {}
        self._stars: int | None = None
        self._unreadable: int | None = None
        self._grids: list[NDArray[np.float64]] = []
        #: Numbers of the last grid that are still to come, and the layout of its lines.
        self._missing = 0
        self._columns: Columns | None = None
        self._is_first_line = False

    def refuse_if_too_large(self, points: int) -> None:
        """Refuse a grid that does not fit in memory, before anything is allocated."""
        if 8 * points > most_bytes():
            raise SchemaError(
                f"{self._name} announces a grid of {points} points, more than fits in memory. Get "
                "the file again."
            )

    def add(self, text: memoryview, begin: int, end: int) -> None:
        """Add whole lines: ``text[begin:end]``, with at least ``BEFORE`` bytes before them."""
        while begin < end:
            if self._missing:
                begin += self._add_columns(text, begin, end) or self._add_numbers(text, begin, end)
            else:
                begin += self._add_others(text, begin, end)

    def _add_columns(self, text: memoryview, begin: int, end: int) -> int:
        """Parse lines in equal columns; returns their bytes, 0 if there are none."""
        if self._is_first_line:
            self._is_first_line = False
            stop = begin + bytes(text[begin : min(end, begin + _TAIL_BYTES * 10)]).find(b"\n") + 1
            self._columns = columns_of(bytes(text[begin:stop]))
        columns = self._columns
        if columns is None:
            return 0
        lines = min((end - begin) // columns.line_bytes, self._missing // columns.count)
        count = lines * columns.count
        if lines == 0 or not parse_columns(text, begin, lines, columns, self._next(count)):
            return 0
        self._counts.append(np.full(lines, columns.count, np.int32))
        self._lines += lines
        self._missing -= count
        return lines * columns.line_bytes

    def _next(self, count: int) -> NDArray[np.float64]:
        """The next values of the last grid, to be filled."""
        flat = self._grids[-1]
        start = len(flat) - self._missing
        return flat[start : start + count]

    def _add_numbers(self, text: memoryview, begin: int, end: int) -> int:
        """Parse lines of a grid in any layout, up to its last number; returns their bytes."""
        least = begin + 40 * self._missing + _TAIL_BYTES
        piece = _whole_lines(text, begin, end, min(end, least))
        found = _Scan(piece)
        upto = np.cumsum(found.counts, dtype=np.int64)
        lines = min(int(np.searchsorted(upto, self._missing)) + 1, len(upto))
        # Numbers end where a line has something else: `finish` finds that some are missing. Three
        # whole numbers are values unless they announce another grid of this size.
        shape = next(reversed(self._shapes.values()))
        grids = [line for line, other in found.shapes.items() if other == shape]
        others = [line for line in (*grids, *found.texts) if line < lines]
        lines = min(others, default=lines)
        if lines:
            count = int(upto[lines - 1])
            size = int(found.ends[lines - 1]) + 1
            values = numbers_in(piece[:size], repair=found.needs_repair)
            if (values is None or len(values) != count) and self._unreadable is None:
                self._unreadable = self._lines
            elif values is not None and count <= self._missing:
                self._next(count)[:] = values
            if self._stars is None and found.stars is not None and found.stars < lines:
                self._stars = self._lines + found.stars
            self._counts.append(found.counts[:lines])
            self._lines += lines
            self._missing = max(0, self._missing - count)
        else:
            size = 0
        if others:
            self._missing = 0
        return size

    def _add_others(self, text: memoryview, begin: int, end: int) -> int:
        """Add lines up to the next one that begins a grid; returns their bytes."""
        match = _NEXT_GRID_LINE.search(text[begin:end])
        size = match.end() if match else end - begin
        piece = bytes(text[begin : begin + size])
        found = _Scan(piece)
        numbers = found.without(piece, {*found.shapes, *found.texts})
        values = numbers_in(numbers, repair=found.needs_repair)
        expected = sum(
            int(count)
            for line, count in enumerate(found.counts)
            if line not in found.shapes and line not in found.texts
        )
        if (values is None or len(values) != expected) and self._unreadable is None:
            self._unreadable = self._lines
        self._shapes |= {self._lines + line: shape for line, shape in found.shapes.items()}
        self._texts |= {self._lines + line: words for line, words in found.texts.items()}
        if self._stars is None and found.stars is not None:
            self._stars = self._lines + found.stars
        self._counts.append(found.counts)
        self._lines += len(found.counts)
        if match:
            points = math.prod(found.shapes[len(found.counts) - 1])
            self.refuse_if_too_large(points)
            self._grids.append(np.empty(points))
            self._missing = points
            self._is_first_line = True
        return size

    def finish(self) -> list[NDArray[np.float64]]:
        """Refuse grids with more or fewer numbers than they announce, or return them all."""
        if not self._shapes:
            raise SchemaError(
                f"{self._name} is not a CHGCAR, or is cut short: no line below a blank one gives "
                "the size of a grid as three whole numbers."
            )
        if self._stars is not None:
            raise SchemaError(
                f"{self._name}, line {self._first + self._stars}: stars stand for a number that "
                "did not fit into its column. Run the calculation again or get the file again."
            )
        counts = np.concatenate(self._counts)
        upto = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        others = np.array(sorted({*self._shapes, *self._texts, len(counts)}))
        start = min(self._shapes)
        if upto[start] or min(self._texts, default=start) < start:
            # A size that cannot be read would make the second grid the first.
            raise SchemaError(
                f"{self._name}, line {self._first}: below the blank line something else precedes "
                "the size of the grid. Get the file again."
            )
        for line, shape in self._shapes.items():
            self._check_grid(line, math.prod(shape), counts, upto, others)
        self._check_texts(upto, others)
        if self._unreadable is not None:
            raise SchemaError(
                f"{self._name}: at or below line {self._first + self._unreadable} is something "
                "that is not a number. Get the file again."
            )
        shapes = self._shapes.values()
        return [
            flat.reshape(shape, order="F") for flat, shape in zip(self._grids, shapes, strict=True)
        ]

    def _check_grid(
        self,
        line: int,
        points: int,
        counts: NDArray[np.int32],
        upto: NDArray[np.int64],
        others: NDArray[np.int64],
    ) -> None:
        begin = line + 1
        #: The next line that is not numbers, and the line behind the last number of the grid.
        stop = int(others[np.searchsorted(others, begin)])
        end = int(np.searchsorted(upto, upto[begin] + points))
        found = int(upto[stop] - upto[begin])
        if found < points:
            raise self._wrong(line, points, found)
        is_exact = upto[end] == upto[begin] + points
        # VASP writes the moments of the atoms before the next grid; without the occupancies
        # they follow the numbers directly.
        is_moments = (
            stop in self._shapes
            and found - points == self._atoms
            and np.all(counts[begin : end - 1] == counts[begin])
        )
        if not is_exact or (found > points and not is_moments):
            raise self._wrong(line, points, found)

    def _check_texts(self, upto: NDArray[np.int64], others: NDArray[np.int64]) -> None:
        """Refuse texts other than the headings of occupancies, and too few of these."""
        for line, words in self._texts.items():
            shown = repr(words.decode("ascii", "replace"))
            if not _is_heading(words):
                raise SchemaError(
                    f"{self._name}, line {self._first + line}: {shown} follows a grid. A file with "
                    "the densities of several steps (the CHG of a relaxation) is not converted: "
                    "extract the last step."
                )
            match = _OCCUPANCIES.fullmatch(words)
            if match is None:
                raise SchemaError(
                    f"{self._name}, line {self._first + line}: {shown} does not say of which atom "
                    "they are and how many numbers follow. Get the file again."
                )
            stop = int(others[np.searchsorted(others, line + 1)])
            found = int(upto[stop] - upto[line + 1])
            # VASP writes the moments of the atoms, one or three numbers each, behind the last ones.
            extra = found - int(match[1])
            if extra not in (0, self._atoms, 3 * self._atoms):
                raise SchemaError(
                    f"{self._name}: the occupancies of line {self._first + line} announce "
                    f"{int(match[1])} numbers and have {found}. The file is damaged or cut short; "
                    "get it again."
                )

    def _wrong(self, line: int, points: int, found: int) -> SchemaError:
        return SchemaError(
            f"{self._name}: the grid of line {self._first + line} announces {points} numbers and "
            f"has {found}. Values would be shifted; get the file again."
        )


class _Scan:
    """Scan of a piece of whole lines: numbers per line, sizes of grids, texts, stars.

    Attributes
    ----------
    ends : ndarray
        Offsets of the line ends.
    counts : ndarray
        Numbers by line.
    shapes : dict
        Line to the size of the grid that it announces.
    texts : dict
        Line to the words that it has instead of numbers.
    stars : int or None
        The first line with stars.
    needs_repair : bool
        A sign follows a digit: Fortran left out the E of an exponent, or two numbers touch.
    """

    def __init__(self, text: bytes) -> None:
        codes = np.frombuffer(text, np.uint8)
        self.ends = ends = np.flatnonzero(codes == _NEWLINE)
        is_blank = codes <= _SPACE
        begins = ~is_blank
        begins[1:] &= is_blank[:-1]
        # A sign right behind a digit is a bare exponent, or the next of two columns that touch.
        is_sign = (codes == _PLUS) | (codes == _MINUS)
        is_digit = (codes >= _ZERO) & (codes <= _NINE)
        places = np.flatnonzero(is_sign[1:] & is_digit[:-1]) + 1
        self.needs_repair = len(places) > 0
        for place in places:
            if not BARE_EXPONENT.match(text, int(place)):
                begins[place] = True
        upto = np.cumsum(begins, dtype=np.int32)[ends]
        self.counts = np.diff(upto, prepend=np.int32(0))
        starts = np.concatenate([[0], ends[:-1] + 1])
        self.shapes: dict[int, tuple[int, int, int]] = {}
        for line in np.flatnonzero(self.counts == 3):
            if grid := _GRID_LINE.fullmatch(text, starts[line], ends[line]):
                self.shapes[int(line)] = (int(grid[1]), int(grid[2]), int(grid[3]))
        self.texts: dict[int, bytes] = {}
        is_letter = (codes >= _LETTERS) & ~np.isin(codes, _EXPONENTS)
        for line in np.unique(np.searchsorted(ends, np.flatnonzero(is_letter))):
            words = text[starts[line] : ends[line]].strip()
            if re.search(rb"[A-Za-z]", _NOT_FINITE.sub(b"", words)):
                self.texts[int(line)] = words[:60]
        starred = (int(np.searchsorted(ends, m.start())) for m in _STARS.finditer(text))
        self.stars = next(
            (line for line in starred if not _is_heading(self.texts.get(line, b""))), None
        )

    def without(self, text: bytes, lines: set[int]) -> bytes:
        """The text without these lines."""
        begins = [0, *(self.ends[:-1] + 1)]
        return b"".join(
            text[begins[line] : self.ends[line] + 1]
            for line in range(len(self.ends))
            if line not in lines
        )


def _is_heading(words: bytes) -> bool:
    return words.lower().startswith(_HEADING)


def _whole_lines(text: memoryview, begin: int, end: int, least: int) -> bytes:
    """The bytes from ``begin`` to the last line end before ``least``, or to the first one."""
    piece = bytes(text[begin:least])
    size = piece.rfind(b"\n") + 1
    return piece[:size] if size else bytes(text[begin:end])


def _line(file: Any, name: str) -> bytes:
    line: bytes = file.readline(_LINE_BYTES)
    if len(line) == _LINE_BYTES:
        raise _endless(name)
    return line


def _endless(name: str) -> SchemaError:
    return SchemaError(
        f"{name} has a line of more than {_LINE_BYTES} bytes; VASP writes a hundred. Get the file "
        "again."
    )
