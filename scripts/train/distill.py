"""Teaches the flow-matching model to draw in few steps, on the MNIST training files.

    python scripts/train/distill.py --data DIR --init scripts/train/out/model.safetensors --out scripts/train/out --compile

The student starts as the flow model. It walks its own sampler (dit.py's `sample`, guidance 1, so half of the work a
step) with 1, 2, 4 or more steps, and each clean picture that it predicts on the way has to pass for a real digit of
its class. Three losses say whether it does:

- A relativistic discriminator with gradient penalties on real and drawn digits (R3GAN, Huang et al. 2024); each
  penalty is taken from the difference to a slightly noisy copy (APT, Lin et al. 2025), which needs no second
  derivative. It makes single digits sharp.
- The energy distance (Szekely & Rizzo 2013) within a class, of pixels and of an encoder's features: as near to the
  real ones as those are to each other, and as far from the other drawn ones. It makes the set of digits as varied as
  the real one. Recently drawn digits are kept to be kept away from, so that the distance is a good estimate although
  a batch has few of a class. It is taken apart for early, middle and late times.
- A small one: the encoder has to read the digit as its class.

A batch holds walks at different steps. What was predicted for the losses also moves the walk on, so that the
student sees the states that it will meet when it draws, at no cost. A finished walk makes room for new noise.
"No class" learns the mean of what the classes would predict: guidance above 1 then still pushes away from it.

Processes share a batch by classes, since no loss compares digits of two, and add up their gradients: on a busy
machine that is much faster than threads, which wait for each other in every operation. Their number changes the
speed; the result changes in the last bits only.

What is exported is an exponential moving average of the weights. A run that was stopped goes on from its last
checkpoint when the same command is given again. At the full rate the student itself is never at rest, and its average,
which is, draws digits that are too much alike, which no loss sees. So from iteration --settle-from on the student
goes on from its average, slowly, and the losses judge what will be exported. It still circles around its goal: the
default weights are the mean, by merge.py, of the averages at iterations 1200, 1250 and 1350.

The log (distill.jsonl) is of the run that made them. This schedule was found while it ran: it was resumed at
iterations 400, 900 and 1200 with changes that are part of the code now, and stopped at 1350. Until iteration 400
its average, which no loss sees, was a shorter one.
"""

import argparse
import json
import os
import time

import torch
import torch.multiprocessing
import torch.nn.functional as F
from safetensors.torch import save_file

import classifier
import critic
import data
import dit

# Walks of one class in a batch: how many, the step counts that they draw from, and those from iteration --long-from
# on. Most are short at first, because all walks share the first step, and it has the most to learn.
WALKS = [(4, [1], [1]), (3, [1], [16]), (6, [2], [2]), (7, [4], [4]), (1, [4], [8]), (3, [3, 8, 16, 16], [3, 8, 16, 16])]
CLASSES = 10
ROWS = sum(n for n, _, _ in WALKS)
# Rows of a class that are predicted again without it.
NONE_ROWS = 2
# Walks are compared with those at like times only: the first step, the first half, the second half; and once there
# are long walks, their last steps.
STAGES, STAGES_LONG = torch.tensor([1e-6, 0.49]), torch.tensor([1e-6, 0.49, 0.8])
# Real digits of a class, and batches of drawn ones, that a batch is compared with.
REAL_ROWS = 256
KEPT = 20


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder with the four MNIST files")
    p.add_argument("--init", required=True, help="weights of the flow model, as train.py writes them")
    p.add_argument("--out", required=True, help="folder for checkpoint, log and distilled.safetensors")
    p.add_argument("--iterations", type=int, default=1450)
    p.add_argument("--long-from", type=int, default=900)
    p.add_argument("--settle-from", type=int, default=1200)
    p.add_argument("--settle", type=float, default=0.2, help="share of the rate from then on, falling to none in the second half")
    p.add_argument("--rate", type=float, default=2e-4)
    p.add_argument("--critic-rate", type=float, default=3e-4)
    p.add_argument("--adversarial", type=float, default=1.0)
    p.add_argument("--energy", type=float, default=1.0)
    p.add_argument("--naming", type=float, default=0.2)
    p.add_argument("--penalty", type=float, default=0.25)
    p.add_argument("--penalty-noise", type=float, default=0.1)
    p.add_argument("--ema", type=float, default=0.998)
    p.add_argument("--encoder-epochs", type=int, default=4)
    p.add_argument("--evaluate-every", type=int, default=50)
    p.add_argument("--seed", type=int, default=2026)
    p.add_argument("--processes", type=int, default=2, help="a divisor of 10")
    p.add_argument("--checkpoint-every", type=int, default=50, help="iterations")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--default-steps", type=int, default=2, help="what the weights file will say")
    p.add_argument("--name", default="mnist")
    a = p.parse_args()
    if CLASSES % a.processes:
        p.error(f"--processes: it is {a.processes}, expected a divisor of {CLASSES}")
    return a


class Clamp(torch.autograd.Function):
    """Clamps to [-1, 1], as pixels will be. A value outside feels only what would bring it back: the background may
    lie below black, as it may when digits are drawn, and does not run away."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad.masked_fill(((x < -1) & (grad > 0)) | ((x > 1) & (grad < 0)), 0)


def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[C, n, d] in float32 and [C, m, d] in bfloat16 to [C, n, m]."""
    product = (a.bfloat16() @ b.transpose(1, 2)).float()
    squares = a.square().sum(2, keepdim=True) + b.float().square().sum(2).unsqueeze(1) - 2 * product
    return squares.clamp_min(1e-3).sqrt()


class Walks:
    """The batch: `CLASSES` x `ROWS` walks from noise to a digit, each at its own step of its own number of steps.

    Every process draws the same random numbers and follows all walks, but computes and moves the rows `own`."""

    def __init__(self, x: torch.Tensor, own: slice):
        """`x` is shared by the processes."""
        choices = [c for n, c, _ in WALKS for _ in range(n)]
        phase = [choices[:j].count(c) for j, c in enumerate(choices)]
        self.x, self.own, self.choices = x, own, choices * CLASSES
        self.choices_long = [c for n, _, c in WALKS for _ in range(n)] * CLASSES
        self.steps = torch.tensor([c[j % len(c)] for j, c in zip(phase, choices)] * CLASSES)
        self.at = torch.tensor([5 * j if max(c) > 4 else j for j, c in zip(phase, choices)] * CLASSES) % self.steps

    def start(self, images: torch.Tensor, by_class: list[torch.Tensor], generator: torch.Generator):
        """Walks start at all steps, so that no time is rare at first; from real digits that were mixed with noise."""
        t = self.time().view(-1, 1, 1, 1)
        real = images[real_rows(by_class, ROWS, generator)]
        x = t * real + (1 - t) * torch.randn(real.shape, generator=generator)
        self.x[self.own] = x[self.own]

    def time(self) -> torch.Tensor:
        return self.at / self.steps

    def advance(self, clean: torch.Tensor, long: bool, generator: torch.Generator):
        x = self.x[self.own]
        x += (1 / (self.steps - self.at))[self.own].view(-1, 1, 1, 1) * (clean - x)
        self.at += 1
        for i in (self.at == self.steps).nonzero().squeeze(1).tolist():
            noise = torch.randn(self.x.shape[1:], generator=generator)
            choices = self.choices_long[i] if long else self.choices[i]
            self.at[i], self.steps[i] = 0, choices[torch.randint(len(choices), (1,), generator=generator).item()]
            if self.own.start <= i < self.own.stop:
                self.x[i] = noise


class Sum:
    """Adds up the gradients of all processes, in the same order in each: their weights stay equal."""

    def __init__(self, shared: torch.Tensor, barrier, rank: int):
        """`shared`: [processes, values]."""
        self.shared, self.barrier, self.rank = shared, barrier, rank

    def __call__(self, parameters: list[torch.Tensor]):
        if len(self.shared) == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        self.shared[self.rank, : len(flat)] = flat
        self.barrier.wait()
        total = self.shared[:, : len(flat)].mean(0)
        for p, grad in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
        # Nobody writes the next gradients before all have read these.
        self.barrier.wait()


def real_rows(by_class: list[torch.Tensor], n: int, generator: torch.Generator) -> torch.Tensor:
    """Where n random training digits of each class are, class by class."""
    return torch.cat([rows[torch.randint(len(rows), (n,), generator=generator)] for rows in by_class])


class Energy:
    """The energy distance of drawn digits to real ones, class by class and stage by stage."""

    def __init__(self, encoder: critic.Encoder, images: torch.Tensor, by_class: list[torch.Tensor], own_classes: slice):
        self.encoder, self.by_class, self.own_classes = encoder, by_class, own_classes
        parts = [self.raw(part.float() / 127.5 - 1) for part in images.split(1000)]
        real = [torch.cat([p[i] for p in parts]) for i in range(len(parts[0]))]
        # Within a set every feature counts the same, and so does every set: digits of one class have distance 1.
        # Pixels keep their own weights, or the rim, nearly always black, would count too much. Centred, so that
        # bfloat16 is precise enough for the products.
        self.centre, self.scale, self.real = [], [], []
        for i, f in enumerate(real):
            centre = f[::6].float().mean(0)
            deviation = (f[::6].float() - centre).square().mean(0).sqrt()
            scale = torch.ones_like(deviation) if i == 0 else 1 / (deviation + 0.1 * deviation.mean())
            sample = torch.stack([(f[rows[:200]].float() - centre) * scale for rows in by_class])
            scale = scale / distances(sample, sample.bfloat16()).mean()
            self.centre.append(centre)
            self.scale.append(scale)
            self.real.append(torch.cat([((part.float() - centre) * scale).bfloat16() for part in f.split(10000)]))
        self.kept, self.kept_stage = [], []

    def raw(self, x: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [f.bfloat16() for f in critic.features(self.encoder.trunk, x)]

    def loss(self, clean: torch.Tensor, time: torch.Tensor, stages: torch.Tensor, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The distance in each set of features, and the encoder's names for the digits, [B, 10]."""
        classes = self.own_classes.stop - self.own_classes.start
        stage = torch.bucketize(time, stages).view(classes, ROWS)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = critic.features(self.encoder.trunk, clean)
            names = self.encoder.name(drawn[-1]).float()
        drawn = [((f.float() - c) * s).view(classes, ROWS, -1) for f, c, s in zip(drawn, self.centre, self.scale)]
        pick = real_rows(self.by_class, REAL_ROWS, generator).view(CLASSES, REAL_ROWS)[self.own_classes]
        own = torch.eye(ROWS, dtype=torch.bool).unsqueeze(0)
        kept_stage = torch.cat([stage] + self.kept_stage, 1)
        alike = stage.unsqueeze(2) == kept_stage.unsqueeze(1)
        alike[:, :, :ROWS] &= ~own
        weight = alike / alike.sum(2, keepdim=True).clamp_min(1)
        losses, keep = [], []
        for i, f in enumerate(drawn):
            keep.append(f.detach().bfloat16())
            kept = torch.cat([keep[-1]] + [k[i] for k in self.kept], 1)
            to_real = distances(f, self.real[i][pick]).mean()
            to_drawn = (distances(f, kept) * weight).sum(2).mean()
            losses.append(to_real - to_drawn)
        self.kept, self.kept_stage = [keep] + self.kept[: KEPT - 1], [stage] + self.kept_stage[: KEPT - 1]
        return losses, names


class Judge:
    """The figures of evaluate.py with the training files as reference, for the log. No loss ever sees them."""

    def __init__(self, folder: str, images: torch.Tensor, labels: torch.Tensor, out: str):
        self.model = classifier.load_or_train(folder, os.path.join(out, "classifier.pt"), 8, 2026)
        features, _ = classifier.judge(self.model, images)
        self.features = features
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        pick = torch.cat([order[labels[order] == label][:100] for label in range(CLASSES)])
        self.spread = classifier.spread(features[pick], labels[pick])
        self.real = classifier.frechet(features[pick], features)

    @torch.inference_mode()
    def figures(self, model: dit.DiT, steps: int, count: int = 1000) -> dict:
        noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(7))
        labels = torch.arange(CLASSES).repeat(count // CLASSES)
        with torch.autocast("cpu", torch.bfloat16):
            digits = torch.cat([dit.to_bytes(dit.sample(model, n, l, dit.Sampler(steps, 1.0))) for n, l in zip(noise.split(250), labels.split(250))])
        features, predicted = classifier.judge(self.model, digits)
        accuracy = (predicted == labels).double().mean().item()
        return {"accuracy": round(accuracy, 4), "frechet": round(classifier.frechet(features, self.features), 4), "diversity": round(classifier.spread(features, labels) / self.spread, 3)}


def main():
    a = arguments()
    os.makedirs(a.out, exist_ok=True)
    torch.set_num_threads(1)
    images, labels = data.load(a.data, "train")
    critic.load_or_train(os.path.join(a.out, "encoder.pt"), images, labels, a.encoder_epochs, a.seed)
    classifier.load_or_train(a.data, os.path.join(a.out, "classifier.pt"), 8, 2026)
    context = torch.multiprocessing.get_context("spawn")
    values = sum(p.numel() for p in dit.load(a.init)[0].parameters())
    shared = torch.zeros(a.processes, values).share_memory_()
    walks = torch.zeros(CLASSES * ROWS, 1, 28, 28).share_memory_()
    torch.multiprocessing.spawn(distill, (a, context.Barrier(a.processes), shared, walks), a.processes)


def distill(rank: int, a, barrier, shared: torch.Tensor, walks_x: torch.Tensor):
    """One of the processes; the first one also writes, judges and tells."""
    torch.set_num_threads(1)
    place = lambda name: os.path.join(a.out, name)
    share = CLASSES // a.processes
    own_classes = slice(rank * share, (rank + 1) * share)
    own = slice(own_classes.start * ROWS, own_classes.stop * ROWS)
    images, labels = data.load(a.data, "train")
    by_class = [(labels == c).nonzero().squeeze(1) for c in range(CLASSES)]
    encoder = critic.load_or_train(place("encoder.pt"), images, labels, a.encoder_epochs, a.seed)
    energy = Energy(encoder, images, by_class, own_classes)
    judge = Judge(a.data, images, labels, a.out) if rank == 0 else None
    images = data.to_unit(images)
    torch.manual_seed(a.seed)

    model, _ = dit.load(a.init)
    model.train()
    config = model.config
    average = dit.load(a.init)[0]
    discriminator = critic.Discriminator(encoder.trunk)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.rate, betas=(0.0, 0.99), weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=a.critic_rate, betas=(0.0, 0.99), weight_decay=0.0)
    walks = Walks(walks_x, own)
    step, seconds = 0, 0.0
    if os.path.exists(place("distill.pt")):
        saved = torch.load(place("distill.pt"))
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        discriminator.load_state_dict(saved["discriminator"])
        optimizer.load_state_dict(saved["optimizer"])
        critic_optimizer.load_state_dict(saved["critic_optimizer"])
        walks.at, walks.steps = saved["at"], saved["steps"]
        walks.x[own] = saved["x"][own]
        step, seconds = saved["step"], saved["seconds"]
        if rank == 0:
            print(f"resumed at iteration {step} of {a.iterations}", flush=True)
    else:
        walks.start(images, by_class, torch.Generator().manual_seed(a.seed))
    total = Sum(shared, barrier, rank)
    forward = torch.compile(model) if a.compile else model

    def save():
        saved = {
            "model": model.state_dict(), "average": average.state_dict(), "discriminator": discriminator.state_dict(),
            "optimizer": optimizer.state_dict(), "critic_optimizer": critic_optimizer.state_dict(), "x": walks.x, "at": walks.at,
            "steps": walks.steps, "step": step, "seconds": seconds,
        }
        torch.save(saved, place("distill.pt.tmp"))
        os.replace(place("distill.pt.tmp"), place("distill.pt"))
        tensors = {k: v.half().contiguous() for k, v in average.state_dict().items()}
        meta = dit.metadata(config, dit.Sampler(a.default_steps, 1.0), a.name, [str(i) for i in range(CLASSES)])
        if step >= a.settle_from:
            # Near the end each one is kept, for merge.py to choose from.
            save_file(tensors, place(f"at-{step}.safetensors"), meta)
        save_file(tensors, place("distilled.safetensors.tmp"), meta)
        os.replace(place("distilled.safetensors.tmp"), place("distilled.safetensors"))

    log = open(place("distill.jsonl"), "a") if rank == 0 else None

    def tell(entry: dict):
        log.write(json.dumps(entry) + "\n")
        log.flush()

    if rank == 0:
        print(f"real digits: Frechet distance {judge.real:.3f}; {a.iterations} iterations of {len(walks.x)} walks, seed {a.seed}", flush=True)
    label = torch.arange(CLASSES).repeat_interleave(ROWS)[own]
    label_none = torch.full((share * NONE_ROWS,), config.classes)
    started = saved_at = time.monotonic()
    base_seconds, base_step, sums, n = seconds, step, {}, 0
    while step < a.iterations:
        generator = torch.Generator().manual_seed(a.seed * 10_000_000 + step)
        settled = step - a.settle_from
        if settled == 0:
            model.load_state_dict(average.state_dict())
        if settled < 0:
            # Warm-up, then constant, then down: by three sevenths until the default --settle-from.
            decay, first_beta = min(1.0, (step + 1) / 50, max(0.02, 4 * (1 - step / 1400))), 0.0
        else:
            decay, first_beta = a.settle * min(1.0, max(0.02, 2 * (1 - settled / (a.iterations - a.settle_from)))), 0.8
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = a.rate * decay, (first_beta, 0.99)
        for group in critic_optimizer.param_groups:
            group["lr"] = a.critic_rate * (decay if settled < 0 else decay**0.5)
        long = step >= a.long_from
        now = walks.time()[own]
        none = torch.randint(ROWS, (CLASSES, NONE_ROWS), generator=generator)[own_classes]
        none = (none + torch.arange(share).unsqueeze(1) * ROWS).flatten()
        x = walks.x[own]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = forward(torch.cat([x, x[none]]), torch.cat([now, now[none]]), torch.cat([label, label_none])).float()
        predicted, free = predicted[: len(label)], predicted[len(label) :]
        clean = Clamp.apply(predicted)

        # The discriminator's turn: each real digit against a drawn one of its class.
        discriminator.requires_grad_(True)
        pick = real_rows(by_class, ROWS, generator)
        both = torch.cat([images[pick[own]], clean.detach()])
        noise = torch.randn(2, len(pick), *both.shape[1:], generator=generator)[:, own].flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            score = discriminator(torch.cat([both, both + a.penalty_noise * noise]), label.repeat(4))
        of_real, of_drawn = score[: len(both)].chunk(2)
        penalty = 2 * ((score[: len(both)] - score[len(both) :]) / a.penalty_noise).square().mean()
        critic_loss = F.softplus(of_drawn - of_real).mean()
        critic_optimizer.zero_grad(set_to_none=True)
        (critic_loss + a.penalty / 2 * penalty).backward()
        total(list(discriminator.parameters()))
        critic_optimizer.step()

        # The student's turn.
        discriminator.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            score = discriminator(clean, label)
        adversarial = F.softplus(of_real.detach() - score).mean()
        energies, names = energy.loss(clean, now, STAGES_LONG if long else STAGES, generator)
        naming = F.cross_entropy(names, label)
        free_loss = (free - predicted[none].detach()).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (a.adversarial * adversarial + a.energy * sum(energies) + a.naming * naming + free_loss).backward()
        total(list(model.parameters()))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        walks.advance(predicted.detach(), long, generator)
        step += 1
        with torch.no_grad():
            age = step if settled < 0 else settled + 1
            rate = 1 - min(a.ema, (1 + age) / (10 + age))
            for kept, p in zip(average.parameters(), model.parameters()):
                kept.lerp_(p, rate)

        saving = step == a.iterations or step % a.checkpoint_every == 0
        if saving:
            # The first process reads the walks of all: they have to be done with this step, and not yet with the next.
            barrier.wait()
        if rank == 0:
            entry = {"adversarial": adversarial, "critic": critic_loss, "penalty": penalty, "margin": (of_real - of_drawn).mean(), "norm": norm, "free": free_loss, "naming": naming}
            entry |= {f"energy_{k}": v for k, v in zip(("pixels", "middle", "coarse", "vector"), energies)}
            sums = {k: sums.get(k, 0.0) + v.item() for k, v in entry.items()}
            n += 1
            seconds = base_seconds + time.monotonic() - started
            if step % 25 == 0 or step == a.iterations:
                speed = (step - base_step) / (time.monotonic() - started)
                tell({"step": step, "seconds": round(seconds)} | {k: round(v / n, 4) for k, v in sums.items()})
                text = "  ".join(f"{k} {v / n:.3f}" for k, v in sums.items())
                print(f"iteration {step}/{a.iterations}  {text}  {speed:.2f}/s  {(a.iterations - step) / speed / 60:.1f} min left", flush=True)
                sums, n = {}, 0
            if step % a.evaluate_every == 0 or step == a.iterations:
                entry = {"step": step} | {f"steps_{k}": judge.figures(average, k) for k in (1, 2, 4)}
                tell(entry)
                print(f"iteration {step}: {entry}", flush=True)
            if saving:
                save()
        if saving:
            barrier.wait()


if __name__ == "__main__":
    main()
