"""Intervals of shares and of their differences, with 95 % confidence, that are honest for few rows."""

import math

Z = 1.959963984540054


def share_interval(hits: int, rows: int) -> tuple[float, float]:
    """Wilson's interval of a share, with 95 % confidence; it is honest for few rows, too.

    Written out, because scipy.stats, which has it, takes seconds to import.
    """
    middle = (hits + Z * Z / 2) / (rows + Z * Z)
    width = Z * math.sqrt(hits * (rows - hits) / rows + Z * Z / 4) / (rows + Z * Z)
    return max(0.0, middle - width), min(1.0, middle + width)


def difference_interval(won: int, lost: int, rows: int) -> tuple[float, float]:
    """The interval of the difference of two shares of the same rows, with 95 % confidence.

    Bonett and Price (2012): one row more that only the one, and one that only the other gets right. So it does not
    vanish where few rows happen to agree.

    Args:
        won: rows that only the one gets right; `lost`: only the other.
    """
    one, other = (won + 1) / (rows + 2), (lost + 1) / (rows + 2)
    width = Z * math.sqrt((one + other - (one - other) ** 2) / (rows + 2))
    return max(-1.0, one - other - width), min(1.0, one - other + width)
