"""Where all noise comes from: counter-based random bits, distributions made of them, and the streams of a run."""
