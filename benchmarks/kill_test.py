"""Kill runs, resume them, and compare the end with an undisturbed run, bit for bit.

    python benchmarks/kill_test.py --kills 50 --restarts 10

Runs have one process, or two under torchrun. A kill comes at a random moment and is SIGKILL to all
processes of a run at once, as when a machine goes away. The same command resumes the run until it
ends. Then its weights, EMA, optimizer state, history and metrics must equal those of a run that
nothing disturbed. last.pt is saved at every report, so that runs are resumed within epochs as
well as between them. MixUp, CutMix, erasing and drop path are on.

After that, --restarts runs of two processes under one torchrun, and as many under two (two nodes,
on the loopback address), in which one process is killed: torchrun's own --max-restarts 1 must bring
them to the same end. Needs Linux.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "ftclip.py"
MODEL = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3}
STEPS_PER_EPOCH = 24
# 48 images in batches of 2: 24 steps per epoch. Reports, and with them saves, come after the steps
# 1, 21, 41 and so on, and at the end of each epoch.
FLAGS = """--pretrained none --epochs 12 --warmup-epochs 1 --batch-size 2 --micro-batch-size 1
--lr 1e-3 --eval-every 3 --save-minutes 0 --workers 1 --device cpu
--mixup 0.5 --cutmix 0.5 --random-erasing 0.25 --drop-path 0.2"""


def draw_images(root: Path) -> None:
    """Three classes of noise, 48 images for training and 12 for validation."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 48), ("val", 12)):
        for i in range(count):
            folder = root / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            cells = torch.randint(256, (6, 8, 3), generator=generator, dtype=torch.uint8)
            image = Image.fromarray(cells.numpy()).resize((48, 36), Image.Resampling.BICUBIC)
            image.save(folder / f"{i}.png")


def start(
    folder: Path, processes: int, nodes: int = 1, restarts: int = 0
) -> list[subprocess.Popen]:
    """Start a run that writes to a folder. Returns one process per node."""
    launcher = [sys.executable]
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        torchrun = (
            f"-m torch.distributed.run --nnodes {nodes} --nproc_per_node {processes // nodes}"
        )
        torchrun += f" --max-restarts {restarts}"
        torchrun += f" --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port}"
        launcher += shlex.split(torchrun)
    root = folder.parent
    flags = ["--model", root / "model.json", "--data", root / "data", "--output", folder]
    command = [*launcher, root / SCRIPT.name, *flags, *shlex.split(FLAGS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(f"{folder}.log", "a") as log:
        return [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log) for _ in range(nodes)
        ]


def processes_of(folder: Path) -> list[int]:
    """Processes whose command has the folder: torchrun, its processes and their workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                command = (entry / "cmdline").read_text().split("\0")
                if str(folder) in command:
                    found.append(int(entry.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.02)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)


def outcome(folder: Path) -> dict:
    """What a run leaves behind."""
    return {
        "last": torch.load(folder / "last.pt", weights_only=True),
        "best": torch.load(folder / "best.pt", weights_only=True),
        "metrics": (folder / "metrics.jsonl").read_text(),
    }


def equal(one: object, other: object) -> bool:
    """Whether two nested values are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other))
    return one == other


def steps_done(folder: Path) -> int:
    """Optimizer steps in last.pt, from which the run is resumed."""
    last = folder / "last.pt"
    return torch.load(last, weights_only=True)["step"] if last.exists() else 0


def run_with_kills(folder: Path, processes: int, duration: float, rng: random.Random) -> list[int]:
    """Start a run again and again until it ends. Returns the step of last.pt after each kill.

    Start-up takes a part of each attempt, so that kills come at 30 to 80 % of the duration of an
    undisturbed run. After six kills the run is left alone.
    """
    steps: list[int] = []
    while True:
        (run,) = start(folder, processes)
        try:
            status = run.wait(rng.uniform(0.3, 0.8) * duration if len(steps) < 6 else None)
        except subprocess.TimeoutExpired:
            for pid in processes_of(folder):
                kill(pid)
            run.wait()
            wait_for(lambda: not processes_of(folder))
            steps.append(steps_done(folder))
            continue
        if status != 0:
            raise RuntimeError(f"{folder.name} ended with status {status}: see {folder}.log")
        return steps


def run_with_restart(folder: Path, nodes: int, duration: float, rng: random.Random) -> list[int]:
    """A run of two processes, of which one is killed. Returns the exit status of each node."""
    agents = start(folder, 2, nodes, restarts=1)
    wait_for((folder / "last.pt").exists)
    time.sleep(rng.uniform(0, 0.3) * duration)
    parents = [agent.pid for agent in agents]
    ranks = [pid for pid in processes_of(folder) if parent_of(pid) in parents]
    kill(rng.choice(ranks))
    return [agent.wait(300) for agent in agents]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=10, help="with one node, and with two")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="kill_test_"))
    (root / "model.json").write_text(json.dumps({"vision_cfg": MODEL}))
    draw_images(root / "data")
    shutil.copy(SCRIPT, root)  # which may be edited while this runs
    print(f"in {root}", flush=True)

    references = {}
    durations = {}
    for processes in (1, 2):
        folder = root / f"undisturbed{processes}"
        began = time.time()
        (run,) = start(folder, processes)
        if run.wait() != 0:
            sys.exit(f"the undisturbed run failed: see {folder}.log")
        durations[processes] = time.time() - began
        references[processes] = outcome(folder)
        print(f"undisturbed, {processes} process(es): {durations[processes]:.1f} s", flush=True)

    runs = 0
    equal_runs = 0
    kills = 0
    within = 0  # kills after which the run was resumed within an epoch
    while kills < args.kills:
        processes = 1 + runs % 2
        folder = root / f"run{runs}"
        steps = run_with_kills(folder, processes, durations[processes], rng)
        same = equal(outcome(folder), references[processes])
        runs += 1
        equal_runs += same
        kills += len(steps)
        within += sum(step % STEPS_PER_EPOCH > 0 for step in steps)
        print(
            f"{folder.name}: {processes} process(es), resumed from the steps {steps}, "
            f"equal: {same}; {kills} kills so far",
            flush=True,
        )

    for nodes in (1, 2):
        for i in range(args.restarts):
            folder = root / f"restart{nodes}.{i}"
            statuses = run_with_restart(folder, nodes, durations[2], rng)
            same = not any(statuses) and equal(outcome(folder), references[2])
            runs += 1
            equal_runs += same
            print(f"restart {i + 1} on {nodes} node(s): {statuses}, equal: {same}", flush=True)

    print(
        f"{equal_runs} of {runs} runs equal, after {kills} kills, {within} of them resumed within "
        f"an epoch, and {2 * args.restarts} restarts"
    )
    sys.exit(equal_runs != runs)


if __name__ == "__main__":
    main()
