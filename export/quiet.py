"""Run third-party exporters without their output on the terminal, and without the network."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import huggingface_hub.constants


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Drop prints, progress bars, warnings and log records, and keep huggingface_hub off the network, while the block runs.

    The exporters print step marks, version drift and file paths that mean nothing to a recipe's author. Exceptions
    pass through. This acts on the entire process, so it belongs in a stage's child process.
    """
    disabled = logging.root.manager.disable
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Drop what compiled code writes to the process's standard error (file descriptor 2) while the block runs.

    For a library that offers no other way. Exceptions pass through.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
