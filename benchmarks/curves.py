"""The four published runs by epoch, as their logs print them: what to expect, and when the best epoch comes.

    python benchmarks/curves.py [--output benchmarks/official_runs.png]    # needs matplotlib

Top-1 on ImageNet-1k's validation set of the raw and of the EMA weights, from the training logs that the
official repository publishes (github.com/LightDXY/FT-CLIP, commit 3f9cefa). That of B/16 at 384 ends after 33
of 50 epochs.
"""

import argparse

import matplotlib.pyplot as plt

RUNS = """
B/16, 224; 50;
52.116 76.212 79.16 80.696 81.182 81.348 81.464 81.676 81.774 81.752 82.018 82.474 82.41 82.648 82.906
83.046 83.168 83.212 83.426 83.528 83.386 83.706 83.622 83.618 83.844 83.724 83.682 83.876 83.87 83.768
83.954 83.89 83.95 84.068 84.092 84.076 84.108 84.2 84.12 84.064 84.14 84.19 84.198 84.15 84.2 84.206
84.266 84.224 84.272 84.262;
20.044 41.858 57.496 67.408 73.14 76.434 78.752 80.188 81.314 82.09 82.734 83.248 83.622 83.982 84.254
84.552 84.742 84.916 85 85.106 85.242 85.368 85.468 85.464 85.524 85.522 85.568 85.6 85.598 85.656 85.598
85.558 85.512 85.464 85.426 85.368 85.36 85.302 85.296 85.268 85.206 85.122 85.058 85.054 84.976 84.938
84.878 84.784 84.762 84.728

B/16, 384; 50;
48.826 76.9 79.932 81.472 82.076 82.166 82.498 82.518 82.432 82.718 83.132 83.4 83.594 83.89 83.866 83.736
84.05 84.24 84.18 84.724 84.436 84.656 84.604 84.882 84.702 84.79 84.786 84.856 84.73 84.874 84.73 84.958
84.688;
18.798 35.058 51.664 63.432 70.69 75.444 78.456 80.456 81.862 82.756 83.514 84.114 84.496 84.876 85.178
85.372 85.618 85.838 85.964 86.086 86.194 86.306 86.404 86.452 86.526 86.584 86.604 86.644 86.626 86.614
86.584 86.574 86.566

L/14, 224; 30;
66.984 83.188 84.55 85.224 85.626 86.074 86.31 86.328 86.672 86.65 86.778 86.872 86.85 87.04 86.95 86.94
87.076 86.972 86.842 86.96 86.92 86.946 86.892 86.98 86.95 86.932 86.998 87.044 86.98 87.018;
17.452 36.334 55.84 69.254 77.136 81.296 83.546 84.93 85.79 86.3 86.714 87.018 87.292 87.462 87.628 87.722
87.82 87.896 87.912 87.974 87.948 87.886 87.844 87.772 87.7 87.66 87.61 87.55 87.514 87.486

L/14, 336; 30;
77.131 83.727 84.937 85.449 85.946 86.178 86.662 86.922 87.022 87.024 87.172 87.09 87.052 87.342 86.946
87.2 87.244 87.31 87.222 87.166 87.222 87.178 87.008 87.138 87.104 87.044 87.1 87.128 87.128 87.11;
24.094 41.983 58.369 71.329 79.754 83.275 85.119 86.062 86.69 87.156 87.526 87.762 87.932 88.07 88.14
88.206 88.26 88.306 88.328 88.302 88.25 88.192 88.18 88.152 88.052 87.994 87.916 87.866 87.81 87.73
"""  # name; epochs of the recipe; raw top-1 by epoch; EMA top-1 by epoch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="benchmarks/official_runs.png")
    args = parser.parse_args()
    figure, all_axes = plt.subplots(1, 4, figsize=(11, 2.7), layout="constrained")
    for axes, run in zip(all_axes, RUNS.split("\n\n")):
        name, epochs, raw, ema = run.strip().split(";")
        epochs, raw, ema = int(epochs), list(map(float, raw.split())), list(map(float, ema.split()))
        best = ema.index(max(ema))
        axes.plot(range(1, len(raw) + 1), raw, color="0.6", label="raw")
        axes.plot(range(1, len(ema) + 1), ema, color="C0", label="EMA")
        axes.plot(best + 1, ema[best], "C3o")
        axes.annotate(
            f"best {ema[best]:.2f}", (best + 1, ema[best]), (0, 5), textcoords="offset points", ha="center"
        )
        if len(ema) == epochs:
            axes.plot(epochs, ema[-1], "C0s")
            axes.annotate(
                f"last {ema[-1]:.2f}", (epochs, ema[-1]), (0, -22), textcoords="offset points", ha="right"
            )
        axes.set(title=name, xlabel="epoch", xlim=(0, epochs + 1), ylim=(max(ema) - 6, max(ema) + 0.7))
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("top-1, %")
    all_axes[0].legend(loc="lower right")
    figure.savefig(args.output, dpi=80)


if __name__ == "__main__":
    main()
