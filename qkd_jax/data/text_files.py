"""Texts in files: `train/<class>.txt` and `test/<class>.txt`, or tables `train.csv`, `test.csv`."""

import csv
import io
import os
import pathlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from qkd_jax.data.examples import Split
from qkd_jax.data.scan import Scan, Splitter, find_parts, is_litter, shown
from qkd_jax.data.splits import HOW_TO_SPLIT
from qkd_jax.data.text_set import TextSet, plain
from qkd_jax.errors import DataError

TABLES = {".csv": ",", ".tsv": "\t"}  # and what stands between their cells
# Marks at the start of a file; those of UTF-32 begin as one of UTF-16 does.
MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class _Row(NamedTuple):
    """One text, with the name of its class and its place in the files."""

    class_name: str
    place: str
    text: str


def open_texts(
    path: str | os.PathLike,
    splitter: Splitter | None = None,
    follow_links: bool = False,
    text_column: str = "text",
    label_column: str = "label",
) -> Split:
    """Reads texts in UTF-8, with or without a byte-order mark.

    Ids are `train/<class>/<line>` and `test/<class>/<line>`, or in tables `train/row <n>` and
    `test/row <n>`, where the header is row 1; with a `splitter` they have no `train/` or `test/`.
    Accents in names of classes are composed (NFC).

    Args:
      path: holds `train/` and `test/` (or what else `open_folder` takes for these), each with one
        `<class>.txt` a class and one text per line; or `train.csv` and `test.csv` (or `.tsv`) with
        a header. Or, with a `splitter`, `<class>.txt` of all classes, or one table. Empty lines,
        hidden files and files of other kinds are passed over.
      splitter: (ids [N], labels [N]) -> bool [N], True for test.
      follow_links: also follow links that lead out of the folder; others are always followed.
      text_column, label_column: names of the columns of tables.

    Raises:
      DataError: lists all problems, with file and line: what `open_folder` refuses, both forms
        beside each other, other encodings, NUL characters, broken quotes, columns that are missing
        or there twice, rows with other numbers of cells than the header, empty cells.
    """
    root = pathlib.Path(path)
    if text_column == label_column:
        raise DataError(
            f"data.label_column: expected another column than data.text_column, found "
            f"{label_column!r} for both"
        )
    folders = find_parts(root, TextSet.noun)
    tables = find_parts(root, TextSet.noun, tuple(TABLES))
    if any(folders) and any(tables):
        found = ", ".join(_name(part) for part in (*folders, *tables) if part)
        raise DataError(
            f"{shown(root)}: expected folders of <class>.txt or tables, found both: {found}"
        )
    scan = Scan(root, follow_links)
    columns = (text_column, label_column)
    name = shown(root.absolute().name)
    train, test = folders if any(folders) else tables
    if splitter is not None and train and test:
        raise DataError(
            f"{shown(root)}: expected texts to split, found {_name(train)} and {_name(test)}, "
            "which are already split; leave the split file out"
        )
    if splitter is not None and not any(folders):
        rows, class_names = _read(scan, _undivided(root), columns)
        scan.refuse()
        everything = _text_set(rows, sorted(class_names), "", name)
        is_test = splitter(everything.ids, everything.labels)
        return Split(
            train=everything.take(np.flatnonzero(~is_test), f"{name}/train"),
            test=everything.take(np.flatnonzero(is_test), f"{name}/test"),
        )
    if not train or not test:
        raise DataError(_what_is_missing(root, train or test))
    (trained, class_names), (tested, of_test) = (
        _read(scan, part, columns) for part in (train, test)
    )
    scan.compare((_name(train), class_names), (_name(test), of_test))
    scan.refuse()
    class_names = sorted(class_names)
    return Split(
        train=_text_set(trained, class_names, "train/", f"{name}/{shown(train.name)}"),
        test=_text_set(tested, class_names, "test/", f"{name}/{shown(test.name)}"),
    )


def _name(part: pathlib.Path) -> str:
    return shown(part.name) + "/" * part.is_dir()


def _undivided(root: pathlib.Path) -> pathlib.Path:
    """The only table of a folder, or the folder itself if there is none."""
    found = sorted(file for file in root.iterdir() if not is_litter(file.name))
    tables = [file for file in found if file.suffix.lower() in TABLES and not file.is_dir()]
    texts = [file for file in found if file.suffix.lower() == ".txt"]
    if len(tables) > 1 or (tables and texts):
        listed = " and ".join(shown(file.name) for file in (*tables[:2], *texts[:1]))
        raise DataError(
            f"{shown(root)}: expected one table, or <class>.txt of all classes, found {listed}"
        )
    return tables[0] if tables else root


def _what_is_missing(root: pathlib.Path, only: pathlib.Path | None) -> str:
    expected = (
        f"{shown(root)}: expected train/<class>.txt and test/<class>.txt, or train.csv and "
        "test.csv (or .tsv)"
    )
    if only and only.is_dir():
        return (
            f"{expected}, found {_name(only)} alone. To divide the texts of {_name(only)}, give "
            f"{shown(only)} as the path, together with a split file (data.split_file)"
        )
    if only:
        return (
            f"{expected}, found {_name(only)} alone. A split file (data.split_file) divides its "
            "texts"
        )
    how = HOW_TO_SPLIT.replace("FOLDER", "texts --path FOLDER")
    found = f"other files; {how}" if any(root.iterdir()) else "an empty folder"
    return (
        f"{expected}, or <class>.txt or one table together with a split file (data.split_file), "
        f"found {found}"
    )


def _text_set(rows: list[_Row], class_names: list[str], prefix: str, name: str) -> TextSet:
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    return TextSet(
        name=name,
        labels=np.array([labels[row.class_name] for row in rows], np.int32),
        ids=np.array([f"{prefix}{row.place}" for row in rows], str),
        class_names=tuple(class_names),
        texts=tuple(row.text for row in rows),
    )


def _read(scan: Scan, part: pathlib.Path, columns: tuple[str, str]) -> tuple[list[_Row], set[str]]:
    """(the texts of a part, the names of its classes as far as they can be known)."""
    if not scan.may_be_read(part):
        return [], set()
    if part.is_dir():
        return _read_folder(scan, part)
    before = len(scan.problems)
    rows = _read_table(scan, part, *columns)
    return rows, {row.class_name for row in rows} if len(scan.problems) == before else set()


def _read_folder(scan: Scan, folder: pathlib.Path) -> tuple[list[_Row], set[str]]:
    """The lines of every <class>.txt that are not empty."""
    rows, class_names = [], set()
    before = len(scan.problems)
    for name, file in scan.entries(folder):
        class_name, suffix = os.path.splitext(name)
        if file.is_dir():
            scan.note(file, "a folder where <class>.txt is expected")
        elif suffix.lower() == ".txt" and class_name in class_names:
            scan.note(file, "expected one file for each class, found another of this name")
        elif suffix.lower() == ".txt":
            class_names.add(class_name)
            if not scan.is_file(file, "<class>.txt"):
                continue
            text = _decoded(scan, file.path)
            found = [
                _Row(class_name, f"{class_name}/{number}", line.removesuffix("\r"))
                for number, line in enumerate((text or "").split("\n"), 1)
                if line.strip()
            ]
            if text is not None and not found:
                scan.note(file, "expected a text, found empty lines alone")
            rows += found
    if not rows and len(scan.problems) == before:
        scan.note(folder, "expected <class>.txt, one for each class, found none")
    return rows, class_names


def _read_table(scan: Scan, file: pathlib.Path, text_column: str, label_column: str) -> list[_Row]:
    """The rows below the header of a table."""
    text = _decoded(scan, file) if scan.is_file(file, "a table") else None
    if text is None:
        return []
    delimiter = TABLES[file.suffix.lower()]
    records, broken = _records(text, delimiter)
    if broken:
        scan.note(file, broken)
    elif len(records) < 2:
        scan.note(file, "expected a header and rows below it, found none")
    if not records:
        return []
    header = [plain(cell) for cell in records[0][2]]
    columns = (plain(text_column), plain(label_column))
    if any(header.count(column) != 1 for column in columns):
        scan.note(
            file,
            f"expected one column {columns[0]!r} and one {columns[1]!r} (data.text_column, "
            f"data.label_column), found {', '.join(map(repr, header))}",
        )
        return []
    places = [header.index(column) for column in columns]
    separators = {",": "commas", "\t": "tabs"}[delimiter]
    rows = []
    wrong = defaultdict(list)  # problem -> the lines that have it
    for number, line, cells in records[1:]:
        if len(cells) != len(header):
            wrong[
                f"expected {len(header)} cells as in the header, found {len(cells)}; a cell with "
                f"{separators} needs quotes"
            ].append(line)
            continue
        content, class_name = (cells[place] for place in places)
        for column, cell in zip(columns, (content, class_name), strict=True):
            if not cell.strip():
                wrong[f"expected a text as {column!r}, found an empty cell"].append(line)
        rows.append(_Row(plain(class_name), f"row {number}", content))
    _note_lines(scan, file, wrong)
    return rows


def _records(text: str, delimiter: str) -> tuple[list[tuple[int, int, list[str]]], str]:
    """(number, first line and cells of every record that is not empty; the problem that ends them,
    or "").
    """
    records, line, broken = [], 1, ""
    limit = csv.field_size_limit(max(len(text), 1))  # of the whole process, so it is put back
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for number, cells in enumerate(reader, 1):
            if cells:
                records.append((number, line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        broken = f"line {line}: expected cells with quotes in pairs, found an error ({error})"
    finally:
        csv.field_size_limit(limit)
    return records, broken


def _decoded(scan: Scan, file: str | os.PathLike) -> str | None:
    """The text of a file in UTF-8; None after a problem."""
    try:
        content = pathlib.Path(file).read_bytes()
    except OSError as error:
        scan.note(file, f"cannot be read ({error.strerror})")
        return None
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            scan.note(file, f"expected UTF-8, found {encoding}. Save it as UTF-8")
            return None
    wrong = defaultdict(list)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    for number, line in enumerate(content.split(b"\n"), 1) if text is None else ():
        try:
            line.decode()
        except UnicodeDecodeError:
            wrong["expected UTF-8, found other bytes. Save it as UTF-8"].append(number)
    if b"\0" in content:
        wrong["expected text, found a NUL character"] += [
            number for number, line in enumerate(content.split(b"\n"), 1) if b"\0" in line
        ]
    _note_lines(scan, file, wrong)
    return None if wrong else text


def _note_lines(scan: Scan, file: str | os.PathLike, wrong: dict[str, list[int]]) -> None:
    """Notes each kind of problem of a file once, with the first line that has it."""
    for problem, (first, *others) in wrong.items():
        more = f" and {len(others)} more" if others else ""
        scan.note(file, f"line {first}{more}: {problem}")
