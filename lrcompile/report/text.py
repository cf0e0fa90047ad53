"""Numbers and names as people read them."""

from __future__ import annotations

import math
import re
import unicodedata

_BYTES = ("B", "KB", "MB", "GB", "TB", "PB")
_COUNTS = ("", "K", "M", "G", "T", "P")
_NONE = "–"
# Control characters, line separators, and the marks that reorder text: none may act on a terminal or a page.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")


def human_bytes(value: float | None) -> str:
    """``1.50 KB``, three digits, powers of 1024; a dash for None."""
    return _scaled(value, 1024, _BYTES)


def human_count(value: float | None) -> str:
    """``22.7 M``, three digits, powers of 1000; a dash for None."""
    return _scaled(value, 1000, _COUNTS)


def human_seconds(value: float | None) -> str:
    """``850 ms``, ``12.3 s`` or ``4 min 05 s``."""
    if value is None:
        return _NONE
    if not math.isfinite(value):
        return str(value)
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s"


def human_ms(value: float | None) -> str:
    """Milliseconds with three digits."""
    return _NONE if value is None else f"{_three(value)} ms"


def human_float(value: object, digits: int = 4) -> str:
    """That many significant digits; text and None pass."""
    if value is None:
        return _NONE
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return visible(str(value))
    return f"{value:.{digits}g}"


def human_change(ratio: float | None) -> str:
    """What a ratio after ÷ before means: ``−42.0 %``, ``+3.1 %``, ``same``."""
    if ratio is None:
        return ""
    percent = f"{abs(ratio - 1) * 100:.1f}"
    if percent == "0.0":
        return "same"
    return f"{'−' if ratio < 1 else '+'}{percent} %"


def visible(text: str) -> str:
    """``text`` on one line, with every character that would act instead of show written as an escape."""
    return _HIDDEN.sub(_escape, re.sub(r"[ \t\r\n]+", " ", text))


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters; names differ at their ends, so the middle is left out."""
    text = visible(text)
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in shape)


def ascii_text(text: str) -> str:
    """A spelling for terminals that know ASCII only."""
    for fancy, simple in (("×", "x"), ("−", "-"), ("–", "-"), ("…", "..."), ("≈", "~"), ("→", "->"), ("·", "-")):
        text = text.replace(fancy, simple)
    return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode()


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _scaled(value: float | None, base: int, units: tuple[str, ...]) -> str:
    if value is None:
        return _NONE
    if not math.isfinite(value):
        return str(value)
    if value < 0:
        return f"−{_scaled(-value, base, units)}"
    amount = float(value)
    for power, unit in enumerate(units):
        text = f"{amount:.0f}" if power == 0 else _three(amount)
        if float(text) < base or unit == units[-1]:
            return f"{text} {unit}".strip()
        amount /= base
    raise AssertionError("the last unit always returns")


def _three(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
