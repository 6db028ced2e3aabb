"""Check what only a GPU or a network can show, in one command of at most nine minutes.

    python3 benchmarks/gpu_check.py                      # all parts
    python3 benchmarks/gpu_check.py --parts step,feed    # some of them
    python3 benchmarks/gpu_check.py --json figures.json  # and the figures as JSON
    python3 benchmarks/gpu_check.py --small              # in small on the CPU, in float32

It needs the project's packages and pytest, draws its own images and writes to a temporary folder.
Without a GPU, --small is the default. The parts:

    tests     the test suite's GPU tests
    step      training steps of ftclip's and timm's models in alternation, eager and compiled:
              speed, memory, share of the device's measured matrix rate, synchronization with it
    run       the demo in bf16 and fp16, SIGKILL and resume, --eval
    feed      ViT-B/16 on 500x375 JPEGs from the disk: speed
    torchrun  one process under torchrun, with NCCL
    weights   OpenAI's ViT-B/16 by its tag: ftclip's tokens and open_clip's. Needs a network, or the
              weights in the cache

Each part has a time limit, plus what the parts before it have left of theirs. A part that fails or
reaches its limit is reported, and the next one begins. The exit status is 1 if a part failed.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ftclip

if "--small" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the processes that are started here
GPU = torch.cuda.is_available()
# In seconds, 535 in all.
LIMITS = {"tests": 120, "step": 190, "run": 90, "feed": 45, "torchrun": 30, "weights": 60}
MODELS = [
    # open_clip name, timm name, micro-batch, GFLOP per image: forward, and twice that backward
    ("ViT-B-16", "vit_base_patch16_clip_quickgelu_224", 256, 105.6),
    ("ViT-L-14", "vit_large_patch14_clip_quickgelu_224", 64, 488.7),
]
figures: dict[str, float | str] = {}


def tell(name: str, value: float | str) -> None:
    """Print a line of the table and keep the figure for the JSON file."""
    figures[name] = value
    print(f"{name:<57} {value}", flush=True)


def call(
    command: list, folder: Path, deadline: float, kill_at: str | None = None, cwd: Path = ROOT
) -> str:
    """Run a command and return what it printed.

    Args:
        folder: for a file with the output.
        deadline: time.monotonic() at which it is ended.
        kill_at: text in the output at which it is killed with SIGKILL.
        cwd: its working directory.

    Raises RuntimeError with the end of the output if the command fails or ends at another time.
    """
    log = folder / "output.txt"
    environment = os.environ | {
        "NCCL_DEBUG": "VERSION",  # NCCL then says that it is used
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait leave the cores to others
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),  # empty at first
    }
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, to end its workers with it
        )
    killed = False
    try:
        while process.poll() is None and time.monotonic() < deadline and not killed:
            time.sleep(0.05)
            killed = kill_at is not None and kill_at in log.read_text()
        late = process.poll() is None and not killed
        if late:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun then ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    output = log.read_text()
    if late or killed != (kill_at is not None) or (status != 0 and not killed):
        reason = "time limit" if late else f"exit status {status}"
        raise RuntimeError(f"{reason}: {output[-3000:]}")
    return output


def tests(folder: Path, deadline: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu"]
    output = call([*command, "test_ftclip.py"], folder, deadline)
    tell("tests", output.strip().splitlines()[-1])


def call_self(name: str, folder: Path, deadline: float) -> None:
    """Call measure_NAME() in a process of its own, which prints each figure as JSON."""
    try:
        call([sys.executable, Path(__file__).resolve(), "--measure", name], folder, deadline)
    finally:
        for line in (folder / "output.txt").read_text().splitlines():
            if line.startswith('["'):
                tell(*json.loads(line))


def tell_parent(name: str, value: float | str) -> None:
    print(json.dumps([name, value]), flush=True)


def step(folder: Path, deadline: float) -> None:
    call_self("step", folder, deadline)


def seconds_of(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in alternation."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if GPU:
                torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            if GPU:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def make_step(
    who: str, model: tuple, compiled: bool, images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """A training step of ftclip's or timm's model, with the same optimizer, EMA and train_step."""
    import timm
    from timm.optim import param_groups_layer_decay

    name, timm_name, _, _ = model
    config = ftclip.model_config(name)
    if not GPU:
        config["vision_cfg"]["layers"] = 2
    layers = config["vision_cfg"]["layers"]
    if who == "ftclip":
        classifier = ftclip.build_model(config, 1000, quick_gelu=True).to(images.device)
        groups = ftclip.param_groups(classifier, layers, 1e-5, 0.6, 0.05)
    else:
        classifier = timm.create_model(timm_name, num_classes=1000, depth=layers).to(images.device)
        groups = param_groups_layer_decay(classifier, 0.05, layer_decay=0.6)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=False)
    ema = ftclip.EMA(classifier, 0.9998)
    trained = torch.compile(classifier) if compiled else classifier
    amp_dtype = torch.bfloat16 if GPU else None

    def run() -> None:
        batches = iter([(images, labels)])
        ftclip.train_step(trained, batches, 1, optimizer, scaler, amp_dtype, 0.1)
        ema.update(classifier)

    return run


def measure_step() -> None:
    device = torch.device("cuda" if GPU else "cpu")
    size = 8192 if GPU else 1024
    square = torch.randn(size, size, device=device).to(torch.bfloat16 if GPU else torch.float32)
    product = functools.partial(torch.matmul, square, square)
    seconds = seconds_of({"product": product}, 12)["product"]
    rate = 2 * size**3 / seconds / 1e9
    tell_parent(f"matrix rate, {square.dtype}, TFLOP/s", round(rate / 1000, 3))
    del square, product

    for compiled in (False, True):
        for model in MODELS if GPU else MODELS[:1]:
            name, _, batch, gflop = model
            if not GPU:
                name, batch, gflop = "ViT-B-16 of 2 blocks", 4, gflop * 2 / 12
            images = torch.randn(batch, 3, 224, 224, device=device)
            labels = torch.randint(1000, (batch,), device=device)
            kind = "compiled" if compiled else "eager"
            title = f"{name} x {batch} {kind}"
            runs = {}
            for who in ("ftclip", "timm") if GPU or not compiled else ("ftclip",):
                before = torch.cuda.memory_allocated() if GPU else 0
                began = time.perf_counter()
                runs[who] = make_step(who, model, compiled, images, labels)
                runs[who]()
                runs[who]()
                tell_parent(f"{title} {who}, s to start", round(time.perf_counter() - began, 1))
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                    runs[who]()
                    used = torch.cuda.max_memory_allocated() - before
                    tell_parent(f"{title} {who}, GiB", round(used / 2**30, 2))
            for who, seconds in seconds_of(runs, 12 if GPU else 3).items():
                tell_parent(f"{title} {who}, images/s", round(batch / seconds, 1))
                share = 100 * batch / seconds * gflop / rate
                tell_parent(f"{title} {who}, % of matrix rate", round(share, 1))
            if GPU and not compiled:
                pixels = torch.zeros(8, 3, 224, 224, dtype=torch.uint8).pin_memory()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    ftclip.seed_generators("check")
                    normalized = ftclip.normalize(pixels.to(device, non_blocking=True))
                    ftclip.random_erasing(normalized, 1.0)
                    runs["ftclip"]()
                    found = "none"
                except RuntimeError:
                    found = traceback.format_exc()[-600:]
                torch.cuda.set_sync_debug_mode("default")
                tell_parent(f"{title} ftclip, synchronizations", found)
            del runs, images, labels
            if GPU:
                torch.cuda.empty_cache()


def learned(output: Path) -> str:
    """The losses and the accuracy of a run. Raises RuntimeError if the loss did not fall."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, last = records[1], records[-1]  # records[0] is the recipe
    text = f"train loss {first['train_loss']:.3f} to {last['train_loss']:.3f}"
    if last["train_loss"] >= first["train_loss"]:
        raise RuntimeError(f"the loss did not fall: {text}")
    return f"{text}, EMA top-1 {last['ema_top1']:.1f} %"


def run(folder: Path, deadline: float) -> None:
    call_there = functools.partial(call, folder=folder, deadline=deadline, cwd=folder)
    program = [sys.executable, ROOT / "ftclip.py"]
    demo = [*program, "--demo", "--epochs", 6 if GPU else 3]  # its images are in runs/demo/data
    for amp in ("bf16", "fp16") if GPU else ("none",):  # most CPUs are slow with the others
        command = [*demo, "--amp", amp, "--save-minutes", 0, "--output", amp]
        call_there(command, kill_at="\nstep 121 ")  # in epoch 3, after the save of step 101
        output = call_there(command)
        step = int(re.search(r"from step (\d+)", output)[1])
        tell(f"run, amp {amp}, SIGKILL at step 121, resumed from step", step)
        if step < 101:
            raise RuntimeError("it was not resumed from the last save")
        tell(f"run, amp {amp}", learned(folder / amp))
    output = call_there([*program, "--eval", f"{amp}/best.pt", "--data", "runs/demo/data"])
    tell("run, --eval", output.strip().split(": ")[-1])


def draw_photos(root: Path, drawn: int, copies: int) -> int:
    """JPEGs of 500x375 pixels in four classes, each under several names. Returns the mean size."""
    rng = random.Random(0)
    noise = Image.effect_noise((1000, 750), 80).convert("RGB").filter(ImageFilter.GaussianBlur(1))
    sizes = []
    for i in range(drawn):
        left, top = rng.randrange(500), rng.randrange(375)
        image = noise.crop((left, top, left + 500, top + 375))
        box = (left % 300, top % 200, left % 300 + 150, top % 200 + 120)
        ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.choices(range(256), k=3)))
        for split, names in (("train", copies), ("val", 1)):
            (root / split / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
            path = root / split / f"class{i % 4}" / f"{i}.jpg"
            image.save(path, quality=95)
            for copy in range(1, names):
                os.link(path, path.with_name(f"{i}-{copy}.jpg"))
        sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


def feed(folder: Path, deadline: float) -> None:
    size = draw_photos(folder / "photos", drawn=256 if GPU else 16, copies=160 if GPU else 40)
    tell("feed, mean size of a JPEG, kB", round(size / 1000))
    flags = ["--pretrained", "none", "--data", folder / "photos", "--epochs", 1]
    flags += ["--warmup-epochs", 0, "--output", folder / "feed"]
    if GPU:
        flags += ["--batch-size", 256]  # 160 steps of ViT-B/16
    else:
        tiny = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 2}
        (folder / "tiny.json").write_text(json.dumps({"vision_cfg": tiny}))
        flags += ["--model", folder / "tiny.json", "--batch-size", 8]
    output = call([sys.executable, "ftclip.py", *flags], folder, deadline)
    speeds = re.findall(r"^step .*  ([\d,]+) images/s", output, re.MULTILINE)
    speeds = [int(speed.replace(",", "")) for speed in speeds[1:]]  # the first: start of workers
    tell("feed, loader workers", ftclip.Options().workers)
    tell("feed, images/s", statistics.median(speeds))


def torchrun(folder: Path, deadline: float) -> None:
    launcher = [Path(sys.executable).with_name("torchrun")]
    if not launcher[0].exists():
        launcher = [sys.executable, "-m", "torch.distributed.run"]
    command = [*launcher, "--standalone", "--nproc_per_node", 1, ROOT / "ftclip.py"]
    command += ["--demo", "--output", folder / "torchrun", "--epochs", 2]
    output = call(command, folder, deadline, cwd=folder)
    tell("torchrun", learned(folder / "torchrun"))
    nccl = re.search(r"NCCL version \S+", output)
    tell("torchrun, backend", nccl[0] if nccl else "NCCL has not said its version")


def weights(folder: Path, deadline: float) -> None:
    call_self("weights", folder, deadline)


def difference(trunk: nn.Module, tower: nn.Module, images: Tensor) -> float:
    """The largest of all tokens of ftclip's trunk and open_clip's tower, over the largest token."""
    tower.pool_type = "none"  # all tokens, without the last norm and the projection
    tower.ln_post = nn.Identity()
    tower.proj = None
    with torch.no_grad():
        ours = trunk(images)
        theirs = tower(images)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def measure_weights() -> None:
    network = True
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        network = False
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: no tries for half a minute
    import open_clip

    try:
        model = ftclip.build_model("ViT-B-16", 2, "openai").eval()
    except ftclip.UserError:
        if network:
            raise
        tell_parent("weights", "no network, and not in the cache: not checked")
        return
    clip = open_clip.create_model("ViT-B-16", pretrained="openai", force_quick_gelu=True).eval()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as photos:
        draw_photos(Path(photos), drawn=4, copies=1)
        paths = sorted(Path(photos).glob("val/*/*"))
        images = [ftclip.eval_transform(ftclip.read_image(path), 224) for path in paths]
    largest = difference(model.trunk, clip.visual, torch.stack(images))
    tell_parent("weights, largest difference / largest token", f"{largest:.1e}")
    if largest > 1e-3:
        raise RuntimeError("ftclip computes something else than open_clip with OpenAI's weights")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(LIMITS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after each part")
    parser.add_argument("--small", action="store_true", help="use no GPU; the default without one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = {part.__name__: part for part in (tests, step, run, feed, torchrun, weights)}
    chosen = args.parts.split(",")
    if not set(chosen) <= set(parts):
        parser.error(f"--parts {args.parts}: the parts are {', '.join(parts)}")
    if args.measure:
        globals()[f"measure_{args.measure}"]()
        return 0

    print(torch.cuda.get_device_name() if GPU else "No GPU: everything in small on the CPU")
    tell("torch", torch.__version__)
    tell("CPU cores", os.cpu_count())
    deadline = time.monotonic()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for name in chosen:
            began = time.monotonic()
            deadline += LIMITS[name]
            try:
                parts[name](Path(folder), deadline)
            except Exception as error:  # noqa: BLE001, whatever it is, the next part begins
                failed += 1
                tell(f"{name} FAILED", f"{type(error).__name__}: {error}")
            tell(f"{name}, s", round(time.monotonic() - began))
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
