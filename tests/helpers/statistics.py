"""Thresholds of the statistical tests, all from one declared failure rate."""

from scipy import stats

# Probability that a correct pmcmc fails at least one comparison of a statistical test, for the whole suite: each test
# divides it by its number of comparisons, and there are few enough such tests that their sum stays near it. Seeds are
# fixed, so a failure repeats; look for the bug, not for another seed.
TEST_FAILURE_RATE = 1e-6


def z_bound(num_comparisons: int) -> float:
    """Return the |z| that num_comparisons standard normals exceed only with probability TEST_FAILURE_RATE.

    It is the two-sided normal quantile at TEST_FAILURE_RATE / num_comparisons (Bonferroni, so dependence does not
    matter).

    Args:
        num_comparisons: Number of z-scores compared with the bound; to share the rate over several tests, their total.

    Example:
        >>> round(z_bound(1), 2), round(z_bound(100), 2)
        (4.89, 5.73)
    """
    if num_comparisons < 1:
        raise ValueError(f"num_comparisons must be at least 1, got {num_comparisons}")
    return float(stats.norm.isf(TEST_FAILURE_RATE / num_comparisons / 2))
