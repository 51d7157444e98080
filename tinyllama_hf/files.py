"""Locks, and files and folders that are never seen in parts: by a reader, by a second process, or after a power cut.

Everything is written under a temporary name, synced to the disk, and renamed. Temporary names start with a dot and the
final name, and end in `.tmp` or `.replaced`. Two processes never share one. The next process that writes to the same
name removes what a killed process left, or restores the folder that it had moved aside.

All locks are `flock` locks, which the operating system releases when a process ends, even if it is killed. Windows and
some network file systems have none. There [`locked`] raises an error, and what a killed process left is not removed.
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
    """Locks a file, so that other processes cannot write the same output. Yields the file, opened to append.

    Args:
        path (`Path`): the lock file, created with its parent folders if missing.
        name (`str`): option or key of the output, and its value; starts the error messages.

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
            f"{name}: {path} cannot be locked ({one_line(error.__cause__ or error)}). Without a lock, two processes "
            "could write to it at the same time. Choose a folder on a file system with locks."
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
        file.close()  # its last owner renamed or removed it between the opening and the locking; open the new one


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
    """Yields a file to write to, which gets its name once its contents are on the disk.

    After an exception the file is removed, and an existing file of that name is unchanged.

    Raises:
        OSError: if it cannot be written; with its final name, which that of a full disk would not have.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
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
                os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file under the name
                os.replace(temporary, path)
            finally:
                if _is_named(file, temporary):
                    temporary.unlink()
    except OSError as error:
        if error.errno is not None and (error.filename is None or Path(error.filename) == temporary):
            error.filename = str(path)
        raise
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
    # Invalid JSON, not UTF-8, a number with more digits than Python converts, or nesting deeper than its stack.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not valid JSON ({error}). Download or create it again.") from error


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder to write to, which gets its name once its contents are on the disk.

    After an exception the new folder is removed, and an existing folder of that name is unchanged.

    Args:
        folder (`Path`): final path of the folder.
        overwrite (`bool`, *optional*, defaults to `False`): replace an existing folder. Otherwise it must be empty or
            missing.
    """
    with _temporary_folder(folder) as temporary:
        yield temporary
        replace_folder(temporary, folder, overwrite)


@contextlib.contextmanager
def new_files(folder: Path, last: str) -> Iterator[Path]:
    """Yields an empty folder; once all files in it are on the disk, they replace those in `folder` one by one.

    Args:
        folder (`Path`): an existing folder; its other files stay.
        last (`str`): name of the file to replace last, because readers look for it.
    """
    with _temporary_folder(folder) as temporary:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == last)
        sync(*files)
        for file in files:
            os.replace(file, folder / file.name)
        sync(folder)


def replace_folder(new: Path, folder: Path, overwrite: bool = True) -> None:
    """Renames a complete folder, and returns once its contents and its name are on the disk.

    Args:
        new (`Path`): the complete folder, on the same file system.
        folder (`Path`): final path of the folder.
        overwrite (`bool`, *optional*, defaults to `True`): replace an existing folder.
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


def link_folder(source: Path, folder: Path) -> None:
    """Gives the files of a folder a second place, through [`new_folder`]. Replaces an existing folder.

    The files are hard links, which need no space, or copies if the file system has no hard links.
    """

    def link(file: str, name: str) -> None:
        try:
            os.link(file, name)
        except OSError:
            shutil.copyfile(file, name)

    with new_folder(folder, overwrite=True) as temporary:
        shutil.copytree(source, temporary, copy_function=link, dirs_exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder. It is renamed first, so that a folder under this name is never incomplete."""
    with _held(folder):
        shutil.rmtree(folder.rename(_unused_name(folder, "tmp")))


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder with a temporary name, and removes it at the end if it still has that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    unseen = folder.with_name(f".{uuid.uuid4().hex}")
    unseen.mkdir()
    try:
        with _held(unseen):  # before it has a name that other processes may remove
            temporary = _unused_name(folder, "tmp")
            os.replace(unseen, temporary)
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        shutil.rmtree(unseen, ignore_errors=True)


def _unused_name(path: Path, kind: str) -> Path:
    """Returns a temporary name that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _clear_abandoned(folder: Path) -> None:
    """Removes what killed processes left next to a folder; renames a folder back that was only moved aside."""
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
    """Locks a folder, so that `_clear_abandoned` of other processes does not touch it while this process lives.

    Yields `False` if another process holds the lock or there are no locks.
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
    """Waits until the contents of files and the entries of folders are on the disk, not only in the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
