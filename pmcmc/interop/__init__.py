"""Adapters to other packages: NumPyro, BlackJAX, ArviZ and Zarr.

Optional packages are imported inside the functions that use them. Modules here convert types between those packages and
pmcmc; they sample nothing themselves.
"""
