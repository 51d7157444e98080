"""Locks, and files and folders that are never seen in parts: by a reader, by a second process, or after a power cut.

Everything is written under a temporary name, put on the disk, and renamed. Temporary names start with a dot and the final
name, and end in `.tmp` or `.replaced`. Two processes never share one, and the next process that writes to the same name
removes what a killed process left, or restores the folder that it had set aside.

All locks are `flock` locks: the operating system releases them when a process ends, however it ends. Where there are none
(some network file systems, and Windows), [`locked`] refuses to start, and nothing that a killed process left is removed.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, one_line


@contextlib.contextmanager
def locked(path: Path, name: str) -> Iterator[BinaryIO]:
    """Holds a lock file, which keeps other processes from writing the same output. Gives the file, opened to append.

    Args:
        path (`Path`): the lock file, created with its parent folders if missing.
        name (`str`): the option or key of the output and its value, which begin the messages.

    Raises:
        InputError: if another process holds the lock, the file cannot be written, or the file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except BlockingIOError as error:
        raise InputError(
            f"{name}: another process is writing to it. Wait for that process, or choose another."
        ) from error
    except _NoLocks as error:
        raise InputError(
            f"{name}: {path} cannot be locked ({one_line(error.__cause__ or error)}). Without a lock two processes could write "
            "to it at once. Choose a folder on a file system that has locks."
        ) from error
    except OSError as error:
        raise InputError(f"{name}: cannot be written to ({error.strerror}). Make room, or choose another.") from error
    with file:
        yield file


class _NoLocks(Exception):
    """The file system or the operating system has no locks."""


def _open_locked(path: Path) -> BinaryIO:
    """Opens a file to append and locks it.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    while True:
        file = path.open("ab")
        try:
            _lock(file.fileno())
            if _is_named(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # renamed or removed by its last owner between the opening and the locking: another file is due


def _lock(descriptor: int) -> None:
    try:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:
        raise _NoLocks from error


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Gives a file to write into, which gets its name once its contents are on the disk.

    After an exception it is removed, and an old file of that name is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        file = _open_locked(temporary)
    except (BlockingIOError, _NoLocks) as error:
        if isinstance(error, _NoLocks):
            temporary.unlink()  # just created; without locks no process writes to this name
        temporary = _unused_name(path, "tmp")
        file = temporary.open("xb")
    with file:
        try:
            file.truncate(0)  # a killed process may have left some of it
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the renaming, or a power cut could leave the name without contents
            os.replace(temporary, path)
        finally:
            if _is_named(file, temporary):
                temporary.unlink()
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, through [`new_file`]."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, through [`new_file`]."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: if it is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # No JSON; not UTF-8; a number of more digits than Python converts; brackets deeper than its stack.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not valid JSON ({error}); fetch or make it again") from error


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write into, which gets its name once its contents are on the disk.

    After an exception it is removed, and an old folder of that name is unchanged.

    Args:
        folder (`Path`): the name.
        overwrite (`bool`, *optional*, defaults to `False`): replace a folder of that name; otherwise it must not exist or
            be empty.
    """
    with _temporary_folder(folder) as temporary:
        yield temporary
        replace_folder(temporary, folder, overwrite)


@contextlib.contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """Gives an empty folder; the files written into it replace those in `folder` one by one, once all are on the disk.

    Args:
        folder (`Path`): an existing folder; its other files stay.
        last (`str`): name of the file that is replaced after all others, as the one that readers look for.
    """
    with _temporary_folder(folder) as temporary:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == last)
        sync(*files)
        for file in files:
            os.replace(file, folder / file.name)
        sync(folder)


def replace_folder(new: Path, folder: Path, overwrite: bool = True) -> None:
    """Gives a complete folder its name, and returns once contents and name are on the disk.

    Args:
        new (`Path`): the complete folder, on the same file system.
        folder (`Path`): the name.
        overwrite (`bool`, *optional*, defaults to `True`): replace a folder of that name.
    """
    sync(*new.rglob("*"), new)
    old = _unused_name(folder, "replaced")
    with _held(folder) if overwrite and folder.exists() else contextlib.nullcontext():
        try:
            if overwrite and folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
        sync(folder.parent)
        if old.exists():
            shutil.rmtree(old)


def remove_folder(folder: Path) -> None:
    """Removes a folder; it loses its name first, so that a folder without some of its files never has it."""
    with _held(folder):
        shutil.rmtree(folder.rename(_unused_name(folder, "tmp")))


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder with a temporary name for a folder, removed at the end if it still has that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    unseen = folder.with_name(f".{uuid.uuid4().hex}")
    unseen.mkdir()
    try:
        with _held(unseen):  # before it has a name that other processes clear
            temporary = _unused_name(folder, "tmp")
            os.replace(unseen, temporary)
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        shutil.rmtree(unseen, ignore_errors=True)


def _unused_name(path: Path, kind: str) -> Path:
    """A temporary name that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _clear_abandoned(folder: Path) -> None:
    """Removes what killed processes left next to a folder; a folder that was only set aside gets its name back."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(tmp|replaced)")
    for path in folder.parent.iterdir():
        if not pattern.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError), _held(path) as is_abandoned:
            if is_abandoned and path.suffix == ".replaced" and not folder.exists():
                os.replace(path, folder)
            elif is_abandoned:
                shutil.rmtree(path)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder, so that `_clear_abandoned` of other processes leaves it alone until the end of this one.

    Gives `False` where another process holds it or there are no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock(descriptor)
            is_held = True
        except (BlockingIOError, _NoLocks):
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def sync(*paths: Path) -> None:
    """Waits until the contents of files, and the entries of folders, are on the disk and not only in its cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
