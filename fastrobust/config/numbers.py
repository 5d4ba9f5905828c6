"""Numbers as people write them: 8/255, 5e-3."""

from typing import Any


def parse_number(value: Any) -> Any:
    """`8/255`, `123.675/255`, `5e-3` (a string in YAML 1.1) and plain numbers -> float; anything else is left for the
    schema to refuse. Raises ValueError."""
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            return float(top) / float(bottom) if slash else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"'{value}' is not a number; write 0.03 or 8/255") from None
    if isinstance(value, bool):
        raise ValueError("expected a number, got true/false")
    return value


def radius_in_words(epsilon: float, norm: str = "linf") -> str:
    """8/255 -> `8/255`; in another norm than L-infinity `L2 0.5`."""
    return f"{'' if norm == 'linf' else f'{norm.upper()} '}{describe(epsilon)}"


def ball_in_words(epsilon: float, norm: str = "linf") -> str:
    """8/255 -> `epsilon 8/255`; in another norm than L-infinity `L2, epsilon 0.5`."""
    return f"{'' if norm == 'linf' else f'{norm.upper()}, '}epsilon {describe(epsilon)}"


def describe(epsilon: float) -> str:
    """0.3 -> `0.3`, 8/255 -> `8/255`."""
    scaled = epsilon * 255
    if epsilon == round(epsilon, 3):
        return f"{epsilon:g}"
    return f"{round(scaled)}/255" if abs(scaled - round(scaled)) < 1e-6 and round(scaled) else f"{epsilon:g}"
