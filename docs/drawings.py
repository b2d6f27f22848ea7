"""The drawings of the pages: `python docs/drawings.py` writes them to docs/drawings/.

They are SVG written as text, not by matplotlib, so that every release of everything writes the same bytes;
`tests/docs/test_drawings.py` compares them with the files.  The light card under each is there for dark pages.
"""

import math
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "drawings"
NO_BREAK = "\N{NO-BREAK SPACE}"
INK, FAINT, CARD = "#1f2933", "#66727f", "#fcfcfa"
STUDENT, TEACHER, GRADIENT, NUMBERS = "#bcd3f0", "#f5d3a6", "#bfe0c0", "#ececf4"
# Bytes that the operators of eager PyTorch read and write, forward and backward, in passes over a bfloat16 [N, V] array.
EAGER_PASSES = 86


class Drawing:
    """A card on which boxes, lines of text and arrows are put; units are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, sans-serif" font-size="14">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{FAINT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{CARD}"/>',
        ]

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", size: int = 14, color: str = INK) -> None:
        words = escape(words.replace("  ", 2 * NO_BREAK))  # SVG would join spaces
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{color}"'
        self.parts.append(f"<text {place}>{words}</text>")

    def box(self, x: float, y: float, width: float, height: float, fill: str, *lines: str, size: int = 14) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{FAINT}"/>'
        )
        first = y + height / 2 + size * 0.35 - (len(lines) - 1) * size * 0.65
        for number, line in enumerate(lines):
            self.text(x + width / 2, first + number * size * 1.3, line, size=size)

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{FAINT}" stroke-width="1.5" fill="none" '
            'marker-end="url(#head)"/>'
        )

    def cells(self, x: float, y: float, count: int, size: float, fill: str) -> None:
        for number in range(count):
            self.box(x + number * size, y, size, size, fill)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def row() -> str:
    """Return the drawing of one row: parts, their six numbers, the merge, the coefficients, the gradient."""
    drawing = Drawing(
        860, 560, "A row cut into parts, the six numbers of each, their merge, and the gradient per element"
    )
    count, size, gap, left = 7, 24.0, 44.0, 150.0
    part = count * size
    starts = [left + number * (part + gap) for number in range(3)]
    centres = [start + part / 2 for start in starts]
    middle = centres[1]
    drawing.text(20, 48, "student z", anchor="start")
    drawing.text(20, 76, "teacher y", anchor="start")
    for number, (start, centre) in enumerate(zip(starts, centres, strict=True)):
        drawing.text(centre, 22, f"part {number + 1} of the row", size=12, color=FAINT)
        drawing.cells(start, 31, count, size, STUDENT)
        drawing.cells(start, 59, count, size, TEACHER)
        drawing.arrow(centre, 90, centre, 116)
        drawing.box(centre - 78, 120, 156, 46, NUMBERS, "m_s   d_1   d_T", "m_t    e     c")
        drawing.arrow(centre, 170, middle + (number - 1) * 60, 206)
    drawing.text(20, 139, "2  statistics:", anchor="start")
    drawing.text(20, 157, "six numbers", anchor="start")
    drawing.box(middle - 140, 210, 280, 46, NUMBERS, "m_s   d_1   d_T   m_t    e     c", "of the whole row")
    drawing.text(20, 238, "merge", anchor="start")
    drawing.arrow(middle - 80, 260, middle - 150, 296)
    drawing.arrow(middle + 80, 260, middle + 150, 296)
    drawing.box(
        middle - 290, 300, 250, 50, NUMBERS, "CE = log d_1 - (z[label] - m_s)", "KL = c / (e T) + log(d_T / e)", size=13
    )
    drawing.box(middle + 40, 300, 250, 50, NUMBERS, "m_s   m_t   A   B   C   W   R", size=14)
    drawing.text(middle - 165, 370, "3  losses, with the row's weights (1)", size=13)
    drawing.text(middle + 165, 370, "coefficients: the six numbers, with the", size=13)
    drawing.text(middle + 165, 387, "row's weights (1) and the upstream gradient", size=13)
    for start, centre in zip(starts, centres, strict=True):
        drawing.arrow(middle + 165 + (centre - middle) * 0.18, 396, centre, 432)
        drawing.cells(start, 436, count, size, GRADIENT)
    drawing.text(20, 453, "4  gradient", anchor="start")
    drawing.text(
        middle, 492, "dL/dz[j] = A e^u + B e^(u/T) - C e^(v/T) - W [j = label],   u = z[j] - m_s,   v = y[j] - m_t"
    )
    drawing.text(
        middle, 516, "Each element needs its own two logits and its row's seven numbers: parts in any order, on any core.",
        size=13, color=FAINT,
    )  # fmt: skip
    drawing.text(
        middle, 538, "Parts are columns of a thread, tiles of a program, programs of a row.",
        size=13, color=FAINT,
    )  # fmt: skip
    return drawing.svg()


def passes() -> str:
    """Return the drawing of memory passes: eager PyTorch, two launches, one launch, chunks of hidden states."""
    drawing = Drawing(860, 560, "Passes over memory of eager PyTorch, two launches, one launch, and chunks of tokens")
    left, unit, height = 190.0, 54.0, 40.0
    label = {"anchor": "start"}

    drawing.text(20, 34, "Passes over an [N, V] array of bfloat16, loss and gradient together", size=15, **label)
    drawing.text(20, 76, "eager PyTorch", **label)
    width = 645.0
    drawing.box(
        left,
        52,
        width,
        height,
        "#e4e4e4",
        f"{EAGER_PASSES}: each operator reads arrays and writes another, most in float32",
    )
    drawing.parts.append(  # a bar that is cut
        f'<path d="M{left + width - 24:g} 48l-6 48M{left + width - 16:g} 48l-6 48" stroke="{CARD}" stroke-width="5"/>'
    )

    def bars(y: float, words: list[tuple[str, str]]) -> None:
        for number, (fill, line) in enumerate(words):
            drawing.box(left + number * unit, y, unit, height, fill, line, size=12)

    reads = [(STUDENT, "read z"), (TEACHER, "read y")]
    writes = [(GRADIENT, "write g")]
    drawing.text(20, 147, "two launches: 5", **label)
    bars(122, reads + reads + writes)
    drawing.text(left + unit, 180, "forward", size=12, color=FAINT)
    drawing.text(left + 3.5 * unit, 180, "backward", size=12, color=FAINT)
    drawing.text(left + 5 * unit + 16, 146, "statistics of all rows, then the gradient of all rows", size=13, **label)

    drawing.text(20, 227, "one launch: 3", **label)
    bars(202, reads + writes)
    drawing.text(left + 5 * unit + 16, 218, "few rows in flight: the second reading of a row", size=13, **label)
    drawing.text(left + 5 * unit + 16, 236, "hits L2, and memory is read once", size=13, **label)

    top = 300
    drawing.text(
        20, top, "From hidden states: chunks of tokens, one after another in the same buffers", size=15, **label
    )
    drawing.box(20, top + 22, 60, 190, STUDENT)
    drawing.box(86, top + 22, 60, 190, TEACHER)
    for number in range(1, 5):
        y = top + 22 + number * 38
        drawing.parts.append(f'<path d="M20 {y:g}H146" stroke="{FAINT}" stroke-dasharray="4 3"/>')
    drawing.text(50, top + 230, "student", size=12, color=FAINT)
    drawing.text(116, top + 230, "teacher", size=12, color=FAINT)
    drawing.text(83, top + 246, "hidden states [N, H]", size=12, color=FAINT)
    y = top + 79.0
    drawing.arrow(150, y, 236, y)
    drawing.text(193, y - 26, "heads", size=12, color=FAINT)
    drawing.text(193, y - 10, "[V, H]", size=12, color=FAINT)
    drawing.box(240, y - 32, 170, 28, STUDENT, "logits [chunk, V]", size=13)
    drawing.box(240, y + 4, 170, 28, TEACHER, "logits [chunk, V]", size=13)
    drawing.arrow(414, y, 480, y)
    drawing.text(447, y - 10, "sweep", size=12, color=FAINT)
    drawing.box(484, y - 32, 170, 28, GRADIENT, "gradient, over z", size=13)
    drawing.text(569, y + 22, "loss of the chunk", size=13)
    drawing.arrow(658, y - 18, 700, y - 18)
    drawing.box(704, y - 40, 140, 44, GRADIENT, "hidden gradient", "[chunk, H]", size=12)
    drawing.arrow(640, y + 2, 700, y + 34)
    drawing.box(704, y + 14, 140, 44, GRADIENT, "weight gradient", "[V, H], a float32 sum", size=12)
    drawing.parts.append(f'<path d="M569 {y + 36:g}V{y + 88:g}H193" stroke="{FAINT}" stroke-width="1.5" fill="none"/>')
    drawing.arrow(193, y + 88, 193, y + 8)
    drawing.text(381, y + 108, "the next chunk, in the same two buffers", size=13, color=FAINT)
    return drawing.svg()


def peaks() -> str:
    """Return the drawing of docs/choosing-a-divergence.md: the teacher's two peaks, and the students that it finds."""
    drawing = Drawing(860, 330, "A teacher with two peaks, a student that covers both and one that takes the first")
    left, bottom, height = 60.0, 270.0, 2_800.0
    unit = 7.4  # per token

    def bell(token: int, centre: float, width: float) -> float:
        return math.exp(-((token - centre) ** 2) / (2 * width**2))

    def curve(mass: list[float], color: str, fill: str, dash: str = "") -> None:
        points = [(left + token * unit, bottom - height * value / sum(mass)) for token, value in enumerate(mass)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in [(left, bottom), *points, (points[-1][0], bottom)])
        drawing.parts.append(
            f'<path d="M{path}" fill="{fill}" fill-opacity="0.5" stroke="{color}" stroke-width="2"{dash}/>'
        )

    tokens = range(100)
    curve([bell(token, 30, 5) + math.exp(-0.7) * bell(token, 70, 5) for token in tokens], "#c98a2b", TEACHER)
    curve([bell(token, 42.4, 20.9) for token in tokens], "#2f6fb7", STUDENT)
    curve([bell(token, 30, 5) for token in tokens], "#3f8f46", "none", ' stroke-dasharray="6 4"')
    drawing.parts.append(f'<path d="M{left:g} {bottom:g}H{left + 99 * unit:g}" stroke="{FAINT}"/>')
    for token in (0, 30, 70, 99):
        drawing.text(left + token * unit, bottom + 20, str(token), size=12, color=FAINT)
    drawing.text(left + 49.5 * unit, bottom + 42, "token", size=12, color=FAINT)
    key = {"anchor": "start", "size": 13}
    drawing.text(left + 42 * unit, 60, "teacher: two peaks, the first of twice the mass", color="#9a6410", **key)
    drawing.text(left + 42 * unit, 82, "student by forward KL: covers both, and the gap", color="#2f6fb7", **key)
    drawing.text(left + 42 * unit, 104, "student by reverse KL: takes the first (dashed)", color="#3f8f46", **key)
    return drawing.svg()


DRAWINGS = {"row.svg": row, "passes.svg": passes, "peaks.svg": peaks}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw())
