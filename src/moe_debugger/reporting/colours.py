"""The page's diverging scale of loads: log2 of load over fair share, quiet in the middle, one ramp for each theme."""

import math

__all__ = ["NUM_STEPS", "RAMPS", "Rgb", "css", "hot_end", "ink_on", "scale_position", "scale_step"]

Rgb = tuple[int, int, int]

_COLD_END = -3.0
# The share of each half that one factor of two takes, so that 1/2x..2x stays near neutral whatever E/k is.
_QUIET = 0.25
NUM_STEPS = 33

_STOPS = {
    "dark": "3a8ade 357bc6 306cac 2c5e95 2a507a 284363 27384c 273342 272d36 34312e 523d29 86532a bd6c2c da893b faa84d "
    "ffc981 ffedc3",
    "light": "0e5eae 2973bb 488ac8 669fd4 8eb7df b2cee9 d3e2f1 e0e9f3 eef1f5 f3e9dd f3d7b7 ebb882 e1974c cf7a2f bc5b0f "
    "944206 632700",
}


def _ramp(stops: str) -> list[Rgb]:
    colours = [tuple(bytes.fromhex(stop)) for stop in stops.split()]
    ramp = []
    for step in range(NUM_STEPS):
        at = step / (NUM_STEPS - 1) * (len(colours) - 1)
        low = min(int(at), len(colours) - 2)
        red, green, blue = (
            round(a + (b - a) * (at - low)) for a, b in zip(colours[low], colours[low + 1], strict=True)
        )
        ramp.append((red, green, blue))
    return ramp


RAMPS: dict[str, list[Rgb]] = {theme: _ramp(stops) for theme, stops in _STOPS.items()}


def hot_end(num_experts: int, top_k: int) -> float:
    """Return log2 of the largest load over the fair share that top-k routing allows."""
    return max(1.0, math.log2(num_experts / max(1, top_k)))


def scale_position(ratio: float, hot: float) -> float:
    """Return the place of a load on the scale, 0 (cold end) to 1 (hot end), 0.5 = uniform."""
    if not ratio > 0:
        return 0.0
    value = math.log2(ratio)
    if value <= 0:
        return 0.5 * (1 - min(1.0, value / _COLD_END))
    quiet_end = min(1.0, hot / 2)
    if value <= quiet_end:
        return 0.5 + 0.5 * _QUIET * value / quiet_end
    return 0.5 + 0.5 * min(1.0, _QUIET + (1 - _QUIET) * (value - quiet_end) / (hot - quiet_end))


def scale_step(ratio: float, hot: float) -> int:
    """Return the index into a ramp."""
    return round(scale_position(ratio, hot) * (NUM_STEPS - 1))


def ink_on(colour: Rgb) -> str:
    """Return black or white, whichever reads better on that colour (WCAG relative luminance)."""

    def linear(channel: int) -> float:
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    luminance = 0.2126 * linear(colour[0]) + 0.7152 * linear(colour[1]) + 0.0722 * linear(colour[2])
    return "#000" if luminance > 0.179 else "#fff"


def css(theme: str) -> str:
    """Return the rules of the classes h0 to h32 (fill) and i0 to i32 (ink on it) of a theme."""
    return "".join(
        f".chart .h{step}{{fill:#{bytes(colour).hex()}}}.chart .i{step}{{fill:{ink_on(colour)}}}"
        for step, colour in enumerate(RAMPS[theme])
    )
