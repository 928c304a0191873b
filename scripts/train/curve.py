"""Draws the curves of a distillation from its log.

    python scripts/train/curve.py --log scripts/train/distill.jsonl --out scripts/train/distill.svg

Above, the losses: the discriminator's advantage, and the energy distance (the sum over its sets of features). Below,
the judge's figures at 1, 2 and 4 steps, against the training files.
"""

import argparse
import json
import math

WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 200, 62, 34, 84
COLOURS = ["#c0392b", "#2471a3", "#1e8449"]


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--log", required=True)
    p.add_argument("--out", required=True)
    return p.parse_args()


def read(path: str) -> dict[int, dict]:
    """Entries by iteration. A run that was interrupted repeats some: the last one counts."""
    entries = {}
    for line in open(path):
        entry = json.loads(line)
        entries[entry["step"]] = entries.get(entry["step"], {}) | entry
    return dict(sorted(entries.items()))


def ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        values = [m * 10.0**e for e in range(-4, 3) for m in (1, 2, 5)]
    else:
        size = 10.0 ** math.floor(math.log10((high - low) / 2))
        size *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * size) <= 6)
        values = [size * i for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]
    return [v for v in values if low <= v * (1 + 1e-9) and v <= high * (1 + 1e-9)]


def panel(x: int, y: int, title: str, lines: dict[str, list[tuple[float, float]]], log: bool = False, low=None, high=None, names_below: bool = False) -> str:
    """One chart at (x, y); `lines` are points by name. Values beyond `low` and `high` are drawn at the rim."""
    values = [v for points in lines.values() for _, v in points]
    low, high = min(values) if low is None else low, max(values) if high is None else high
    last = max(at for points in lines.values() for at, _ in points)
    place = math.log if log else float
    across = lambda at: x + WIDTH * at / last
    up = lambda v: y + HEIGHT * (1 - (place(min(max(v, low), high)) - place(low)) / (place(high) - place(low)))
    out = [f'<text x="{x}" y="{y - 12}" font-weight="bold">{title}</text>', f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    for v in ticks(low, high, log):
        out.append(f'<path d="M{x} {up(v):.1f}h{WIDTH}" stroke="#ddd"/><text x="{x - 6}" y="{up(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for v in ticks(0, last, False):
        out.append(f'<text x="{across(v):.1f}" y="{y + HEIGHT + 16}" text-anchor="middle">{v:g}</text>')
    for i, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{across(at):.1f},{up(v):.1f}" for at, v in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[i]}" stroke-width="1.4"/>')
        down = HEIGHT - 12 - 16 * (len(lines) - 1 - i) if names_below else 18 + 16 * i
        out.append(f'<text x="{x + WIDTH - 8}" y="{y + down}" text-anchor="end" fill="{COLOURS[i]}">{name}</text>')
    return "\n".join(out)


def main():
    a = arguments()
    entries = read(a.log)
    series = lambda pick: [(step, v) for step, e in entries.items() if (v := pick(e)) is not None]
    energy = series(lambda e: sum(v for k, v in e.items() if k.startswith("energy_")) if "energy_pixels" in e else None)
    judged = lambda figure: {f"{k} step" + "s" * (k > 1): series(lambda e: e.get(f"steps_{k}", {}).get(figure)) for k in (1, 2, 4)}
    columns = [LEFT, LEFT + WIDTH + GAP]
    rows = [TOP, TOP + HEIGHT + 70]
    parts = [
        panel(columns[0], rows[0], "Margin of the discriminator", {"": series(lambda e: e.get("margin"))}, low=-1.0),
        panel(columns[1], rows[0], "Energy distance", {"": energy}, low=0.0, high=0.5),
        panel(columns[0], rows[1], "The classifier agrees", judged("accuracy"), low=0.95, high=1.0, names_below=True),
        panel(columns[1], rows[1], "Frechet distance", judged("frechet"), log=True),
    ]
    size = f'width="{columns[1] + WIDTH + 20}" height="{rows[1] + HEIGHT + 44}"'
    with open(a.out, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n')
        f.write("\n".join(parts) + f'\n<text x="{columns[1] + WIDTH}" y="{rows[1] + HEIGHT + 34}" text-anchor="end">iteration</text>\n</svg>\n')


if __name__ == "__main__":
    main()
