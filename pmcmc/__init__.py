"""Sample one exact Markov chain in parallel across its length."""
