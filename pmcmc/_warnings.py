"""Where warnings point: at the user's line, however many functions lie between it and the warning."""

import os
import sys
from importlib.util import find_spec

# Functions in these folders are not the user's.
_PACKAGES = map(find_spec, (__name__.split(".", maxsplit=1)[0], "jax", "numpyro"))
_INNER = tuple(os.path.join(os.path.dirname(spec.origin), "") for spec in _PACKAGES if spec and spec.origin)


def user_level() -> int:
    """Return the ``stacklevel`` at which a warning of the function that calls this points at the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, level = frame.f_back, level + 1
    return level
