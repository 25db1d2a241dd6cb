"""Sizes as people write them."""

from distill.errors import UsageError

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | int, option: str) -> int:
    """ "20GB" → 20 000 000 000; a plain number is bytes.

    Raises:
        UsageError: neither.
    """
    number, unit = str(text).strip(), 1
    for name, factor in UNITS.items():
        if number.lower().endswith(name.lower()):
            number, unit = number[: -len(name)], factor
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise UsageError(f"{option}={text}: expected bytes or a size such as 500MB or 20GB") from None


def human(size: int) -> str:
    """Bytes in the largest unit that leaves at least one of it."""
    for name, factor in reversed(UNITS.items()):
        if size >= factor:
            return f"{size / factor:.1f} {name}"
    return f"{size} bytes"
