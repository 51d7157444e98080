"""Simulates power cuts: watches `os.fsync` and renames, and reports what was renamed before it was on the disk."""

import os
from pathlib import Path

import pytest


class Disk:
    """Records each rename below a folder, and checks that a power cut would leave the old or the new contents.

    Contents must be on the disk before the rename, and the entry in the folder after it.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.named, self.problems = folder, [], []
        self._on_disk: dict[int, tuple[int, int]] = {}  # inode -> size and time of the last change
        self._entries: set[Path] = set()  # folders with a rename that is not on the disk
        real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

        def fsync(descriptor: int) -> None:
            real_fsync(descriptor)
            self._on_disk[os.fstat(descriptor).st_ino] = _state(os.fstat(descriptor))
            self._entries = {path for path in self._entries if path.stat().st_ino != os.fstat(descriptor).st_ino}

        def watched(real):
            def rename(source, target, **options) -> None:
                self._before(Path(source), Path(target))
                real(source, target, **options)
                if Path(target) in self.named:
                    self._entries.add(Path(target).parent)

            return rename

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", watched(real_replace))
        patch.setattr(os, "rename", watched(real_rename))

    def _before(self, source: Path, target: Path) -> None:
        if not target.is_relative_to(self.folder) or target.name.startswith("."):
            return  # temporary names may hold anything
        for path in (source, *source.rglob("*")):
            if self._on_disk.get(path.stat().st_ino) != _state(path.stat()):
                self.problems.append(f"{path} was not on the disk when {target.name} got its name")
        self.named.append(target)

    def check(self, *names: str) -> None:
        """Everything was durable, and each of these names (below the folder) came into being by a rename."""
        entries = {path for path in self._entries if path.exists()}
        assert not self.problems and not entries, (self.problems, entries)
        found = {path.relative_to(self.folder).as_posix() for path in self.named}
        assert set(names) <= found, set(names) - found


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
