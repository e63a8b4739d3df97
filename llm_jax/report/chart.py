"""Line charts as SVG text, to stand inside a page."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 240, 64, 28, 12
COLORS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#b8860b", "#cf222e")
MOST_POINTS = 500  # a line of more is thinned; what lies between two pixels is not seen

Points = Sequence[tuple[float, float]]


def line_chart(title: str, lines: Mapping[str, Points]) -> str:
    """An <svg> of named lines over steps; empty if there is nothing to draw."""
    lines = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in lines.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 10)
        down = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for y in y_ticks:
        _, down = place(left, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{down}" y2="{down}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{y:.6g}</text>')
    for x in x_ticks:
        if left <= x <= right:
            across, _ = place(x, low)
            parts.append(f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="middle">{x:.6g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        step = -(-len(points) // MOST_POINTS)
        thin = [*points[::step], points[-1]]
        path = " ".join(f"{across},{down}" for across, down in (place(x, y) for x, y in thin))
        parts.append(f'<polyline points="{path}" stroke="{color}"/>')
        if len(lines) > 1:
            legend = html.escape(name)
            parts.append(
                f'<text x="{LEFT + 8}" y="{TOP + 14 * (number + 1)}" fill="{color}">{legend}</text>'
            )
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def ticks(low: float, high: float) -> list[float]:
    """Four to eleven round numbers around the range, its ends inside them."""
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    size = next(unit * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (unit * part) <= 10)
    first, last = math.floor(low / size), math.ceil(high / size)
    return [number * size for number in range(first, max(last, first + 1) + 1)]
