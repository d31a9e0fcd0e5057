"""Packages that pmcmc can do without until something needs them."""

import importlib.util


def require(packages: tuple[str, ...], who: str, install: str) -> None:
    """Raise where packages are not installed, before anything runs that needs them.

    packages: as they are imported. who: needs them. install: what pip installs them by, such as ``pmcmc[zarr]``.

    Raises:
        ImportError: some are missing, and how to get them.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{who} needs {' and '.join(missing)}, which {verb} not installed: pip install '{install}'.")
