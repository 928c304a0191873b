"""Draws sheets of digits at several step counts side by side, a row a class, from the same noise in each sheet.

    python scripts/train/sheets.py --weights src/model/mnist.safetensors --out tests/golden/steps.png
"""

import argparse

import torch
from PIL import Image, ImageDraw

import dit

CELL, GAP, TITLE = 28, 14, 16


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", required=True)
    p.add_argument("--out", required=True)
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 16])
    p.add_argument("--guidance", type=float, help="default: the model's")
    p.add_argument("--each", type=int, default=7, help="digits of a class in a sheet")
    p.add_argument("--scale", type=int, default=1)
    p.add_argument("--seed", type=int, default=1)
    return p.parse_args()


def main():
    a = arguments()
    model, base = dit.load(a.weights)
    c = model.config
    noise = torch.randn(c.classes * a.each, c.channels, c.image_size, c.image_size, generator=torch.Generator().manual_seed(a.seed))
    labels = torch.arange(c.classes).repeat_interleave(a.each)
    guidance = base.guidance if a.guidance is None else a.guidance
    width, height = a.each * CELL, c.classes * CELL
    out = Image.new("L", (len(a.steps) * width + (len(a.steps) - 1) * GAP, TITLE + height), 255)
    pen = ImageDraw.Draw(out)
    for i, steps in enumerate(a.steps):
        digits = dit.to_bytes(dit.sample(model, noise, labels, dit.Sampler(steps, guidance, base.shift)))
        sheet = digits.view(c.classes, a.each, CELL, CELL).transpose(1, 2).reshape(height, width)
        left = i * (width + GAP)
        out.paste(Image.fromarray(sheet.contiguous().numpy()), (left, TITLE))
        pen.text((left, 2), f"{steps} step" + "s" * (steps > 1), fill=0)
    out.resize((out.width * a.scale, out.height * a.scale), Image.NEAREST).save(a.out, optimize=True)


if __name__ == "__main__":
    main()
