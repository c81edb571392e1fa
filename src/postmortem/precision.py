"""What float16 cannot hold: the limits that the check of files and the loader share."""

# The greatest finite float16; an update whose norm exceeds it can turn one unit of input infinite.
FLOAT16_LIMIT = 65_504.0
# Half of the smallest float16: what lies at or below it is rounded to zero.
FLOAT16_ZERO = 2.0**-25


def update_bound(scale: float, norm_a: float, norm_b: float) -> float:
    """Upper bound of the norm, and so of every element, of the update scale · B · A."""
    return abs(scale) * norm_a * norm_b


def describe_overflow(largest: float, bound: float) -> str | None:
    """What is too large for float16, in words; None where nothing is.

    `largest` is the greatest magnitude in A and B, `bound` that of `update_bound`.
    """
    if max(bound, largest) <= FLOAT16_LIMIT:
        return None
    return f"largest value {largest:.3g}, update norm {bound:.3g}"


def describe_underflow(bound: float) -> str | None:
    """What float16 rounds to zero, in words; None for an update that is zero already."""
    if not 0 < bound <= FLOAT16_ZERO:
        return None
    return f"update norm {bound:.3g}, which float16 rounds to zero"
