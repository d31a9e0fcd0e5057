"""Adapters to other packages: NumPyro, BlackJAX, ArviZ and Zarr.

Optional packages are imported inside the functions that use them. Modules here convert types between those packages and
pmcmc; they sample nothing themselves.
"""

import importlib.util


def require(packages: tuple[str, ...], who: str, install: str) -> None:
    """Raise if a package is not installed.

    Args:
        packages: Names as they are imported.
        who: What needs them; the subject of the error message.
        install: What to pass to ``pip install``, such as ``pmcmc[zarr]``.

    Raises:
        ImportError: A package is missing. The message says how to install it.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{who} needs {' and '.join(missing)}, which {verb} not installed: pip install '{install}'.")
