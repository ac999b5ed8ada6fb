"""Errors of the tokenizers library, each as one line.

The library raises plain `Exception`, and it panics if a regular expression fails: a
panic is not an `Exception`, and every thread writes its stack to standard error.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from moex.config.base import ConfigError
from moex.data.files import one_line

ALONE = threading.Lock()


@contextlib.contextmanager
def one_line_errors(begins: str, *, may_panic: bool = False) -> Iterator[None]:
    """Turn an error of the library into a `ConfigError` that begins with `begins`.

    Args:
      begins: says what failed, and for which tokenizer.
      may_panic: hold back output to standard error meanwhile, and drop it if the
        library panics.
    """
    hold: Any = _standard_error_held if may_panic else contextlib.nullcontext
    with hold() as held:
        try:
            yield
        except BaseException as e:
            panicked = type(e).__name__ == "PanicException"
            if not isinstance(e, Exception) and not panicked:
                raise
            if panicked and held is not None:
                held.clear()
            raise ConfigError(f"{begins} ({one_line(e)}).") from None


@contextlib.contextmanager
def _standard_error_held() -> Iterator[list]:
    """Hold back output to file descriptor 2 until the end; then write or drop it.

    Yields:
      A list; if the caller empties it, the output is dropped.
    """
    wanted = [True]
    with ALONE, tempfile.TemporaryFile() as held:
        old = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield wanted
        finally:
            os.dup2(old, 2)
            os.close(old)
            if wanted:
                held.seek(0)
                os.write(2, held.read())
