"""Kubernetes' quantities: `64Mi`, `100m`, `1.5`, `1G`."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DECIMAL = {"m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12)}


def parse(text: object) -> Decimal:
    """In bytes, or cores. ValueError for anything else."""
    word = str(text)
    factor = Decimal(1)
    if word[-2:] in BINARY:
        word, factor = word[:-2], Decimal(BINARY[word[-2:]])
    elif word[-1:] in DECIMAL:
        word, factor = word[:-1], DECIMAL[word[-1:]]
    try:
        return Decimal(word) * factor
    except InvalidOperation as error:
        raise ValueError(f"{text!r} is no quantity") from error


def whole(text: object) -> int:
    """Whole bytes, rounded up."""
    return int(parse(text).to_integral_value(rounding="ROUND_CEILING"))
