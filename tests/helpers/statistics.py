"""Thresholds of the statistical tests, all from one declared failure rate."""

from scipy import stats

# The chance that a correct pmcmc fails at least one comparison of a statistical test. It is for the whole suite:
# each test divides it by the number of comparisons it makes, and there are few enough such tests that their sum
# stays near it. Seeds are fixed, so a failure repeats; look for the bug, not for another seed.
TEST_FAILURE_RATE = 1e-6


def z_bound(num_comparisons: int) -> float:
    """The |z| that none of num_comparisons standard normals exceeds, but with probability TEST_FAILURE_RATE.

    Two-sided normal quantile at TEST_FAILURE_RATE / num_comparisons (Bonferroni, so dependence does not matter).
    num_comparisons: how many z-scores are held against the bound; to share the rate over several tests, their total.

    Example:
        >>> round(z_bound(1), 2), round(z_bound(100), 2)
        (4.89, 5.73)
    """
    if num_comparisons < 1:
        raise ValueError(f"num_comparisons must be at least 1, got {num_comparisons}")
    return float(stats.norm.isf(TEST_FAILURE_RATE / num_comparisons / 2))
