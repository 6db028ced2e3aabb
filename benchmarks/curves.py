"""Draw runs by epoch: loss, top-1 and learning rate.

    python benchmarks/curves.py runs/*/metrics.jsonl --output curves.png
    python benchmarks/curves.py --published --output benchmarks/official_runs.png

The first command draws your own runs, in one colour each, under the names of their folders. The
second draws the four published runs as their logs print them: what to expect, and in which epoch
the best comes. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; no display is needed
import matplotlib.pyplot as plt

# Top-1 on the validation set of ImageNet-1k, from the training logs in the official repository
# (github.com/LightDXY/FT-CLIP, commit 3f9cefa). The log of B/16 at 384 ends after 33 of 50 epochs.
# Each run: name; epochs of the recipe; raw top-1 by epoch; EMA top-1 by epoch.
PUBLISHED = """
B/16, 224; 50;
52.116 76.212 79.16 80.696 81.182 81.348 81.464 81.676 81.774 81.752 82.018 82.474 82.41 82.648
82.906 83.046 83.168 83.212 83.426 83.528 83.386 83.706 83.622 83.618 83.844 83.724 83.682 83.876
83.87 83.768 83.954 83.89 83.95 84.068 84.092 84.076 84.108 84.2 84.12 84.064 84.14 84.19 84.198
84.15 84.2 84.206 84.266 84.224 84.272 84.262;
20.044 41.858 57.496 67.408 73.14 76.434 78.752 80.188 81.314 82.09 82.734 83.248 83.622 83.982
84.254 84.552 84.742 84.916 85 85.106 85.242 85.368 85.468 85.464 85.524 85.522 85.568 85.6 85.598
85.656 85.598 85.558 85.512 85.464 85.426 85.368 85.36 85.302 85.296 85.268 85.206 85.122 85.058
85.054 84.976 84.938 84.878 84.784 84.762 84.728

B/16, 384; 50;
48.826 76.9 79.932 81.472 82.076 82.166 82.498 82.518 82.432 82.718 83.132 83.4 83.594 83.89
83.866 83.736 84.05 84.24 84.18 84.724 84.436 84.656 84.604 84.882 84.702 84.79 84.786 84.856
84.73 84.874 84.73 84.958 84.688;
18.798 35.058 51.664 63.432 70.69 75.444 78.456 80.456 81.862 82.756 83.514 84.114 84.496 84.876
85.178 85.372 85.618 85.838 85.964 86.086 86.194 86.306 86.404 86.452 86.526 86.584 86.604 86.644
86.626 86.614 86.584 86.574 86.566

L/14, 224; 30;
66.984 83.188 84.55 85.224 85.626 86.074 86.31 86.328 86.672 86.65 86.778 86.872 86.85 87.04 86.95
86.94 87.076 86.972 86.842 86.96 86.92 86.946 86.892 86.98 86.95 86.932 86.998 87.044 86.98 87.018;
17.452 36.334 55.84 69.254 77.136 81.296 83.546 84.93 85.79 86.3 86.714 87.018 87.292 87.462
87.628 87.722 87.82 87.896 87.912 87.974 87.948 87.886 87.844 87.772 87.7 87.66 87.61 87.55 87.514
87.486

L/14, 336; 30;
77.131 83.727 84.937 85.449 85.946 86.178 86.662 86.922 87.022 87.024 87.172 87.09 87.052 87.342
86.946 87.2 87.244 87.31 87.222 87.166 87.222 87.178 87.008 87.138 87.104 87.044 87.1 87.128
87.128 87.11;
24.094 41.983 58.369 71.329 79.754 83.275 85.119 86.062 86.69 87.156 87.526 87.762 87.932 88.07
88.14 88.206 88.26 88.306 88.328 88.302 88.25 88.192 88.18 88.152 88.052 87.994 87.916 87.866
87.81 87.73
"""


def read_metrics(path: Path) -> list[dict]:
    """The records of a run, one per epoch. The first line of the file has the recipe."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "epoch" in line]


def draw_runs(files: list[Path], output: Path) -> None:
    """Loss, raw and EMA top-1, and lr of the head by epoch."""
    figure, (loss, top1, lr) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for i, file in enumerate(files):
        records = read_metrics(file)
        name = file.resolve().parent.name
        color = f"C{i % 10}"
        epochs = [record["epoch"] for record in records]
        loss.plot(epochs, [record["train_loss"] for record in records], ".-", color=color)
        lr.plot(epochs, [record["lr"] for record in records], ".-", color=color, label=name)
        # Unless --eval-every is 1, not every epoch has an evaluation.
        evaluated = [record for record in records if "ema_top1" in record]
        epochs = [record["epoch"] for record in evaluated]
        for key, style in (("raw_top1", ".:"), ("ema_top1", ".-")):
            grey = len(files) == 1 and key == "raw_top1"  # as in the picture of the published runs
            values = [record[key] for record in evaluated]
            top1.plot(epochs, values, style, color="0.6" if grey else color)
    top1.plot([], [], ":", color="0.6", label="raw")
    top1.plot([], [], "-", color="C0" if len(files) == 1 else "0.3", label="EMA")
    top1.legend()
    lr.legend()
    for axes, title in ((loss, "training loss"), (top1, "top-1, %"), (lr, "lr of the head")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=80)


def draw_published(output: Path) -> None:
    """Raw and EMA top-1 of the four published runs by epoch."""
    figure, all_axes = plt.subplots(1, 4, figsize=(12, 2.9), layout="constrained")
    for axes, run in zip(all_axes, PUBLISHED.split("\n\n")):
        name, epochs, raw, ema = run.strip().split(";")
        epochs = int(epochs)
        raw = [float(value) for value in raw.split()]
        ema = [float(value) for value in ema.split()]
        best = max(ema)
        best_epoch = ema.index(best) + 1
        axes.plot(range(1, len(raw) + 1), raw, ":", color="0.6", label="raw")
        axes.plot(range(1, len(ema) + 1), ema, color="C0", label="EMA")
        axes.plot(best_epoch, best, "C3o")
        above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"best {best:.2f}", (best_epoch, best), **above)
        last = f"last EMA {ema[-1]:.2f}" if len(ema) == epochs else f"the log ends at {len(ema)}"
        axes.set(title=f"{name}\n{last}", xlabel="epoch", xlim=(0, epochs + 1))
        axes.set_ylim(best - 6, best + 0.7)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("top-1 on ImageNet-1k, %")
    all_axes[0].legend(loc="lower right")
    figure.savefig(output, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="*", type=Path, help="metrics.jsonl of one or more runs")
    parser.add_argument("--published", action="store_true", help="draw the published runs instead")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    if args.published == bool(args.metrics):
        parser.error("give either metrics.jsonl files or --published")
    if args.published:
        draw_published(args.output)
    else:
        draw_runs(args.metrics, args.output)
    print(f"{args.output} is drawn")


if __name__ == "__main__":
    main()
