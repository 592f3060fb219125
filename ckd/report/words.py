"""How figures are written, in pages and tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 60  # characters of a name in a table


def percent(share: float | None) -> str:
    """0.4123 -> "41.23 %"."""
    return "–" if share is None else f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """ "12.3 s", "4 min 05 s", "2 h 03 min"."""
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where that is short."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.3e}"


def short(text: str, longest: int = LONGEST) -> str:
    """At most `longest` characters: the start and the end, since paths differ at their end."""
    if len(text) <= longest:
        return text
    end = longest // 2
    return f"{text[: longest - end - 1]}…{text[-end:]}"


def short_all(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """`short` of each, but longer where names would become equal: they may differ in the middle."""
    shown = [short(name, longest) for name in names]
    while longest < max(map(len, names), default=0):
        longest *= 2
        counts = Counter(shown)
        shown = [
            short(name, longest) if counts[text] > 1 else text for name, text in zip(names, shown)
        ]
    return shown


def interval(correct: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy that is measured on `images` images."""
    z = 1.959964
    share, scale = correct / images, 1 + z * z / images
    middle = (share + z * z / (2 * images)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    # Exactly, where rounding would leave 1e-17.
    return middle - half if correct else 0.0, middle + half if correct < images else 1.0


def peak_mib(result: Mapping[str, Any]) -> float:
    """Peak memory of a result: on a GPU that of its allocator; on the CPU the peak resident size of
    the process, PyTorch's libraries included."""
    return result["peak_cuda_mib"] if "peak_cuda_mib" in result else result["peak_rss_mib"]


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "duration": duration,
    "number": number,
    "short": short,
}
