"""The texts of files: .txt with <|endoftext|> after every story, .jsonl and .parquet with a field
`text`. A library of sources.py.

Every reader is a generator, so that a file of any size is read with the same small memory. A text
that is null comes as None.
"""

from cli import UserError, require

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SEPARATOR = "<|endoftext|>"
CHUNK = 2**20  # characters of a text file read at once
# Characters; a file without separators or without ends of lines must not fill the memory.
LONGEST_STORY = 2**20  # in a text file
LONGEST_LINE = 2**26  # of JSON
# Other spellings of an end of a story, which are hardly ever meant as text.
_OTHER_MARK = re.compile(r"<[|/]*(?:end[a-z_ -]*|eo[a-z]|im_end|sep|s|/?story)[|/]*>"
                         r"|\[(?:end[a-z_ -]*|eo[a-z]|sep)\]", re.IGNORECASE)
_RULE = re.compile(r"^[ \t]*(?:-{3,}|\*{3,}|={3,}|_{3,}|#{3,}|\* \* \*)[ \t]*\r?$", re.MULTILINE)


def read_txt(path: Path) -> Iterator[str]:
    """Stories of a text file, separated by `<|endoftext|>`; newlines are kept as they are.

    The separator is found wherever it stands: what follows the last one that was read is kept and
    searched again with the next piece. A file with none of them is one story, unless it has
    another mark again and again.
    """
    tail, separated = "", False
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        while piece := file.read(CHUNK):
            *ended, tail = (tail + piece).split(SEPARATOR)
            for story in ended:
                separated = True
                check_length(path, story)
                yield story
            check_length(path, tail, len(SEPARATOR))  # it may end in most of a separator
    check_length(path, tail)
    require(separated or len(_OTHER_MARK.findall(tail)) < 2,
            f"{path}: no {SEPARATOR} in it{likely_separator(tail)}; put a line {SEPARATOR} after "
            "every story")
    if tail.strip():  # the last story may lack its separator
        yield tail


def check_length(path: Path, story: str, more: int = 0) -> None:
    if len(story) > LONGEST_STORY + more:
        seen = likely_separator(story[:LONGEST_STORY])
        raise UserError(f"{path}: no {SEPARATOR} in {LONGEST_STORY:,} characters{seen}; put a line "
                        f"{SEPARATOR} after every story")


def likely_separator(text: str) -> str:
    """", but <what seems to separate stories instead> N times", or nothing."""
    if marks := Counter(_OTHER_MARK.findall(text)):
        (mark, count), = marks.most_common(1)
        return f", but {mark} {count:,} times"
    for name, pattern in (("a line like {}", _RULE), ("a blank line", re.compile(r"\n\r?\n"))):
        if len(found := pattern.findall(text)) > 1:
            return f", but {name.format(found[0].strip())} {len(found):,} times"
    return ""


def missing_separator(names: Iterable[str]) -> str:
    """Names the first text file that was read as one story, and what may separate its stories."""
    for path in map(Path, names):
        if path.suffix.lower() == ".txt":
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                text = file.read(LONGEST_STORY)
            if SEPARATOR not in text and text.strip():
                return (f"{path} has no {SEPARATOR}, which must stand after every story"
                        f"{likely_separator(text)}")
    return ""


def read_jsonl(path: Path) -> Iterator[str | None]:
    return (text for text, in read_json_lines(path, ("text",)))


def read_json_lines(path: Path, keys: tuple[str, ...], optional: tuple[str, ...] = (),
                    ) -> Iterator[tuple[str | None, ...]]:
    """The strings, or None for null, of these keys of every line of a file, then those of the
    `optional` ones, None also where they are not there; empty lines are passed over."""
    with open(path, encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            require(len(line) <= LONGEST_LINE, f"{path}, line {number}: more than {LONGEST_LINE:,} "
                    "characters; put every story on a line of its own")
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                texts = (*(entry[key] for key in keys), *(entry.get(key) for key in optional))
                # half a surrogate pair is no text
                "".join(text for text in texts if text is not None).encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                expected = ", ".join(f'"{key}": "..."' for key in keys)
                raise UserError(f"{path}, line {number}: expected {{{expected}}}") from error
            yield texts


def read_parquet(path: Path) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        require("text" in file.schema_arrow.names, f"{path} has no column `text`")
        kind = file.schema_arrow.field("text").type
        require(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind),
                f"{path}: the column `text` holds {kind}, not strings")
        for batch in file.iter_batches(batch_size=1000, columns=["text"]):
            yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[str | None]]] = {
    ".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_files(names: Iterable[str]) -> Iterator[str | None]:
    for path in map(Path, names):
        try:
            yield from READERS[path.suffix.lower()](path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
                            ) from error
