"""Judges drawn digits by a classifier of its own: are they what was asked for, do they look like MNIST, do they vary?

    python scripts/train/evaluate.py --data DIR --cache classifier.pt --url http://localhost:5000
    python scripts/train/evaluate.py --data DIR --cache classifier.pt --weights src/model/mnist.safetensors --seeds 3
    python scripts/train/evaluate.py --data DIR --cache classifier.pt --sheet digits.png

--url judges what users get: it asks a running server for sheets. --weights draws with the PyTorch reference.
--sheet reads what `image-generator draw 0123456789 --count 100` wrote: a row for each repetition, a column a
label. Several values of --guidance, --steps and --shift are judged one after the other; choose among them with
--reference train, so that the test files stay unseen until the choice is made.

Accuracy is the share of digits that the classifier reads as the label asked for. The Frechet distance is that of
the classifier's features, to all digits of the reference; the row "real" gives the same for as many real training
digits (left out of the reference where that is the training files): what a perfect model would get. Diversity
is the mean distance of two digits of one class, as a share of that of real ones.
"""

import argparse
import io
import itertools
import json
import math
import os
import time
import urllib.request

import torch
from PIL import Image

import classifier
import data
import dit

CLASSES = "0123456789"
CELL = 28
ROWS_A_REQUEST = 50


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder with the four MNIST files")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--url", help="judge a running server")
    source.add_argument("--weights", help="judge a weights file, drawn by PyTorch")
    source.add_argument("--sheet", nargs="+", help="judge PNG files, ten columns each; without any source only the classifier is trained")
    p.add_argument("--count", type=int, default=1000, help="digits a seed, the same number of each class")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--seeds", type=int, default=1, help="how many sets of digits, and of real ones, are judged; the figures are means")
    p.add_argument("--steps", type=int, nargs="+", help="default: the model's")
    p.add_argument("--guidance", type=float, nargs="+", help="default: the model's")
    p.add_argument("--shift", type=float, nargs="+", help="default: the model's; --weights only")
    p.add_argument("--reference", choices=["train", "test"], default="test")
    p.add_argument("--cache", help="file that keeps the trained classifier")
    p.add_argument("--classifier-epochs", type=int, default=8)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--json", help="where the figures go")
    p.add_argument("--save-sheet", help="where a PNG of the first ten digits of each class goes")
    a = p.parse_args()
    if a.count < 20 or a.count % 10:
        p.error("--count: expected a multiple of 10, at least 20")
    if a.shift and not a.weights:
        p.error("--shift: only with --weights")
    if a.sheet and (a.steps or a.guidance):
        p.error("--steps, --guidance: a sheet is drawn already")
    return a


def cut(png: bytes, what: str) -> torch.Tensor:
    """A sheet of ten columns to [N, 1, 28, 28]: 0 to 9, again and again."""
    sheet = Image.open(io.BytesIO(png)).convert("L")
    rows = sheet.height // CELL
    if sheet.size != (10 * CELL, rows * CELL):
        raise SystemExit(f"{what} has {sheet.width} x {sheet.height} pixels, expected ten columns of {CELL}")
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(rows, CELL, 10, CELL).transpose(1, 2).reshape(-1, 1, CELL, CELL)


def ask(url: str, count: int, seed: int, options: dict) -> torch.Tensor:
    """Sheets of a running server. The n-th digit has the seed seed + n."""
    sheets = []
    for row in range(0, count // 10, ROWS_A_REQUEST):
        rows = min(ROWS_A_REQUEST, count // 10 - row)
        body = {"digits": CLASSES, "count": rows, "seed": seed + 10 * row, "layout": "rows"} | options
        request = urllib.request.Request(url.rstrip("/") + "/v1/generate", json.dumps(body).encode(), {"content-type": "application/json", "accept": "image/png"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            sheets.append(cut(answer.read(), url))
    return torch.cat(sheets)


def draw(model: dit.DiT, sampler: dit.Sampler, count: int, seed: int) -> torch.Tensor:
    """The same by the PyTorch reference, from noise of PyTorch's own."""
    c = model.config
    noise = torch.randn(count, c.channels, c.image_size, c.image_size, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(10).repeat(count // 10)
    return torch.cat([dit.to_bytes(dit.sample(model, n, l, sampler)) for n, l in zip(noise.split(100), labels.split(100))])


def variants(a):
    """Pairs of a name and what draws the digits of one seed."""
    if a.sheet:
        sheets = [cut(open(path, "rb").read(), path) for path in a.sheet]
        yield {"source": "sheet"}, lambda seed: torch.cat(sheets)
        return
    base = None
    if a.weights:
        model, base = dit.load(a.weights)
    for steps, guidance, shift in itertools.product(a.steps or [None], a.guidance or [None], a.shift or [None]):
        options = {k: v for k, v in {"steps": steps, "guidance": guidance, "shift": shift}.items() if v is not None}
        if base is None:
            yield {"source": "server"} | options, lambda seed, o=options: ask(a.url, a.count, seed, o)
        else:
            sampler = dit.Sampler(**{"steps": base.steps, "guidance": base.guidance, "shift": base.shift} | options)
            yield {"source": "weights"} | vars(sampler), lambda seed, s=sampler: draw(model, s, a.count, seed)


def figures(features, predicted, labels, reference) -> dict:
    right = predicted == labels
    return {
        "accuracy": right.double().mean().item(),
        "accuracy_by_class": [right[labels == label].double().mean().item() for label in range(10)],
        "frechet": classifier.frechet(features, reference),
        "spread": classifier.spread(features, labels),
    }


def mean(all_figures: list[dict]) -> dict:
    """Means over seeds, and the lowest and highest Frechet distance of one."""
    average = lambda values: math.fsum(values) / len(values)
    out = {k: average([f[k] for f in all_figures]) for k in ("accuracy", "frechet", "spread")}
    out["accuracy_by_class"] = [average(v) for v in zip(*(f["accuracy_by_class"] for f in all_figures))]
    out["frechet_range"] = [min(f["frechet"] for f in all_figures), max(f["frechet"] for f in all_figures)]
    return out


def real_digits(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Where the training files have `count` digits, the same number of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][: count // 10] for label in range(10)])


def row(name: str, f: dict, real: dict) -> str:
    low, high = f["frechet_range"]
    return f"| {name} | {100 * f['accuracy']:.2f} % | {f['frechet']:.3f} | {low:.3f} to {high:.3f} | {f['spread'] / real['spread']:.3f} |"


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    model = classifier.load_or_train(a.data, a.cache, a.classifier_epochs, 2026)
    images, labels = data.load(a.data, "train")
    test_images, test_labels = data.load(a.data, "test")
    test_features, predicted = classifier.judge(model, test_images)
    test_accuracy = (predicted == test_labels).double().mean().item()
    print(f"the classifier reads {100 * test_accuracy:.2f} % of the test digits right", flush=True)
    if not (a.url or a.weights or a.sheet):
        return

    if a.reference == "train":
        train_features, predicted = classifier.judge(model, images)
    real, references = [], []
    for seed in range(a.seed, a.seed + a.seeds):
        pick = real_digits(labels, a.count, seed)
        if a.reference == "train":
            rest = torch.ones(len(labels), dtype=torch.bool)
            rest[pick] = False
            references.append(train_features[rest])
            real.append(figures(train_features[pick], predicted[pick], labels[pick], references[-1]))
        else:
            references.append(test_features)
            real.append(figures(*classifier.judge(model, images[pick]), labels[pick], test_features))
    real = mean(real)
    report = {"classifier_test_accuracy": test_accuracy, "reference": a.reference, "count": a.count, "seeds": a.seeds, "real": real, "drawn": []}
    print(f"| digits, {a.seeds} x {a.count} | accuracy | Frechet to {a.reference} | lowest to highest | diversity |\n|---|---|---|---|---|", flush=True)
    print(row("real, of the training files", real, real), flush=True)
    sheet = None
    for name, draw_seed in variants(a):
        started, drawn = time.monotonic(), []
        for i in range(a.seeds):
            # Seeds of one set do not run into those of the next.
            digits = draw_seed((a.seed + i) * 1_000_000)
            asked = torch.arange(10).repeat(len(digits) // 10)
            sheet = digits if sheet is None else sheet
            drawn.append(figures(*classifier.judge(model, digits), asked, references[i]))
        result = mean(drawn)
        text = ", ".join(f"{k} {v:g}" if k != "source" else v for k, v in name.items())
        print(row(text, result, real), flush=True)
        report["drawn"].append(name | result | {"diversity": result["spread"] / real["spread"], "seconds": round(time.monotonic() - started, 1)})
    for entry in report["drawn"] if len(report["drawn"]) == 1 else []:
        print("by class: " + "  ".join(f"{c} {100 * v:.1f} %" for c, v in zip(CLASSES, entry["accuracy_by_class"])))
    if a.save_sheet:
        # Ten rows, one a class.
        cells = sheet[:100].view(-1, 10, CELL, CELL).permute(1, 2, 0, 3)
        Image.fromarray(cells.reshape(10 * CELL, -1).contiguous().numpy()).save(a.save_sheet)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(report, f, indent=1)


if __name__ == "__main__":
    main()
