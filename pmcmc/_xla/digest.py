"""Digests of content, by which a file recognises the model that it was made with."""

import hashlib
import sys
from types import CodeType
from typing import Any

from pmcmc._xla.content import Content
from pmcmc._xla.trace import Trace

# What digests depend on beside JAX: Python, for the code of callbacks, and what is traced and the form of `Content`,
# counted here.
DIGEST_VERSIONS = {"python": f"{sys.version_info.major}.{sys.version_info.minor}", "content": "3"}


def digest(value: Any) -> str:
    """Return a hash of a trace, arrays, or tuples of them, as text.

    It is the same in every process with the same version of JAX and `DIGEST_VERSIONS`.
    """
    return hashlib.sha256(_stable(Content().of_value(value)).encode()).hexdigest()


def _stable(value: Any) -> str:
    """Convert content to text without addresses."""
    if isinstance(value, Trace):
        return _stable(value.key)
    if isinstance(value, tuple):
        return f"({','.join(map(_stable, value))})"
    if isinstance(value, (str, bytes, int)):
        return repr(value)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, frozenset):  # a constant of code, whose order differs from process to process
        return f"{{{','.join(sorted(map(_stable, value)))}}}"
    if isinstance(value, CodeType):  # without its file and lines
        return _stable((value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_consts))
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
