"""Checks of output files, which commands make before long work."""

import os
from pathlib import Path


def check_output_file(option: str, path: Path) -> None:
    """Checks that a file can be written. Missing folders are created later.

    Raises:
        InputError: if the path is a folder, or is in a file or a folder that cannot be written to.
    """
    from tinyllama_hf.errors import InputError

    if path.is_dir():
        raise InputError(f"{option} {path} is a folder. Name a file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"{option} {path}: {folder} is a file. Name a file in a folder")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: {folder} cannot be written to. Choose another folder")
