"""Figures 1 and 3 of the paper in miniature, on two cores: a tiny ViT, and Fashion-MNIST.

    python benchmarks/figure1.py                # does what is left to do, prints the table; an hour
    python benchmarks/figure1.py --seeds 2      # fewer sets of few images
    python benchmarks/figure1.py --dry-run      # only check that ftclip.py accepts each command

A ViT of 0.7 M parameters learns five of the ten classes from all of their images. It is then
fine-tuned on the other five with 100 images each, which the seed draws: by the seven steps of
Figure 1, by partial tuning, and by other usual ways. Learning rates are chosen on seed 0. Results
are of seeds 1 and up: top-1 of the last epoch on 5,000 validation images, on which nothing is
chosen. Everything is a command line of ftclip.py. Its files lie in --output, and the same command
goes on after an interruption.

Needs the network once, for the images, or Debian's package dataset-fashion-mnist. Draws figure1.png
if matplotlib is installed.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torchvision.datasets import FashionMNIST

FTCLIP = Path(__file__).resolve().parent.parent / "ftclip.py"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PRETRAINED_ON = ("T-shirt/top", "Pullover", "Dress", "Sandal", "Sneaker")
FEW = 100  # training images of each of the other classes
VIT = {"image_size": 28, "patch_size": 7, "width": 96, "layers": 6, "head_width": 32}

STRONG = "--mixup 0.8 --cutmix 1"
LONG = f"--epochs 100 {STRONG}"
# name: (flags, learning rates), each on seed 0
SWEEPS = {
    "no decay": (f"--layer-decay 1 --ema-decay 0 {LONG}", (1e-4, 3e-4, 1e-3, 3e-3)),
    "decay": (LONG, (3e-4, 1e-3, 3e-3, 1e-2)),
    "plain": (
        "--layer-decay 1 --ema-decay 0 --randaug 0 --random-erasing 0",
        (1e-4, 3e-4, 1e-3, 3e-3),
    ),
}
# name: (flags, the learning rate or the sweep that chose it)
STEPS = {
    "the usual setting": (f"--layer-decay 1 --ema-decay 0 {LONG}", 1e-3),
    "reduce lr": (f"--layer-decay 1 --ema-decay 0 {LONG}", "no decay"),
    "EMA": (f"--layer-decay 1 {LONG}", "no decay"),
    "layer-wise lr decay": (LONG, "decay"),
    "fewer epochs": (STRONG, "decay"),
    "weaken augmentations": ("", "decay"),
    "resolution 42": ("--image-size 42 --no-freeze-patch-embed", "decay"),
}
PARTIAL = {f"{k} of 6 blocks": (f"--train-blocks {k}", "decay") for k in range(6)}
OTHERS = {
    "default (python ftclip.py --data DIR)": ("", None),  # batch 8, lr by its square root: 3.75e-5
    "default, but lr by the batch: 2.3e-6": ("--batch-size 8", 6e-4 * 8 / 2048),
    "default, but lr of the recipe: 6e-4": ("--batch-size 8", 6e-4),
    "default, linear probe at 6e-4": ("--batch-size 8 --train-blocks 0", 6e-4),
    "recipe, EMA of a tenth": ("--ema-decay 0.98667", "decay"),
    "recipe, crop and flip only": ("--randaug 0 --random-erasing 0", "decay"),
    "plain AdamW, one lr": (SWEEPS["plain"][0], "plain"),
    "from scratch": ("--pretrained none --layer-decay 1 --no-freeze-patch-embed", 1e-3),
}


def write_images(root: Path) -> None:
    """Write the images of PRETRAINED_ON to root/pretrain and the others to root/rest."""
    if (root / "rest").is_dir():
        return
    raw = root / "FashionMNIST/raw"
    part = root / "part"
    raw.mkdir(parents=True, exist_ok=True)
    for file in DEBIAN.glob("*-ubyte.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    for split in ("train", "val"):
        images = FashionMNIST(root, train=split == "train", download=True)
        for i, (image, label) in enumerate(images):
            name = images.classes[label]
            half = "pretrain" if name in PRETRAINED_ON else "rest"
            folder = part / half / split / name.split("/")[0]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:05d}.png")
    (part / "pretrain").rename(root / "pretrain")
    (part / "rest").rename(root / "rest")


def few_images(root: Path, seed: int) -> None:
    """Link FEW training images per class of root/rest, and all of val, in root/data-SEED."""
    data = root / f"data-{seed}"
    for folder in sorted((root / "rest/train").iterdir()):
        (data / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        for file in random.Random(f"{seed}/{folder.name}").sample(sorted(folder.iterdir()), FEW):
            link = data / "train" / folder.name / file.name
            if not link.exists():
                link.symlink_to(file)
    if not (data / "val").exists():
        (data / "val").symlink_to(root / "rest/val")


def run(output: Path, flags: str, dry_run: bool) -> list[dict]:
    """The records of a run, which is trained if it is not finished. The last has "seconds"."""
    command = [sys.executable, FTCLIP, *flags.split(), "--output", output, "--workers", "1"]
    if dry_run:
        subprocess.run([*command, "--dry-run"], stdout=subprocess.DEVNULL, check=True)
        return [{"ema_top1": 0.0, "seconds": 0.0}]
    output.mkdir(parents=True, exist_ok=True)
    result = output / "result.json"
    if not result.exists():
        began = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(output / "log.txt", "a") as log:
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
        _, *lines = (output / "metrics.jsonl").read_text().splitlines()  # the first has the plan
        records = [json.loads(line) for line in lines]
        records[-1]["seconds"] = time.perf_counter() - began
        result.write_text(json.dumps(records))
        (output / "last.pt").unlink()
    return json.loads(result.read_text())


def pretrain(root: Path, dry_run: bool) -> str:
    """Pretrain the ViT. Returns the flags that start from it."""
    model = root / "vit.json"
    model.write_text(json.dumps({"embed_dim": 64, "vision_cfg": VIT}))
    flags = f"--model {model} --data {root}/pretrain --pretrained none --layer-decay 1"
    flags += " --no-freeze-patch-embed --lr 1e-3 --batch-size 128 --epochs 20 --warmup-epochs 2"
    flags += " --eval-every 10 --crop-scale 0.3"
    last = run(root / "pretraining", flags, dry_run)[-1]
    print(f"pretraining: top-1 {last['ema_top1']:.2f} % of five classes, {last['seconds']:.0f} s")
    if dry_run:
        return f"--model {model} --pretrained none"  # best.pt may not be there yet
    return f"--model {model} --pretrained {root}/pretraining/best.pt"


def fine_tune(
    root: Path, start: str, name: str, flags: str, lr: float | None, seed: int, dry_run: bool
) -> list[dict]:
    """One run. With a learning rate the batch is 32; else both are ftclip's defaults."""
    epochs = 100 if "--epochs 100" in flags else 50
    flags += f" --crop-scale 0.3 --eval-every {epochs // 2} --seed {seed} --data {root}/data-{seed}"
    if lr:
        flags = f"--batch-size 32 {flags} --lr {lr}"
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    return run(root / f"runs/{label}-{seed}", f"{start} {flags}", dry_run)


def top1(records: list[dict]) -> float:
    return records[-1]["ema_top1"]


def draw(file: Path, results: dict[str, list[list[dict]]]) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"{file.name} is drawn if matplotlib is installed (pip install matplotlib)")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    partial = [*PARTIAL, "weaken augmentations"]
    for axes, names, labels in (
        (left, list(STEPS), list(STEPS)),
        (
            right,
            [*partial, *OTHERS],
            [
                "0",
                "1",
                "2",
                "3",
                "4",
                "5",
                "6",
                "default",
                "lr ∝\nbatch",
                "lr\n6e-4",
                "probe\n6e-4",
                "EMA\n1/10",
                "crop,\nflip",
                "plain",
                "scratch",
            ],
        ),
    ):
        means = [statistics.mean(map(top1, results[name])) for name in names]
        for i, name in enumerate(names):
            axes.plot([i] * len(results[name]), list(map(top1, results[name])), ".", color="0.7")
        joined = len(names) if axes is left else len(partial)
        axes.plot(range(joined), means[:joined], "o-", color="C0")
        axes.plot(range(joined, len(names)), means[joined:], "o", color="C1")
        axes.set_xticks(
            range(len(names)), [label.replace(" ", "\n", 1) for label in labels], fontsize=7
        )
        axes.grid(axis="y", alpha=0.3)
    left.set_title("Figure 1's steps in miniature, each with those before it", fontsize=9)
    right.set_title("tuned blocks of 6, with the recipe; then other ways", fontsize=9)
    left.set_ylabel("top-1 after the last epoch, %", fontsize=9)
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/figure1"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--dry-run", action="store_true", help="check the commands, train nothing")
    args = parser.parse_args()
    root = args.output.resolve()
    write_images(root)
    for seed in range(args.seeds + 1):
        few_images(root, seed)
    start = pretrain(root, args.dry_run)
    with ThreadPoolExecutor(args.jobs) as pool:

        def submit(name: str, flags: str, lr: float | None, seed: int):
            return pool.submit(fine_tune, root, start, name, flags, lr, seed, args.dry_run)

        sweeps = {
            sweep: {lr: submit(f"sweep {sweep} {lr:g}", flags, lr, 0) for lr in rates}
            for sweep, (flags, rates) in SWEEPS.items()
        }
        chosen = {}
        for sweep, runs in sweeps.items():
            scores = {lr: top1(future.result()) for lr, future in runs.items()}
            chosen[sweep] = max(scores, key=scores.get)
            text = ", ".join(f"{lr:g} {score:.2f} %" for lr, score in scores.items())
            print(f"lr, {sweep}: {text}: {chosen[sweep]:g} is taken", flush=True)
        table = STEPS | PARTIAL | OTHERS
        futures = {name: [] for name in table}
        for seed in range(1, args.seeds + 1):
            for name, (flags, lr) in table.items():
                futures[name].append(submit(name, flags, chosen.get(lr, lr), seed))
        results = {name: [future.result() for future in runs] for name, runs in futures.items()}

    print("| step | top-1 ± deviation | against the row above ± error | at half time | seconds |")
    print("|---|---|---|---|---|")
    above = None
    for name, runs in results.items():
        scores = list(map(top1, runs))
        half = [next(record for record in run if "ema_top1" in record) for run in runs]
        half = statistics.mean(record["ema_top1"] for record in half)
        spread = statistics.stdev(scores) if len(scores) > 1 else 0
        gain = ""
        if above and name in STEPS:
            gains = [score - other for score, other in zip(scores, above)]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0
            gain = f"{statistics.mean(gains):+.2f} ± {error:.2f}"
        seconds = statistics.mean(run[-1]["seconds"] for run in runs)
        mean = statistics.mean(scores)
        print(f"| {name} | {mean:.2f} ± {spread:.2f} | {gain} | {half:.2f} | {seconds:.0f} |")
        above = scores
    if not args.dry_run:
        draw(root / "figure1.png", results)


if __name__ == "__main__":
    main()
