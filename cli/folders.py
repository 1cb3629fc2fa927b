"""A folder that is there whole or not at all. A library: nothing to run here.

    make_folder("data", "--data_dir", overwrite=False, write=fill)

A folder is made in a workplace: <name>.partial-... beside it or, where it is already there (it may
be a volume, which cannot be renamed, in a folder that cannot be written), partial-... in it.
"""

from cli.errors import UserError, require
from cli.files import atomic_file, check_links, check_writable
from cli.locks import lock, lock_file

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

# What a workplace holds: `new`, `old` (what `new` replaces), and
MARK = "unfinished"  # the process that works here, which keeps it locked
MOVING = "moving.json"  # what goes from the folder to `old` while `new` moves in


def make_folder(data_dir: str, flag: str, overwrite: bool, write: Callable[[Path], dict],
                marker: str = "meta.json") -> dict:
    """A folder, whole or not at all: `write` fills another one, which then takes its place.

    One that is there is replaced only if it holds the file `marker`, which goes first and comes
    last: a folder without it is not whole. A run that is killed leaves the old folder or the new
    one, or the next run completes it. Returns what `write` returns.
    """
    check_links(data_dir, flag)
    try:
        target = Path(data_dir).resolve()
    except RuntimeError as error:  # links in a circle
        raise UserError(f"{flag} {data_dir}: {error}; name another folder") from error
    inside = target.is_dir()
    require(inside or not target.exists(), f"{flag} {data_dir} is a file; name a folder")
    with lock(target, flag) if inside else nullcontext():
        return make_locked(target, data_dir, flag, overwrite, write, marker, inside)


def check_there(target: Path, data_dir: str, flag: str, overwrite: bool, marker: str) -> list[str]:
    """What is in the folder; refuses what must not be replaced."""
    # a lock's file, and what a new volume has
    there = [name for name in os.listdir(target) if name not in (".lock", "lost+found")]
    if there:
        require(overwrite, f"{data_dir} is already there: use it, or give --overwrite, or another "
                           f"{flag}")
        # Only what this script wrote is ever replaced, never somebody's folder of that name.
        require(marker in there, f"{data_dir} holds other files: choose another {flag}")
    return there


def make_locked(target: Path, data_dir: str, flag: str, overwrite: bool,
                write: Callable[[Path], dict], marker: str, inside: bool) -> dict:
    """`make_folder` in the folder itself, of which no other process has the lock, or beside it."""
    beside, there = f"{target.name}.partial-", []
    clear_workplaces(target.parent, beside, target, flag, marker)
    if inside:
        clear_workplaces(target, "partial-", target, flag, marker)
        there = check_there(target, data_dir, flag, overwrite, marker)
    folder = target if inside else target.parent
    if not inside:
        check_writable(folder, flag)
        folder.mkdir(parents=True, exist_ok=True)
    with workplace(folder, "partial-" if inside else beside, flag) as place:
        try:
            meta = write(place / "new")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                error.filename = error.filename or data_dir  # a write names none
            raise
        if inside:
            replace_contents(place, target, there, marker)
        else:
            try:
                (place / "new").rename(target)
            except OSError as error:
                require(error.errno not in (errno.ENOTEMPTY, errno.EEXIST), f"another process has "
                        f"made {data_dir} meanwhile: use it, or choose another {flag}")
                raise
    return meta


@contextmanager
def workplace(folder: Path, prefix: str, flag: str) -> Iterator[Path]:
    """A folder to work in; it is removed at the end, unless a removal would lose something."""
    try:
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}): choose another folder "
                        f"with {flag}") from error
    try:
        with open(place / MARK, "w", encoding="utf-8") as mark:
            mark.write(str(os.getpid()))
            mark.flush()
            locked(mark)
            (place / "new").mkdir()
            yield place
    finally:
        if not (place / MOVING).exists():
            remove_workplace(place)


def remove_workplace(place: Path) -> None:
    """The mark goes last: a workplace without it would be a stranger's folder."""
    with suppress(OSError):
        for path in place.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        (place / MARK).unlink(missing_ok=True)
        place.rmdir()


def clear_workplaces(folder: Path, prefix: str, target: Path, flag: str, marker: str) -> None:
    """Completes or removes what killed runs have left; raises UserError where one still runs."""
    names: list[str] = []
    with suppress(OSError):  # not there, or not to be read
        names = os.listdir(folder)
    for place in [folder / name for name in names
                  if re.fullmatch(re.escape(prefix) + "[a-z0-9_]{8}", name)]:
        with suppress(OSError):
            place.rmdir()  # an empty one: killed before its mark was there
        if not (place / MARK).is_file():
            continue  # not ours
        with open(place / MARK, "r+", encoding="utf-8") as mark:
            require(locked(mark), f"process {mark.read()} is writing {target}: wait for it, or "
                                  f"choose another {flag}")
        if (place / MOVING).exists():
            move_in(place, target, marker)
        remove_workplace(place)


def locked(file: IO[str]) -> bool:
    """Locks a file until it is closed or the process ends; False where another has locked it."""
    try:
        lock_file(file)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def replace_contents(place: Path, target: Path, there: list[str], marker: str) -> None:
    """Puts `new` in the place of what is there; if that fails, all is as it was."""
    names = os.listdir(place / "new")
    (place / "old").mkdir()
    with atomic_file(place / MOVING, "w") as file:
        json.dump(there, file)
    try:
        move_in(place, target, marker)
    except BaseException:
        for name in sorted(names, key=lambda name: name != marker):
            if not (place / "new" / name).exists():
                (target / name).rename(place / "new" / name)
        for name in sorted(os.listdir(place / "old"), key=lambda name: name == marker):
            (place / "old" / name).rename(target / name)
        (place / MOVING).unlink()
        raise


def move_in(place: Path, target: Path, marker: str) -> None:
    """Moves what was there to `old`, the marker first, and then `new` in, the marker last. Done
    again after a kill, it goes on where it stopped."""
    old, new = place / "old", place / "new"
    there = json.loads((place / MOVING).read_text(encoding="utf-8"))
    for name in sorted(there, key=lambda name: name != marker):
        if os.path.lexists(target / name) and not os.path.lexists(old / name):
            (target / name).rename(old / name)
    for name in sorted(os.listdir(new), key=lambda name: name == marker):
        (new / name).rename(target / name)
    (place / MOVING).unlink()
