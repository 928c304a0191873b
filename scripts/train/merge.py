"""Averages weights files of one run (Izmailov et al. 2018, "Averaging weights leads to wider optima").

    python scripts/train/merge.py --weights scripts/train/out/at-{1200,1250,1350}.safetensors --shares 0.3 0.35 0.35 --steps 2 --shift 4 --out src/model/mnist.safetensors

An adversarial run circles around its goal; the middle of the circle is nearer to it than any point on the circle.
The files are those that distill.py keeps at its checkpoints.
"""

import argparse

import torch
from safetensors.torch import save_file

import dit


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", nargs="+", required=True)
    p.add_argument("--shares", type=float, nargs="+", required=True, help="one a file, 1 in all")
    p.add_argument("--steps", type=int, default=2, help="what the file will say")
    p.add_argument("--shift", type=float, default=4.0)
    p.add_argument("--name", default="mnist")
    p.add_argument("--out", required=True)
    a = p.parse_args()
    if len(a.weights) != len(a.shares) or abs(sum(a.shares) - 1) > 1e-6:
        p.error("--shares: expected one for each of --weights, 1 in all")
    return a


@torch.no_grad()
def main():
    a = arguments()
    models = [dit.load(path)[0] for path in a.weights]
    config = models[0].config
    states = [m.state_dict() for m in models]
    merged = {k: sum(share * s[k] for share, s in zip(a.shares, states)).half().contiguous() for k in states[0]}
    save_file(merged, a.out, dit.metadata(config, dit.Sampler(a.steps, 1.0, a.shift), a.name, [str(i) for i in range(config.classes)]))


if __name__ == "__main__":
    main()
