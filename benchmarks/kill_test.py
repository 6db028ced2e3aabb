"""Kill runs at random moments until there were enough kills, and compare what they end with, bit for bit.

    python benchmarks/kill_test.py --kills 50 --restarts 10

The runs have 1 process, or 2 or 4 under torchrun (4 tell whether sums keep their order); half of the kills are
SIGKILL to every process at once (a machine that goes away), half are SIGTERM (a cluster that takes it back;
torchrun passes it on). Each killed run is started again with the same command until it ends, and must then
equal a run that nothing disturbed: weights, EMA, optimizer state, metrics. Drop path, MixUp, CutMix and erasing
are on. No process may stay behind.

Then, --restarts times under one torchrun with two processes and as often under two with one each (two nodes,
on the loopback address), one process is killed at a random moment, and torchrun's own --max-restarts 1 must
bring the run to the same end.
"""

import argparse
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ftclip
import test_ftclip

SCRIPT = Path(ftclip.__file__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="kill_test_"))
    (root / "tiny.json").write_text(json.dumps(test_ftclip.TINY))
    test_ftclip.draw_data(root / "data")

    def start(folder: Path, processes: int, nodes: int = 1, restarts: int = 0) -> list[subprocess.Popen]:
        launcher = [sys.executable]
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            how = f"--nnodes {nodes} --nproc_per_node {processes // nodes} --max-restarts {restarts} "
            how += f"--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port}"
            launcher += ["-m", "torch.distributed.run", *how.split()]
        more = shlex.split("--epochs 40 --workers 1 --save-every 2")
        flags = test_ftclip.flags(str(root / "tiny.json"), root / "data", folder, *more)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [*launcher, str(SCRIPT), *flags]
        with open(f"{folder}.log", "w") as log:
            how = {"env": environment, "stdout": log, "stderr": log}
            return [subprocess.Popen(command, **how) for _ in range(nodes)]

    references, durations = {}, {}
    for processes in (1, 2, 4):
        began = time.time()
        assert start(root / f"reference{processes}", processes)[0].wait() == 0
        references[processes] = test_ftclip.outcome(root / f"reference{processes}")
        durations[processes] = time.time() - began
    print("undisturbed:", {n: f"{seconds:.1f} s" for n, seconds in durations.items()}, flush=True)

    kills = {"SIGKILL": 0, "SIGTERM": 0}
    runs = equal = clumsy = 0
    slowest = 0.0  # seconds from SIGTERM to the end of the last process
    while sum(kills.values()) < args.kills:
        processes = (1, 2, 4)[runs % 3]
        folder = root / f"run{runs}"
        here = 0
        while True:
            (run,) = start(folder, processes)
            # Start-up takes most of a short run: aim at the rest of it, but not only.
            try:
                status = run.wait(rng.uniform(0.3, 0.7) * durations[processes] if here < 12 else None)
                break
            except subprocess.TimeoutExpired:
                name = rng.choice(sorted(kills))
                kills[name] += 1
                here += 1
                began = time.time()
                if name == "SIGTERM":
                    run.terminate()
                    run.wait(60)
                    slowest = max(slowest, time.time() - began)
                    # torchrun writes a traceback of its own, of which nothing is ours.
                    clumsy += f'"{SCRIPT}"' in Path(f"{folder}.log").read_text()
                else:
                    for pid in test_ftclip.processes_of(folder):
                        try:
                            os.kill(pid, signal.SIGKILL)
                        except ProcessLookupError:
                            continue
                    run.wait(60)
                test_ftclip.wait_for(lambda folder=folder: not test_ftclip.processes_of(folder), 20)
        same = status == 0 and test_ftclip.same(test_ftclip.outcome(folder), references[processes])
        runs, equal = runs + 1, equal + same
        print(f"run {runs}: {processes} process(es), {here} kills, equal: {same}; so far {kills}", flush=True)
    print(f"{equal} of {runs} runs equal after {kills}")
    print(f"SIGTERM took at most {slowest:.1f} s, and gave {clumsy} tracebacks", flush=True)

    for nodes in (1, 2):
        for i in range(args.restarts):
            folder = root / f"restart{nodes}.{i}"
            agents = start(folder, 2, nodes, restarts=1)
            test_ftclip.wait_for((folder / "last.pt").exists)
            time.sleep(rng.uniform(0, 0.3) * durations[2])
            parents = {agent.pid for agent in agents}
            workers = [
                pid for pid in test_ftclip.processes_of(folder) if test_ftclip.parent_of(pid) in parents
            ]
            os.kill(rng.choice(workers), signal.SIGKILL)
            statuses = [agent.wait(120) for agent in agents]
            same = not any(statuses) and test_ftclip.same(test_ftclip.outcome(folder), references[2])
            runs, equal = runs + 1, equal + same
            print(f"restart {i} on {nodes} node(s): {statuses}, equal: {same}", flush=True)
    print(f"{equal} of {runs} runs equal")
    sys.exit(equal != runs or clumsy)


if __name__ == "__main__":
    main()
