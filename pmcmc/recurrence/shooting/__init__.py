"""Multiple shooting with repair."""
