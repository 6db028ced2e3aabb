"""Fine-tune on some folders with several learning rates, and write top-1 by epoch to a file.

    python benchmarks/lr_sweep.py runs.jsonl fashion-10 stamps --lr 1.5e-4 3e-4 6e-4 --seeds 1 2 \\
        --flags "--model dinov2_s14.json --pretrained dinov2_s14.pt --no-quick-gelu --image-size 56"
    python benchmarks/lr_sweep.py runs.jsonl --picture lr.png   # a table and a picture of them

The folders are DIR-SEED, as benchmarks/few_images.py writes them. Each run has the default length.
A line of runs.jsonl is a run. Those that it has already are not repeated. `--name` tells runs with
other flags apart. Learning rate 0 stands for logistic regression on the frozen features: the best
of seven C on the validation images, so it is an upper bound.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FTCLIP = Path(__file__).resolve().parent.parent / "ftclip.py"
CORES = len(os.sched_getaffinity(0))


def command(flags: str, folder: str, *more: str) -> list[str]:
    words = [sys.executable, str(FTCLIP), *shlex.split(flags), "--data", folder, *more]
    return [*words, "--workers", "0"]


def fine_tune(folder: str, lr: float, seed: int, flags: str, threads: int) -> dict:
    """Run ftclip. Its curve has [epoch, raw top-1, EMA top-1] of about twelve epochs."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    plan = command(flags, folder, "--dry-run")
    text = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
    epochs = int(text.split("Schedule: ")[1].split()[0])
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as output:
        more = ("--lr", str(lr), "--seed", str(seed), "--eval-every", str(max(1, epochs // 12)))
        run = command(flags, folder, *more, "--output", output, "--save-minutes", "1000")
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env=environment)
        lines = Path(output, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[1:]]
    keys = ("epoch", "raw_top1", "ema_top1")
    curve = [[round(line[key], 2) for key in keys] for line in records if "ema_top1" in line]
    return {"curve": curve, "seconds": round(time.monotonic() - start)}


def logistic_regression(folder: str, flags: str) -> dict:
    """Top-1 of scikit-learn's on the mean of the normed patch tokens of the frozen trunk."""
    sys.path.insert(0, str(FTCLIP.parent))
    import torch
    from sklearn.linear_model import LogisticRegression

    import ftclip

    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--pretrained")
    parser.add_argument("--image-size", type=int)
    given, _ = parser.parse_known_args(shlex.split(flags))
    model = ftclip.build_model(given.model, 2, given.pretrained, given.image_size, False).eval()
    model.head = torch.nn.Identity()
    parts = []
    for split in ("train", "val"):
        images = ftclip.FolderDataset(Path(folder, split))
        images.transform = ftclip.functools.partial(
            ftclip.eval_transform, image_size=given.image_size
        )
        features = []
        labels = []
        with torch.inference_mode():
            for batch, batch_labels in torch.utils.data.DataLoader(images, batch_size=64):
                features.append(model(batch))
                labels.append(batch_labels)
        parts.append((torch.cat(features).numpy(), torch.cat(labels).numpy()))
    scores = []
    for c in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        regression = LogisticRegression(C=c, max_iter=2000).fit(*parts[0])
        scores.append(round(100 * regression.score(*parts[1]), 2))
    return {"top1": max(scores), "by_c": scores}


def table(runs: list[dict]) -> None:
    """Last and best EMA, last raw, and the lowest raw top-1 after the first quarter of the run."""
    print(
        "| set | lr | seed | last EMA | last raw | best EMA (epoch) | lowest raw after a quarter |"
    )
    print("|---|---|---|---|---|---|---|")
    order = sorted(runs, key=lambda run: (run["name"], run["set"], run["lr"], run["seed"]))
    for run in order:
        start = f"| {run['name']} {run['set']} | {run['lr']:g} | {run['seed']} "
        if "top1" in run:
            print(f"{start}| logistic regression: {run['top1']} | | | |")
            continue
        epoch, raw, ema = run["curve"][-1]
        best = max(run["curve"], key=lambda point: point[2])
        lowest = min(point[1] for point in run["curve"] if point[0] >= epoch / 4)
        print(f"{start}| {ema} | {raw} | {best[2]} ({best[0]} of {epoch}) | {lowest} |")


def draw(runs: list[dict], picture: Path) -> None:
    """Last EMA over the learning rate: a line for each set and seed, a panel for each kind of name.

    Sets with fewer than three learning rates are left out.
    """
    import matplotlib.pyplot as plt

    results = {}
    baselines = {}
    for run in runs:
        key = (run["name"], run["set"])
        if "top1" in run:
            baselines.setdefault(key, {})[run["seed"]] = run["top1"]
        else:
            seeds = results.setdefault(key, {})
            seeds.setdefault(run["seed"], {})[run["lr"]] = run["curve"][-1][2]
    results = {key: seeds for key, seeds in results.items() if max(map(len, seeds.values())) > 2}
    kinds = sorted({name.split("-")[0] for name, _ in results})
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(5 * len(kinds), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for kind, axes in zip(kinds, panels[0]):
        rates = set()
        for i, key in enumerate(sorted(key for key in results if key[0].split("-")[0] == kind)):
            for style, seed in zip(("o-", "s--", "^:"), sorted(results[key])):
                points = sorted(results[key][seed].items())
                rates.update(results[key][seed])
                label = f"{key[1]}, {key[0]}" if seed == min(results[key]) else None
                axes.plot(*zip(*points), style, color=f"C{i}", label=label, markersize=4)
            if key in baselines:
                tops = [baselines[key][seed] for seed in results[key] if seed in baselines[key]]
                axes.axhline(sum(tops) / len(tops), color=f"C{i}", linestyle=":", alpha=0.5)
        axes.set(xscale="log", xlabel="lr of the head", ylim=(0, 100))
        axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower left")
    panels[0][0].set_ylabel("EMA top-1 after the last epoch, %")
    title = "solid: first seed, dashed: second; dotted: logistic regression on the frozen features"
    figure.suptitle(title, fontsize=9)
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("sets", nargs="*")
    parser.add_argument("--lr", type=float, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--flags", default="")
    parser.add_argument("--name", default="dinov2-s")
    parser.add_argument("--jobs", type=int, default=CORES)
    parser.add_argument("--picture", type=Path, help="PNG to write; needs matplotlib")
    args = parser.parse_args()
    runs = []
    if args.runs.exists():
        runs = [json.loads(line) for line in args.runs.read_text().splitlines()]
    known = {(run["name"], run["set"], run["lr"], run["seed"]) for run in runs}

    def do(key: tuple) -> None:
        name, folder, lr, seed = key
        place = f"{folder}-{seed}"
        if lr == 0:
            result = logistic_regression(place, args.flags)
        else:
            result = fine_tune(place, lr, seed, args.flags, max(1, CORES // args.jobs))
        run = dict(zip(("name", "set", "lr", "seed"), (name, Path(folder).name, lr, seed)))
        run |= result
        runs.append(run)
        with open(args.runs, "a") as file:
            file.write(json.dumps(run) + "\n")

    keys = [(args.name, f, lr, seed) for seed in args.seeds for lr in args.lr for f in args.sets]
    keys = [key for key in keys if (key[0], Path(key[1]).name, *key[2:]) not in known]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(do, keys))
    table(runs)
    if args.picture:
        draw(runs, args.picture)


if __name__ == "__main__":
    main()
