"""Draw the figures of docs/cache.md as SVG: `python docs/figures/draw_cache.py` from the root.

A test runs this and compares, so the figures are what this file says.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  .text { fill: #1f2328; font: 14px system-ui, sans-serif; }
  .small { fill: #57606a; font: 12px system-ui, sans-serif; }
  .code { fill: #1f2328; font: 13px ui-monospace, monospace; }
  .valid { fill: #4c78a8; stroke: #2f5580; }
  .new { fill: #f28e2b; stroke: #b9660f; }
  .free { fill: #f3f4f6; stroke: #b6bcc4; stroke-dasharray: 3 2; }
  .in { fill: #ffffff; font: 13px ui-monospace, monospace; text-anchor: middle; }
  .dim { fill: #8b949e; font: 13px ui-monospace, monospace; text-anchor: middle; }
  .line { fill: none; stroke: #57606a; stroke-width: 1.5; }
  .tip { fill: #57606a; }
  .box { fill: #eef2f7; stroke: #8b98a8; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1f2229; stroke: #444c56; }
    .text, .code { fill: #e6e8eb; }
    .small { fill: #a9b1bb; }
    .free { fill: #2a2e36; stroke: #59616c; }
    .line { stroke: #a9b1bb; }
    .tip { fill: #a9b1bb; }
    .box { fill: #2a2f3a; stroke: #6b7685; }
  }
"""
CELL = 34  # width and height of a slot


class Drawing:
    """An SVG under construction."""

    def __init__(self, title: str, width: int, height: int):
        self.title, self.width, self.height = title, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "text", anchor: str = "") -> None:
        """Write one line at its baseline."""
        place = f' text-anchor="{anchor}"' if anchor else ""
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}"{place}>{escape(words)}</text>')

    def slots(self, x: float, y: float, cells: str, marks: list[str] | None = None) -> None:
        """Draw a row of slots: v valid, n new, any other free, each with its mark."""
        for i, cell in enumerate(cells):
            kind = {"v": "valid", "n": "new"}.get(cell, "free")
            left = x + i * CELL
            self.parts.append(
                f'<rect class="{kind}" x="{left}" y="{y}" width="{CELL - 3}" height="{CELL - 3}" '
                'rx="3"/>'
            )
            if marks is not None and i < len(marks):
                shown = "dim" if kind == "free" else "in"
                self.text(left + (CELL - 3) / 2, y + 20, marks[i], shown)

    def box(self, x: float, y: float, width: float, height: float, words: str) -> None:
        """Draw a box with code in its middle."""
        self.parts.append(
            f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, words, "code", "middle")

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through the points that ends in a tip."""
        path = " L ".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path class="line" d="M {path}" marker-end="url(#tip)"/>')

    def note(self, y: float, *lines: str) -> None:
        """Write small lines from a baseline down."""
        for i, line in enumerate(lines):
            self.text(24, y + 15 * i, line, "small")

    def svg(self) -> str:
        """Return the whole file."""
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path class="tip" d="M 0 0 L 8 4 L 0 8 z"/></marker>'
        )
        card = (
            f'<rect class="card" x="1" y="1" width="{self.width - 2}" height="{self.height - 2}" '
            'rx="8"/>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            f"<style>{STYLE}</style>\n<defs>{tip}</defs>\n"
            + "\n".join([card, *self.parts])
            + "\n</svg>\n"
        )


def step() -> Drawing:
    """Draw one decode step on a cache of eight slots."""
    drawing = Drawing("One decode step: five tokens become six; the old cache stays.", 680, 262)
    prompt = list("31415")
    drawing.text(24, 46, "cache, length 5")
    drawing.slots(174, 26, "vvvvv...", prompt)
    drawing.text(24, 96, "new token")
    drawing.slots(174, 76, "n", ["9"])
    drawing.box(512, 46, 132, 40, "decode_step")
    drawing.arrow((448, 42), (476, 42), (476, 58), (508, 58))
    drawing.arrow((210, 92), (476, 92), (476, 76), (508, 76))
    drawing.arrow((548, 88), (548, 154), (454, 154))
    drawing.arrow((608, 88), (608, 170))
    drawing.text(608, 188, "logits (B, V)", "code", "middle")
    drawing.text(24, 158, "longer, length 6")
    drawing.slots(174, 138, "vvvvvn..", [*prompt, "9"])
    drawing.text(24, 210, "cache, still length 5")
    drawing.slots(174, 190, "vvvvv...", prompt)
    drawing.text(174, 242, "The old cache is valid, so another step may start from it.", "small")
    return drawing


def fork() -> Drawing:
    """Draw one prompt that is continued twice."""
    drawing = Drawing("One prompt continued twice: three handles, each valid.", 620, 216)
    prompt = list("31415")
    drawing.text(24, 92, "cache")
    drawing.slots(72, 72, "vvvvv", prompt)
    drawing.arrow((246, 82), (290, 42), (318, 42))
    drawing.arrow((246, 96), (290, 150), (318, 150))
    drawing.text(266, 38, "9", "code", "middle")
    drawing.text(266, 146, "2", "code", "middle")
    drawing.slots(324, 26, "vvvvvn", [*prompt, "9"])
    drawing.text(540, 46, "left", "code")
    drawing.text(324, 76, "torch: first to continue, so written in place", "small")
    drawing.slots(324, 134, "vvvvvn", [*prompt, "2"])
    drawing.text(540, 154, "right", "code")
    drawing.text(324, 184, "torch: an older handle, so copied first", "small")
    drawing.text(324, 202, "jax: both are new arrays, unless donated", "small")
    return drawing


def rows() -> Drawing:
    """Draw a batch whose rows have different lengths."""
    drawing = Drawing("Rows of different lengths in one cache of eight slots.", 580, 216)
    for i in range(8):
        drawing.text(120 + i * CELL + 15, 30, str(i), "dim")
    drawing.text(24, 30, "slot", "small")
    tokens = ["31415", "27", "161"]
    for number, row in enumerate(tokens):
        y = 42 + number * (CELL + 6)
        drawing.text(24, y + 20, f"row {number}")
        drawing.slots(120, y, ("v" * len(row)).ljust(8, "."), [*row, *"????????"][:8])
        drawing.text(410, y + 20, f"lengths_B[{number}] = {len(row)}", "code")
    drawing.note(
        184,
        "Solid slots are valid. Slots marked ? hold garbage that no query sees,",
        "and the next append overwrites them.",
    )
    return drawing


def mask() -> Drawing:
    """Draw the one mask rule for three new tokens after a row of length 2."""
    length, num_tokens, num_slots = 2, 3, 6
    drawing = Drawing("The mask rule: query t sees slot s when s < length + t + 1.", 520, 216)
    drawing.text(24, 30, "slot", "small")
    for s in range(num_slots):
        drawing.text(120 + s * CELL + 15, 30, str(s), "dim")
    for t in range(num_tokens):
        y = 42 + t * (CELL + 6)
        seen = [s < length + t + 1 for s in range(num_slots)]
        cells = "".join("." if not x else "n" if s >= length else "v" for s, x in enumerate(seen))
        drawing.text(24, y + 20, f"query {t}")
        drawing.slots(120, y, cells, ["1" if x else "·" for x in seen])
        drawing.text(342, y + 20, f"s < {length} + {t} + 1", "code")
    drawing.note(
        186,
        "Length 2, three new tokens (orange), capacity 6. One rule for prefill, chunks",
        "and single steps; a prefill is the case of length 0.",
    )
    return drawing


def path() -> Drawing:
    """Draw the path of one cached step through the files of a twin."""
    drawing = Drawing("The path of one cached step.", 680, 356)
    drawing.text(24, 34, "tokens_BT", "code")
    drawing.text(656, 34, "cache: KVCache", "code", "end")
    drawing.arrow((60, 42), (60, 62))
    drawing.arrow((600, 42), (600, 62))
    drawing.box(24, 66, 632, 38, "metadata.py: positions, slots and mask, once for all blocks")
    drawing.arrow((120, 106), (120, 128))
    drawing.box(24, 132, 200, 38, "model.py: GPT.embed")
    drawing.arrow((226, 151), (262, 151))
    drawing.box(266, 132, 390, 160, "")
    drawing.text(282, 156, "model.py: Block, once per layer", "code")
    drawing.arrow((430, 104), (430, 128))
    drawing.box(282, 170, 358, 32, "attention.py: attend(q, new, layer, ...)")
    drawing.arrow((560, 204), (560, 214))
    drawing.box(402, 218, 238, 32, "cache.py: LayerCache.append")
    drawing.arrow((340, 204), (340, 214))
    drawing.box(282, 218, 106, 32, "MLP")
    drawing.text(282, 276, "x_BTD and one LayerCache out", "small")
    drawing.arrow((266, 280), (228, 280))
    drawing.box(24, 261, 200, 38, "model.py: norm, head")
    drawing.arrow((100, 301), (100, 323))
    drawing.arrow((560, 294), (560, 323))
    drawing.text(24, 341, "logits of the next token", "code")
    drawing.text(656, 341, "a longer KVCache", "code", "end")
    return drawing


FIGURES = {"step": step, "fork": fork, "rows": rows, "mask": mask, "path": path}


def main(folder: Path) -> None:
    """Write every figure into a folder."""
    for name, draw in FIGURES.items():
        (folder / f"cache_{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
