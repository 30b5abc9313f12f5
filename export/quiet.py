"""Running other people's exporters without their chatter on our terminal, and without the network."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from unittest import mock

import huggingface_hub.constants


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Drop prints, progress bars, warnings and log records, and keep huggingface_hub off the network, while the block runs.

    The exporters print step marks, version drift and file paths that mean nothing to a recipe's author. What goes wrong
    still arrives: exceptions pass through. Acts on the whole process, so it belongs in a stage's child process.
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
