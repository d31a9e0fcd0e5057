"""Foreign packages, imported lazily and only here: NumPyro, BlackJAX, ArviZ. Types are converted, nothing else."""
