"""How numbers are written for people."""


def duration(seconds: float) -> str:
    """Seconds from 1 s on, else milliseconds."""
    return f"{seconds:,.2f} s" if abs(seconds) >= 1 else f"{1e3 * seconds:,.1f} ms"
