"""What ftclip promises. Each promise is compared with a reference: timm, open_clip, torch or a log.

python -m pytest test_ftclip.py
"""

import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

# Set before torch is imported: all instructions but AMX. Some sandboxes announce AMX and then kill
# the process that uses it (for bf16).
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm.data
import timm.loss
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import ftclip

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "ftclip.py"
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3}
WHOLE_VISION = VISION | {"mlp_ratio": 4.0, "no_ln_pre": False}
TINY = {"vision_cfg": VISION}
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
CLASSES = ["ant", "honey bée", "wasp"]
CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
inspect.getsource = functools.cache(inspect.getsource)  # called twice by each of 200 runs
torch.set_num_threads(1)  # faster for tiny models, and the second core is for the second process
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ------------------------------------------------------------------------------------ helpers


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A Pillow image with the statistics of a photograph: light and colour at all scales, grain."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, height, width, generator=generator) / 20
    for cells in (2, 4, 9, 20, 45):
        light = torch.randn(1, 1, cells, cells, generator=generator)
        colour = torch.randn(1, 3, cells, cells, generator=generator) / 2
        layer = (light + colour) / cells**0.7
        image += F.interpolate(layer, size=(height, width), mode="bicubic")[0]
    low = image.amin((1, 2), keepdim=True)
    high = image.amax((1, 2), keepdim=True)
    gamma = torch.tensor([0.7, 1.0, 1.4]).view(3, 1, 1)  # warm light
    image = ((image - low) / (high - low)) ** gamma
    return v2.functional.to_pil_image((image * 255).round().byte())


def tensor(image: Image.Image) -> Tensor:
    """uint8 (3, H, W) of a Pillow image."""
    return v2.functional.pil_to_tensor(image)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """3 classes, 48 training and 13 validation images of odd sizes."""
    root = tmp_path_factory.mktemp("data") / "images"
    for split, count in (("train", 48), ("val", 13)):
        for i in range(count):
            path = root / split / CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(40 + i % 7, 36 + i % 5, seed=1000 * count + i).save(path)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A model configuration file."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def flags(tiny, data, output, *more) -> list[str]:
    """Flags of a run of 3 epochs of 3 steps with everything random switched on."""
    text = f"--model {tiny} --pretrained none --data {data} --output {output} --epochs 3"
    text += " --warmup-epochs 1 --batch-size 16 --micro-batch-size 4 --lr 1e-3 --workers 0"
    text += " --device cpu --drop-path 0.2 --mixup 0.5 --cutmix 0.5"
    return shlex.split(text) + [str(flag) for flag in more]


def run_status(argv: list[str], monkeypatch) -> int:
    """Exit status of the program with these flags."""
    monkeypatch.setattr(sys, "argv", ["ftclip.py", *argv])
    return ftclip.cli()


def start(argv: list[str], log: Path, **environment: str) -> int:
    """Start the program in a process group of its own. Returns the id of the process.

    The process is forked, because the import of torch takes seconds. It inherits what a test has
    monkeypatched.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    os.setsid()
    signal.alarm(60)  # ends it if it hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    os.environ.update(environment)
    sys.argv = ["ftclip.py", *argv]
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            status = ftclip.cli()
        finally:
            if status == 1:
                traceback.print_exc()
            file.flush()
            os._exit(status)


def status_of(pid: int) -> int:
    """Exit status of a process that `start` started, minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def start_two(argvs: list[list[str]], logs: list[Path]) -> list[int]:
    """Start two processes of one run, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    place["MASTER_PORT"] = port
    return [
        start(argv, log, RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank, (argv, log) in enumerate(zip(argvs, logs))
    ]


def run_two(argv: list[str], folder: Path) -> str:
    """Run two processes to the end. Returns what rank 0 printed."""
    folder.mkdir(exist_ok=True)
    logs = [folder / "rank0.log", folder / "rank1.log"]
    pids = start_two([argv, argv], logs)
    statuses = [status_of(pid) for pid in pids]
    assert statuses == [0, 0], [log.read_text() for log in logs]
    return logs[0].read_text()


@contextlib.contextmanager
def stopped_after(steps: int):
    """Ctrl-C instead of the next training step after so many."""
    stop = [ftclip.train_step] * steps + [mock.Mock(side_effect=KeyboardInterrupt)]
    steps = mock.patch.object(ftclip, "train_step", lambda *args: stop.pop(0)(*args))
    with steps, pytest.raises(KeyboardInterrupt):
        yield


def same(a, b) -> bool:
    """Whether two nested values are equal to the last bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metrics(output: Path) -> list[dict]:
    """The records of the epochs."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def outcome(output: Path) -> dict:
    """Everything that a run leaves behind, to be compared with another run's."""
    last = ftclip.load_checkpoint(output / "last.pt")
    best = ftclip.load_checkpoint(output / "best.pt")
    return {"last": last, "best": best, "metrics": metrics(output)}


def difference(output: Path, other: Path) -> float:
    """The largest difference between two runs' last weights, raw and EMA."""
    one = ftclip.load_checkpoint(output / "last.pt")
    two = ftclip.load_checkpoint(other / "last.pt")
    largest = 0.0
    for kind in ("model", "ema"):
        assert one[kind].keys() == two[kind].keys()
        for name, weight in one[kind].items():
            largest = max(largest, (weight - two[kind][name]).abs().max().item())
    return largest


def losses(output: Path) -> list[float]:
    return [record["train_loss"] for record in metrics(output)]


def assert_fits(observed, expected: dict) -> None:
    """Chi-square test: cells come as often as expected ({cell: probability}), within 5 deviations."""
    counts = collections.Counter(observed)
    assert counts.keys() <= expected.keys()
    total = counts.total()
    degrees = len(expected) - 1
    chi2 = 0.0
    for cell, share in expected.items():
        chi2 += (counts[cell] - total * share) ** 2 / (total * share)
    assert abs(chi2 - degrees) < 5 * math.sqrt(2 * degrees)  # too good a fit is no chance either


def same_picture(ours: Tensor, theirs: Tensor) -> bool:
    """Whether grey values (0 to 255) agree within 1, and of 1,000 values at most one within 2.

    Both resize along one side, round, resize along the other side, and round: in different
    precision, and since Pillow 13 (for some sizes) in the other order. That makes 1, and in a few
    of a million values 2.
    """
    distance = (ours.double() - theirs).abs()
    return bool(distance.max() < 2.01 and (distance > 1.01).double().mean() < 1e-3)


# ------------------------------------------------------------------------------------ recipes


# What the four logs published at github.com/LightDXY/FT-CLIP print: trainable parameters, steps
# per epoch, warm-up steps, and for some epochs (from 0) the mean lr of the head and the embeddings.
PUBLISHED = {
    ("ViT-B-16", 224): (85_978_600, 625, 6250, [
        (0, 2.99567930868939e-05, 3.912565082085452e-08),
        (9, 0.000570043206913106, 7.445159901391449e-07),
        (10, 0.0005996929220710539, 7.832405758730968e-07),
        (25, 0.00040415306767059887, 5.27851955247343e-07),
        (49, 1.3085551426214094e-06, 1.7090638320841446e-09),
    ]),
    ("ViT-B-16", 384): (86_860_264, 625, 6250, [
        (0, 3.494959193470958e-05, 4.564659262433039e-08),
        (9, 0.0006650504080652901, 8.686019884956696e-07),
        (16, 0.0006553697120600687, 8.559583276570587e-07),
        (32, 0.00028235498817483386, 3.687752104442794e-07),
    ]),
    ("ViT-L-14", 224): (303_602_664, 625, 3125, [
        (0, 3.994878361075545e-05, 8.401125572701762e-10),
        (4, 0.0003600512163892446, 7.571783689242742e-09),
        (5, 0.0003994766092864718, 8.400889475566443e-09),
        (29, 1.525907700868909e-06, 3.2089443153660855e-11),
    ]),
    ("ViT-L-14", 336): (304_532_456, 667, 3335, [
        (0, 5.992801439712062e-05, 1.2602705984202765e-09),
        (5, 0.0005992141392068403, 1.2601317921128706e-08),
        (15, 0.000374960931818298, 7.885331137378312e-09),
        (29, 1.7894014932455233e-06, 3.763064926134158e-11),
    ]),
}  # fmt: skip
LAYERS = {"ViT-B-16": 12, "ViT-L-14": 24}


def paper(key: tuple) -> tuple[ftclip.Recipe, int]:
    """The paper's recipe of a model and an image size, and its micro-batch."""
    return next(row for row in ftclip.RECIPES if (row[0].model, row[0].image_size) == key)


@pytest.mark.parametrize(("model", "size"), PUBLISHED)
def test_dry_run_prints_the_published_runs(model, size, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ftclip.main(["--model", model, "--image-size", str(size), "--dry-run"])
    text = re.sub(" +", " ", capsys.readouterr().out)
    parameters, steps, warmup, _ = PUBLISHED[model, size]
    recipe, micro = paper((model, size))
    batch = recipe.batch_size
    assert f"{model} at {size} pixels\nBatch" in text  # nothing differs from the recipe
    assert f"{parameters:,} parameters are trained" in text
    chain = f"{batch} images per step = 1 device(s) x {micro} image(s) x {batch // micro} micro"
    assert chain in text
    total = f"{recipe.epochs} epochs x {steps} steps = {steps * recipe.epochs:,} steps"
    assert f"{total}, {warmup:,} of them warm-up" in text and "EMA: over about 5,000 steps" in text
    printed = dict(re.findall(r"^ layer (\d+) peak lr (\S+)", text, re.MULTILINE))
    layers = LAYERS[model]
    assert [int(layer) for layer in printed] == list(range(layers + 1, -1, -1))
    for layer, lr in printed.items():
        scale = recipe.layer_decay ** (layers + 1 - int(layer))
        assert float(lr) == pytest.approx(recipe.lr * scale, rel=6e-3)  # three digits
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", PUBLISHED)
def test_eight_devices_train_the_published_runs_with_the_published_mean_lrs(key):
    _, steps, warmup, epochs = PUBLISHED[key]
    nearest, _ = paper(key)
    recipe = ftclip.resolve(nearest, {}, devices=8)
    assert recipe == nearest
    assert (recipe.steps_per_epoch, recipe.warmup_steps) == (steps, warmup)
    assert recipe.total_steps == recipe.epochs * steps
    schedule = (recipe.total_steps, recipe.warmup_steps, recipe.lr, recipe.min_lr)
    embeddings = recipe.layer_decay ** (LAYERS[key[0]] + 1)
    for epoch, head_lr, embeddings_lr in epochs:
        first = epoch * steps
        lrs = [ftclip.lr_at(step, *schedule) for step in range(first, first + steps)]
        mean = sum(lrs) / steps
        assert mean == pytest.approx(head_lr, rel=1e-13)
        assert mean * embeddings == pytest.approx(embeddings_lr, rel=1e-13)


def of(num_images: int = 1_281_167, devices: int = 1, **given) -> ftclip.Recipe:
    return ftclip.resolve(ftclip.B16, given | {"num_images": num_images}, devices)


def test_what_is_not_given_follows_from_what_is():
    half = of(batch_size=512)
    assert (half.lr, half.min_lr) == pytest.approx((6e-4 / 2, 1e-6))
    assert of(batch_size=512, lr=6e-4).lr == of(batch_size=4096).lr == 6e-4
    probe = of(train_blocks=0)
    assert (probe.lr, of(train_blocks=0, lr=1e-3).lr) == (32 * 6e-4, 1e-3)
    assert of(1437, train_blocks=0).lr == 32 * 3e-4
    assert of(epochs=25).warmup_epochs == 5
    assert of(epochs=25, warmup_epochs=1).warmup_epochs == 1
    one = of(9, batch_size=8, epochs=1, warmup_epochs=0.9)
    assert (one.total_steps, one.warmup_steps) == (1, 0)  # else its only step would have lr 0
    # With few images, the batch leaves 32 steps per epoch or has 32 images, at half the lr.
    batches = {65536: 2048, 65535: 1024, 2048: 64, 2047: 32, 40: 32, 5: 5}
    for num_images, batch_size in batches.items():
        recipe = of(num_images)
        assert (recipe.batch_size, recipe.lr) == (batch_size, 6e-4 if batch_size == 2048 else 3e-4)
    assert of(1437, batch_size=8).lr == pytest.approx(3e-4 / 2)  # the default batch has 32
    assert [of(n).epochs for n in (5, 100, 320, 1437)] == [500, 167, 50, 50]  # 500 steps
    # The EMA's memory is the same share of the run as the recipe's 5,000 of 31,250 steps.
    assert 1 / (1 - of(1437).ema_decay) == pytest.approx(5000 / 31250 * 50 * 44)
    assert of(9, epochs=1, warmup_epochs=0).ema_decay == 0  # a run of one step
    assert of(1437, ema_decay=0.9).ema_decay == 0.9
    assert [of(devices=n).batch_size for n in (1, 2, 3, 4, 6, 8, 16)] == [
        2048,
        2048,
        2040,
        2048,
        2016,
        2048,
        2048,
    ]
    assert [of(40, devices=n).batch_size for n in (3, 5, 8)] == [24, 30, 32]
    assert (of(40, devices=3).lr, of(devices=6).lr) == (3e-4, 6e-4)
    assert of().freeze_patch_embed and not of(pretrained="none").freeze_patch_embed
    bad = [
        {"batch_size": 6},
        {"batch_size": 100},
        {"num_images": 3},
        {"warmup_epochs": 5.0, "epochs": 5},
    ]
    for wrong in bad:
        with pytest.raises(ftclip.UserError):
            of(**{"num_images": 99, "devices": 4} | wrong)


@pytest.mark.parametrize(("more", "chain"), [
    ("", "2048 images per step = 1 device(s) x 256 image(s) x 8 micro-batch(es)"),
    ("--image-size 320", "2048 images per step = 1 device(s) x 64 image(s) x 32 micro-batch(es)"),
    ("--micro-batch-size 100", "2048 images per step = 1 device(s) x 64 image(s) x 32"),
    ("--batch-size 480 --micro-batch-size 128", "480 images per step = 1 device(s) x 120 image(s) x 4"),
    ("--data {data}", "32 images per step = 1 device(s) x 32 image(s) x 1"),
    ("--data {data} --micro-batch-size 256", "32 images per step = 1 device(s) x 32 image(s) x 1"),
    ("--data {data} --micro-batch-size 24", "32 images per step = 1 device(s) x 16 image(s) x 2"),
])  # fmt: skip
def test_the_batch_does_not_depend_on_the_micro_batch(more, chain, data, capsys):
    ftclip.main(["--dry-run", *shlex.split(more.format(data=data))])
    assert chain in capsys.readouterr().out


# ------------------------------------------------------------------------------------ model


def reference_logits(model: ftclip.CLIPClassifier, images: Tensor, heads: int) -> Tensor:
    """The whole forward pass in float64 tensor algebra, from the weights alone."""
    w = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    kernel = w["trunk.conv1.weight"]
    width, _, patch, _ = kernel.shape
    patches = images.double().unfold(2, patch, patch).unfold(3, patch, patch)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (N, g*g, 3*p*p)
    x = patches @ kernel.flatten(1).T
    x = torch.cat([w["trunk.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + w["trunk.positional_embedding"], "trunk.ln_pre")
    for i in range(len(model.trunk.transformer.resblocks)):
        name = f"trunk.transformer.resblocks.{i}"
        qkv = norm(x, f"{name}.ln_1") @ w[f"{name}.attn.in_proj_weight"].T
        qkv = qkv + w[f"{name}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(width / heads)).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
        h = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = h / (1 + (-1.702 * h).exp())  # QuickGELU
        x = x + linear(h, f"{name}.mlp.c_proj")
    return linear(norm(x[:, 1:], "norm").mean(1), "head")


def random_model(**arguments) -> ftclip.CLIPClassifier:
    """A tiny model in which no parameter is zero, one or negligible: each has a part in the output."""
    model = ftclip.build_model(TINY, 5, quick_gelu=True, **arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_pass_equals_plain_tensor_algebra(mode):
    torch.manual_seed(0)
    model = random_model().train(mode == "train")
    images = torch.randn(3, 3, 32, 32)
    expected = reference_logits(model, images, heads=2)
    torch.testing.assert_close(model(images).double(), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.float32  # bf16 logits would tie


def open_clip_tower(vision: dict, quick_gelu: bool = False) -> nn.Module:
    """open_clip's own image tower, made to return all tokens."""
    tower = open_clip.CLIP(8, vision, NO_TEXT, quick_gelu=quick_gelu).visual
    tower.pool_type = "none"
    tower.ln_post = nn.Identity()
    tower.proj = None
    return tower


def shapes(module: nn.Module) -> dict:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def test_every_plain_vit_of_open_clip_has_the_same_names_and_shapes():
    accepted = {}
    refused = {}
    for name in open_clip.list_models():
        try:
            accepted[name] = ftclip.model_config(name)["vision_cfg"]
        except ftclip.UserError as error:
            refused[name] = str(error)
    assert {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-B-32-quickgelu"} <= accepted.keys()
    assert len(accepted) > 45 and len(refused) > 45  # 46 in open_clip 3.0, 53 in 3.3
    for name, sentence in refused.items():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        # Each has a part that is not a plain ViT's.
        parts = {"timm_model_name", "attentional_pool", "attn_pooler_heads", "block_type"}
        parts |= {"patch_dropout", "ls_init_value"}
        assert parts & vision.keys() or isinstance(vision.get("layers"), list), name
        assert f"{name} is no plain ViT" in sentence
    compared = []
    for name, vision in accepted.items():
        theirs = open_clip.get_model_config(name)["vision_cfg"]
        if theirs in compared:  # many models differ in their text tower alone
            continue
        compared.append(theirs)
        with torch.device("meta"):
            ours = shapes(ftclip.VisionTransformer(**vision, quick_gelu=False))
            assert ours == shapes(open_clip_tower(theirs)), name


def randomize(module: nn.Module) -> None:
    """Random parameters that keep activations of any width near 1."""
    for parameter in module.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        nn.init.normal_(parameter, std=std)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Close in float32, whatever the scale of the values is."""
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_the_vision_transformer_computes_what_open_clips_does(name, quick_gelu):
    torch.manual_seed(0)
    vision = ftclip.model_config(name)["vision_cfg"]
    vision |= {"layers": 2, "image_size": 4 * vision["patch_size"]}
    ours = ftclip.VisionTransformer(**vision, quick_gelu=quick_gelu)
    theirs_vision = open_clip.get_model_config(name)["vision_cfg"]
    theirs_vision |= {"layers": 2, "image_size": vision["image_size"]}
    theirs = open_clip_tower(theirs_vision, quick_gelu)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, vision["image_size"], vision["image_size"])
    direction = torch.randn(2, 17, vision["width"])
    tokens = [tower(images) for tower in (ours, theirs)]
    assert_close(*tokens)
    for output in tokens:
        (output * direction).sum().backward()
    gradients = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[parameter_name].grad)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = random_model(drop_path=0.5).train()
    images = torch.randn(8, 3, 32, 32)
    gradients = []
    for on in (False, True):
        model.trunk.grad_checkpointing = on
        model.zero_grad()
        torch.manual_seed(1)  # of drop path
        with mock.patch.object(ftclip, "checkpoint", side_effect=ftclip.checkpoint) as spy:
            model(images).square().sum().backward()
        assert spy.call_count == (3 if on else 0)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert same(*gradients)


def test_the_residual_stream_is_float32_and_bf16_is_better_than_open_clips():
    torch.manual_seed(0)
    theirs = open_clip_tower(VISION | {"layers": 8}, quick_gelu=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = ftclip.VisionTransformer(**WHOLE_VISION | {"layers": 8}, quick_gelu=True)
    ours.load_state_dict(theirs.state_dict())
    dtypes = []
    for block in ours.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    images = torch.randn(8, 3, 32, 32)
    errors = []
    with torch.no_grad():
        for tower in (ours, theirs):
            exact = tower(images)
            dtypes.clear()
            with torch.autocast("cpu", torch.bfloat16):
                tokens = tower(images).float()
            errors.append(((tokens - exact).norm() / exact.norm()).item())
            assert tower is theirs or dtypes == [torch.float32] * 8
    assert 0 < errors[0] < 0.8 * errors[1]


def test_head_starts_near_zero():
    torch.manual_seed(0)
    model = ftclip.build_model(TINY, 1000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert 0 < model.head.bias.abs().max() <= 1e-3 / math.sqrt(64)
    assert model.norm.eps == 1e-5


@pytest.fixture(scope="session")
def clip_weights() -> dict:
    """State dict of a whole tiny CLIP, with the names of OpenAI and open_clip."""
    torch.manual_seed(1)
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    return open_clip.CLIP(8, VISION, text, quick_gelu=True).state_dict()


class Archive(nn.Module):
    """What torch.jit.save needs to write weights as OpenAI did: their names, half precision."""

    def __init__(self, weights: dict):
        super().__init__()
        self.register_buffer("input_resolution", torch.tensor(32))
        for name, value in weights.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, value.half())

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_every_form_of_weights_file_gives_the_same_features(clip_weights, tmp_path):
    half = {name: value.half().contiguous() for name, value in clip_weights.items()}
    tower = {n[7:]: value for n, value in half.items() if n.startswith("visual.")}
    nested = {f"_orig_mod.module.{name}": value for name, value in half.items()}
    wrapped = {f"module.{name}": value for name, value in half.items()}
    torch.save(half, tmp_path / "plain.pt")
    torch.save(tower, tmp_path / "tower.pt")
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "ddp.pt")
    arguments = argparse.Namespace(lr=1e-3, model="vit")
    torch.save({"model": wrapped, "args": arguments, "optimizer": {}}, tmp_path / "mae.pt")
    torch.save({"model_ema": nested}, tmp_path / "nested.pt")
    safetensors.torch.save_file(half, tmp_path / "file.safetensors")
    torch.jit.save(torch.jit.script(Archive(clip_weights)), tmp_path / "openai.pt")
    images = torch.randn(2, 3, 32, 32)
    theirs = open_clip_tower(VISION, quick_gelu=True).eval()
    theirs.load_state_dict(
        {n: v.float() for n, v in tower.items() if not n.startswith(("ln_post", "proj"))}
    )
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 7
    for path in paths:
        quick_gelu = None if path.name == "openai.pt" else True  # OpenAI's archive says it itself
        model = ftclip.build_model(TINY, 5, pretrained=str(path), quick_gelu=quick_gelu).eval()
        assert model.config["quick_gelu"]
        assert same(dict(model.trunk.state_dict()), dict(theirs.state_dict())), path
        torch.testing.assert_close(model.trunk(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_best_pt_is_a_weights_file_that_says_its_activation(quick_gelu, tmp_path):
    torch.manual_seed(0)
    first = ftclip.build_model(TINY, 5, quick_gelu=quick_gelu).eval()
    state = {"ema": first.state_dict(), "model_config": first.config, "classes": list("abcde")}
    ftclip.save_checkpoint(tmp_path / "best.pt", state)
    other = TINY | {"quick_gelu": not quick_gelu}  # the file knows better
    second = ftclip.build_model(other, 3, pretrained=str(tmp_path / "best.pt")).eval()
    images = torch.randn(2, 3, 32, 32)
    assert second.config == first.config
    assert torch.equal(second.trunk(images), first.trunk(images))


def test_openai_tag_goes_through_the_hub_cache_with_quickgelu(tmp_path, monkeypatch):
    with torch.device("meta"):
        names = shapes(open_clip_tower(open_clip.get_model_config("ViT-B-32")["vision_cfg"]))
    weights = {f"visual.{n}": torch.full(shape, 0.5).half() for n, shape in names.items()}
    weights["visual.conv1.weight"].normal_()
    cache = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(weights, snapshot / "open_clip_model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = ftclip.build_model("ViT-B-32", 3, pretrained="openai")
    assert model.config["quick_gelu"]
    assert torch.equal(model.trunk.conv1.weight, weights["visual.conv1.weight"].float())
    assert shapes(model.trunk) == names


def test_the_activation_is_that_of_the_tag(clip_weights, tmp_path, monkeypatch):
    torch.save(clip_weights, tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(tmp_path / "clip.pt"))
    tags = [(name, "openai", True) for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")]
    tags += [("ViT-B-32-quickgelu", "laion400m_e32", True)]
    tags += [("ViT-B-32", "laion2b_s34b_b79k", False)]
    for name, tag, quick_gelu in tags:
        assert ftclip.read_weights(name, tag)[1] == quick_gelu
    for name in ("ViT-B-32-quickgelu", "ViT-B-32"):
        assert ftclip.model_config(name)["quick_gelu"] == ("quickgelu" in name)


def test_positions_are_resized_bicubic_without_antialias(clip_weights, tmp_path):
    torch.save(clip_weights, tmp_path / "clip.pt")
    old = clip_weights["visual.positional_embedding"]  # (17, 64)
    square = old[1:].reshape(4, 4, 64).permute(2, 0, 1)[None]
    for size, grid in ((48, 6), (24, 3)):  # antialias would differ in both directions
        model = ftclip.build_model(TINY, 5, str(tmp_path / "clip.pt"), size, quick_gelu=True)
        new = model.trunk.positional_embedding
        expected = F.interpolate(square, (grid, grid), mode="bicubic", antialias=False)
        torch.testing.assert_close(
            new[1:].reshape(grid, grid, 64), expected[0].permute(1, 2, 0), rtol=1e-6, atol=1e-7
        )
        assert torch.equal(new[0], old[0])
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)


def test_partial_fine_tuning_trains_the_last_blocks_norm_and_head():
    head = {"norm.weight", "norm.bias", "head.weight", "head.bias"}

    def trained(**arguments) -> set[str]:
        model = ftclip.build_model(TINY, 5, **arguments)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained(train_blocks=0) == head
    one = trained(train_blocks=1) - head
    assert len(one) == 12
    assert all(name.startswith("trunk.transformer.resblocks.2.") for name in one)
    everything = trained()
    assert len(everything) == 4 + 3 * 12 + 5
    assert trained(train_blocks=3) == everything
    assert everything - trained(freeze_patch_embed=True) == {"trunk.conv1.weight"}


def test_drop_path_drops_each_branch_of_a_sample_at_its_blocks_rate():
    torch.manual_seed(0)
    model = random_model(drop_path=0.5).train()
    for block, rate in zip(model.trunk.transformer.resblocks, (0, 0.25, 0.5)):
        branches = (block.mlp.c_proj, block.attn.out_proj)
        for on in branches:  # the output of one branch is constant, that of the other is 0
            for branch in branches:
                nn.init.zeros_(branch.weight)
                nn.init.constant_(branch.bias, float(branch is on))
            output = block.train()(torch.zeros(20_000, 1, 64))[:, 0]
            whole = block.eval()(torch.zeros(1, 1, 64))[0]
            kept = (output != 0).all(1)
            assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.02)
            assert torch.allclose(output[kept], whole / (1 - rate))
            assert not output[~kept].any()
    model = random_model(drop_path=0.5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))


def test_the_model_works_in_other_hands(tmp_path):
    torch.manual_seed(0)
    model = random_model().eval().requires_grad_(False)
    images = torch.randn(5, 3, 32, 32)
    expected = model(images)
    traced = torch.jit.trace(model, images[:2])  # then another batch size
    torch.testing.assert_close(traced(images), expected)
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=(batch,))
    torch.testing.assert_close(exported.module()(images), expected)
    if "x86" in torch.backends.quantized.supported_engines:
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert F.cosine_similarity(small(images), expected).min() > 0.9
    model.head = nn.Identity()
    assert model(images).shape == (5, 64)  # features


# ------------------------------------------------------------------------------------ optimization


@pytest.mark.parametrize(("name", "decay"), [("ViT-B-16", 0.6), ("ViT-L-14", 0.65)])
def test_every_parameter_is_in_one_group_with_its_scale_and_decay(name, decay):
    layers = LAYERS[name]
    with torch.device("meta"):
        model = ftclip.build_model(name, 1000, freeze_patch_embed=True)
    groups = ftclip.param_groups(model, layers, 2.0, decay, 0.05)
    group_of = {n: group for group in groups for n in group["names"]}
    assert sum(len(group["names"]) for group in groups) == len(group_of)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert group_of.keys() == trained.keys() and "trunk.conv1.weight" not in group_of
    for n, parameter in trained.items():
        group = group_of[n]
        assert any(member is parameter for member in group["params"])
        block = re.search(r"resblocks\.(\d+)\.", n)
        if block:
            layer = int(block[1]) + 1
        else:
            layer = 0 if n.startswith("trunk.") else layers + 1
        assert group["layer"] == layer
        assert group["lr_scale"] == decay ** (layers + 1 - layer)
        assert group["lr"] == 2 * group["lr_scale"]
        exempt = n.endswith(("class_embedding", "positional_embedding", "bias"))
        assert group["weight_decay"] == (0.0 if exempt or parameter.ndim == 1 else 0.05)


def test_a_step_of_adamw_moves_each_group_by_its_own_lr():
    model = random_model()
    groups = ftclip.param_groups(model, 3, 1e-3, 0.5, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # Adam's first step is lr in each coordinate
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter.detach()).abs().mean().item()
        layer = ftclip.layer_id(name, 3)
        assert moved == pytest.approx(1e-3 * 0.5 ** (4 - layer), rel=1e-3)


def test_a_layer_id_that_does_not_fit_the_model_is_refused():
    """The usual mistakes: a timm trunk that is unknown or all in layer 0, too many or too few layers."""
    block = nn.ModuleDict({"blocks": nn.Linear(2, 2)})
    model = nn.ModuleDict({"trunk": block, "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="trunk.blocks.weight"):
        ftclip.param_groups(model, 1, 1.0, 0.5, 0.05)
    for wrong, message in (
        (4, "layer_of finds the layers .* not each of 0 to 5"),
        (2, "resblocks.2.* of 2 bl"),
    ):
        with pytest.raises(ValueError, match=message):
            ftclip.param_groups(random_model(), wrong, 1.0, 0.5, 0.05)
    linears = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3))
    for layers in ((0, 0, 2), (0, 2, 2), (1, 2, 2), (0, 1, 3)):

        def layer_id(name: str, num_layers: int, layers=layers) -> int:
            return layers[int(name[0])]

        with pytest.raises(ValueError, match="layer_of finds"):
            ftclip.param_groups(linears, 1, 1.0, 0.5, 0.05, layer_id)


def test_a_timm_vit_gets_the_same_scales_and_no_decay_of_its_tokens():
    def layer_id(name: str, num_layers: int) -> int:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return num_layers + 1 if name.startswith(("norm.", "head.")) else 0

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, reg_tokens=2)
    groups = ftclip.param_groups(vit, 12, 1.0, 0.5, 0.05, layer_id)
    group_of = {name: group for group in groups for name in group["names"]}
    assert group_of.keys() == dict(vit.named_parameters()).keys()
    tokens = ("cls_token", "reg_token", "pos_embed")
    assert [group_of[name]["weight_decay"] for name in tokens] == [0, 0, 0]
    weight = group_of["blocks.3.attn.qkv.weight"]
    assert (weight["lr"], weight["weight_decay"]) == (0.5**9, 0.05)


def test_lr_stays_within_its_bounds():
    assert ftclip.lr_at(10, 10, 2, 1.0, 0.1) == pytest.approx(0.1)
    assert ftclip.lr_at(12, 10, 2, 1.0, 0.1) == pytest.approx(0.1)
    assert max(ftclip.lr_at(step, 10, 2, 1.0, 0.0) for step in range(10)) == 1.0
    short = [ftclip.lr_at(step, 3, 9, 0.8, 0.1) for step in range(5)]
    assert short == pytest.approx([0, 0.1, 0.2, 0.1, 0.1])
    assert ftclip.lr_at(0, 5, 1, 1.0, 0.0) == 0.0  # a warm-up of one step


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_an_ema_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="EMA decay"):
        ftclip.EMA(nn.Linear(1, 1), decay)


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_ema_equals_its_closed_form_and_with_decay_0_the_weights(decay):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = ftclip.EMA(model, decay)
    closed = model.weight.detach().double()
    for _ in range(40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model)
        closed = decay * closed + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(ema.module.weight.double(), closed, rtol=1e-5, atol=1e-5)
    assert torch.equal(ema.module.weight, model.weight) == (decay == 0)
    assert not ema.module.weight.requires_grad and not ema.module.training


# ------------------------------------------------------------------------------------ augmentation


def timm_train(size: int):
    """timm's training transform, as the official datasets.py:57-69 makes it."""
    return timm.data.create_transform(
        size,
        is_training=True,
        color_jitter=None,
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        **CLIP,
    )


def timm_randaugment():
    kind = timm.data.auto_augment.RandAugment
    (found,) = (step for step in timm_train(224).transforms if isinstance(step, kind))
    return found


def test_randaugment_defaults_are_timms():
    ours = ftclip.RandAugment()
    theirs = timm_randaugment()
    names = [op.name.removesuffix("Increasing").removesuffix("Rel") for op in theirs.ops]
    assert list(ours.OPS) == names
    assert ours.num_ops == theirs.num_layers
    assert theirs.choice_weights is None  # with replacement
    for op in theirs.ops:
        assert (op.magnitude, op.magnitude_std, op.prob) == (9, 0.5, 0.5)
        assert (ours.magnitude, ours.std, ours.probability) == (9, 0.5, 0.5)
        assert op.magnitude_max is None  # timm then clips at 10
        assert op.kwargs == {"fillcolor": ours.fill, "resample": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("index", range(15), ids=ftclip.RandAugment.OPS)
def test_randaugment_op_equals_timms_in_every_pixel(index, monkeypatch):
    name = ftclip.RandAugment.OPS[index]
    ours = ftclip.RandAugment()
    theirs = timm_randaugment().ops[index]
    theirs.prob = 1.0
    theirs.magnitude_std = 0.0
    magnitudes = {i / 10 for i in range(101)}
    jumps = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110}.get(name, 0)
    for i in range(jumps + 1):  # where int() jumps, and the numbers beside it
        here = 10 * i / max(jumps, 1)
        magnitudes |= {here, math.nextafter(here, 0), min(10.0, math.nextafter(here, 11))}
    bright = photo(61, 40)
    dull = photo(40, 61, seed=1).point(lambda value: 30 + value // 2)  # has contrast to add
    for sign in (-1, 1):
        signed = functools.partial(math.prod, start=sign)  # timm calls it with one value
        monkeypatch.setattr(
            timm.data.auto_augment, "_randomly_negate", lambda value, f=signed: f((value,))
        )
        for magnitude, image in itertools.product(magnitudes, (bright, dull)):
            theirs.magnitude = magnitude
            result = ours.apply(image, name, magnitude / 10, sign)
            if name == "Posterize" and magnitude == 10:
                # 0 bits are a black image. timm asks Pillow for it, but Pillow 13 raises an error.
                assert not np.asarray(result).any()
                assert (result.mode, result.size) == ("RGB", image.size)
            else:
                assert result == theirs(image), (magnitude, sign)


class Recorder(ftclip.RandAugment):
    """RandAugment whose "image" is the tuple of the operations that were applied to it."""

    def apply(self, image, op, strength, sign):
        return (*image, (op, 10 * strength, sign))


def test_randaugment_draws_ops_magnitudes_and_signs_as_specified():
    random.seed(0)
    ops = ftclip.RandAugment.OPS
    augment = Recorder()
    images = [augment(()) for _ in range(60_000)]
    assert_fits(map(len, images), {0: 0.25, 1: 0.5, 2: 0.25})

    # Ten equally likely parts of N(9, 0.5), the last one cut at 10. The cells together show that
    # operation, sign and magnitude are independent.
    normal = statistics.NormalDist(9, 0.5)
    edges = [*(normal.inv_cdf(i / 10) for i in range(1, 10)), 10]
    shares = np.diff([0, *map(normal.cdf, edges), 1])
    cells = {}
    for op, sign in itertools.product(ops, (-1, 1)):
        for i, share in enumerate(shares):
            cells[op, sign, i] = share / 30
    observed = []
    for op, magnitude, sign in itertools.chain(*images):
        assert 0 <= magnitude <= 10
        observed.append((op, sign, sum(magnitude >= edge for edge in edges)))
    assert_fits(observed, cells)

    # Two on one image are independent in operation (so it can come twice), magnitude and sign.
    pairs = [image for image in images if len(image) == 2]
    both = {pair: 1 / 225 for pair in itertools.product(ops, ops)}
    assert_fits([(a[0], b[0]) for a, b in pairs], both)
    corners = {cell: 1 / 16 for cell in itertools.product((False, True), (-1, 1), repeat=2)}
    assert_fits([(a[1] > 9, a[2], b[1] > 9, b[2]) for a, b in pairs], corners)

    weak = Recorder(magnitude=0.1)
    drawn = itertools.chain(*(weak(()) for _ in range(1000)))
    assert min(magnitude for _, magnitude, _ in drawn) == 0  # clipped below as well


@pytest.mark.parametrize("height, width", [(64, 64), (40, 90), (200, 4)])  # the last one may fail
def test_random_erasing_draws_timms_boxes(height, width):
    # Both take the same numbers in the same order, so that boxes can be compared one by one.
    theirs = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    for seed in range(3000):
        random.seed(seed)
        expected = theirs(torch.zeros(1, height, width)) != 0
        random.seed(seed)
        ours = ftclip.random_erasing(torch.zeros(1, 1, height, width), 0.25)
        assert torch.equal(ours[0] != 0, expected), seed


def test_random_erasing_fills_boxes_with_independent_normal_noise():
    torch.manual_seed(0)
    random.seed(0)
    images = torch.full((400, 3, 48, 40), 7.0)
    assert ftclip.random_erasing(images, 0.25) is images  # in place
    noise = []
    neighbours = []
    channels = []
    for image in images:
        changed = (image != 7).any(0)
        if changed.any():
            rows = changed.any(1).nonzero()
            columns = changed.any(0).nonzero()
            box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box != 7).all()  # one whole box, in all channels
            noise.append(box.flatten())
            neighbours.append((box[..., 1:] * box[..., :-1]).flatten())
            neighbours.append((box[:, 1:] * box[:, :-1]).flatten())
            channels.append((box * box.roll(1, 0)).flatten())
    assert abs(len(noise) / 400 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)
    tenths = torch.tensor([statistics.NormalDist().inv_cdf(i / 10) for i in range(1, 10)])
    cells = torch.bucketize(torch.cat(noise), tenths).tolist()
    assert_fits(cells, dict.fromkeys(range(10), 0.1))
    for products in (neighbours, channels):  # of independent values: mean 0, variance 1
        products = torch.cat(products)
        assert abs(products.mean()) < 5 / math.sqrt(len(products))


@contextlib.contextmanager
def recorded_crops():
    """Yields a list to which each random crop adds its box: top, left, height, width."""
    boxes = []
    original = v2.RandomResizedCrop.transform

    def recording(self, image, params):
        boxes.append(tuple(params[key] for key in ("top", "left", "height", "width")))
        return original(self, image, params)

    with mock.patch.object(v2.RandomResizedCrop, "transform", recording):
        yield boxes


def assert_same_distribution(ours: list[tuple], theirs: list[tuple], size: tuple) -> None:
    """Chi-square test of two samples of boxes, in cells of area, shape and place."""
    width, height = size

    def cell(box: tuple) -> tuple:
        top, left, h, w = box
        area = min(4, int(5 * h * w / (height * width)))
        shape = sum(w / h > edge for edge in (0.751, 0.87, 1.15, 1.332))
        low = 2 * top > height - h
        right = 2 * left > width - w
        return area, shape, low, right

    observed = [collections.Counter(map(cell, boxes)) for boxes in (ours, theirs)]
    common = [
        (observed[0][key], observed[1][key])
        for key in observed[0] | observed[1]
        if observed[0][key] + observed[1][key] >= 10
    ]
    assert sum(map(sum, common)) > 0.95 * 2 * len(ours)
    chi2 = sum((a - b) ** 2 / (a + b) for a, b in common)  # for samples of one size
    degrees = len(common)
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("image_size", [224, 63])
@pytest.mark.parametrize(
    "size", [(300, 225), (225, 301), (224, 224), (63, 64), (40, 50), (500, 71)]
)
def test_eval_image_is_timms(size, image_size):
    theirs = timm.data.create_transform(image_size, crop_pct=1.0, interpolation="bicubic", **CLIP)
    image = photo(*size)
    grey = 1 / 255 / torch.tensor(CLIP["std"]).view(3, 1, 1)  # one grey value, normalized
    for given in (tensor(image), image, image.convert("L"), image.convert("P")):
        expected = theirs(given.convert("RGB") if isinstance(given, Image.Image) else image)
        ours = ftclip.eval_transform(given, image_size)
        assert ours.shape == (3, image_size, image_size) and ours.dtype == torch.float32
        assert same_picture(ours / grey, expected / grey)


@pytest.mark.parametrize("scale", [0.08, 0.5])
@pytest.mark.parametrize("size", [(120, 90), (90, 120), (24, 24), (200, 20), (15, 200)])
def test_train_crop_is_timms_and_mirrored_half_the_time(size, scale):
    # torchvision draws from torch, timm from `random`: boxes are compared in distribution, and
    # pictures one by one with Pillow's. In the two long images, ten tries for a box may fail.
    torch.manual_seed(0)
    random.seed(0)
    draws = 3000
    picture = photo(*size)
    image = tensor(picture)
    flips = 0
    with recorded_crops() as boxes:
        transform = ftclip.train_transform(48, scale)
        for _ in range(300):
            ours = transform(image)
            assert ours.dtype == torch.uint8 and ours.shape == (3, 48, 48)
            top, left, height, width = boxes[-1]
            crop = picture.crop((left, top, left + width, top + height))
            expected = tensor(crop.resize((48, 48), Image.Resampling.BICUBIC))
            flipped = same_picture(ours.flip(-1), expected)
            assert flipped != same_picture(ours, expected), boxes[-1]
            flips += flipped
        assert abs(flips / 300 - 0.5) < 5 * math.sqrt(0.25 / 300)
        crop, flip = transform.transforms
        while len(boxes) < draws:
            params = crop.make_params([image])
            boxes.append(tuple(params[key] for key in ("top", "left", "height", "width")))
    assert flip.p == 0.5
    theirs = RandomResizedCropAndInterpolation(48, (scale, 1), interpolation="bicubic")
    params = [theirs.get_params(picture, theirs.scale, theirs.ratio) for _ in range(draws)]
    assert_same_distribution(boxes, params, size)


def test_training_images_have_timms_statistics(monkeypatch):
    def posterize(image, bits, **_):  # timm's own crashes with Pillow 13 at 0 bits
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)

    monkeypatch.setitem(timm.data.auto_augment.NAME_TO_OP, "PosterizeIncreasing", posterize)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    draws = 10_000
    picture = photo(84, 60, seed=5)
    image = tensor(picture)

    def drawn(transform, image) -> Tensor:
        """The transform of many copies of an image, by two workers."""
        batches = DataLoader(
            [image] * draws,
            batch_size=500,
            num_workers=2,
            collate_fn=lambda copies: torch.stack([transform(copy) for copy in copies]),
        )
        return torch.cat(list(batches))

    def statistic(images: Tensor) -> Tensor:
        """(N, 21): light in each quarter, and mean, square and edges of each colour."""
        edges = images.diff(dim=-1).abs().mean((2, 3))
        quarters = F.adaptive_avg_pool2d(images, 2).flatten(1)
        colours = images.mean((2, 3))
        return torch.cat([quarters, colours, images.square().mean((2, 3)), edges], 1)

    transform = ftclip.train_transform(32, 0.08, ftclip.RandAugment())
    images = ftclip.normalize(drawn(transform, image))
    ours = statistic(ftclip.random_erasing(images, 0.25))
    timms = timm_train(32)
    theirs = statistic(drawn(timms, picture))
    for power in (1, 2):  # means, then spread between images
        x = ours**power
        y = theirs**power
        error = ((x.var(0) + y.var(0)) / draws).sqrt()
        assert ((x.mean(0) - y.mean(0)) / error).abs().max() < 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [None, v2.MixUp, v2.CutMix])
def test_train_step_minimizes_timms_loss(mix, smoothing):
    torch.manual_seed(0)
    num_classes = 7
    images = torch.randn(6, 3, 8, 8)
    labels = torch.tensor([3, 0, 6, 6, 2, 5])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    if mix is None:
        mixed, targets = images, labels
        expected = timm.loss.LabelSmoothingCrossEntropy(smoothing)(twin(images), labels)
    else:
        mixed, targets = mix(num_classes=num_classes)(images, labels)
        share = targets[0, labels[0]].item()  # of the image itself; the rest is the one before it
        assert 0 < share < 1
        partner = images.roll(1, 0)
        if mix is v2.MixUp:
            torch.testing.assert_close(mixed, share * images + (1 - share) * partner)
        else:
            assert ((mixed == images) | (mixed == partner)).all()
            assert (mixed == images).float().mean().item() == pytest.approx(share)
        # timm's partner is the image at the same place from the end.
        both = torch.cat([labels, labels.roll(1).flip(0)])
        soft = mixup_target(both, num_classes, share, smoothing)[: len(labels)]
        expected = timm.loss.SoftTargetCrossEntropy()(twin(mixed), soft)
    expected.backward()

    halves = zip(mixed.split(3), targets.split(3))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = ftclip.train_step(model, halves, 2, optimizer, scaler, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs - 0.5 * theirs.grad)


# ------------------------------------------------------------------------------------ data


def test_read_image_makes_rgb_of_every_kind_as_pillow_does(tmp_path, monkeypatch):
    picture = photo(50, 41)
    picture.save(tmp_path / "plain.jpg", quality=90)
    modes = {"l.jpg": "L", "cmyk.jpg": "CMYK", "p.png": "P", "rgba.png": "RGBA", "la.png": "LA"}
    for name, mode in modes.items():
        picture.convert(mode).save(tmp_path / name)
    for name in ("a.bmp", "a.tif", "a.webp", "a.ppm"):
        picture.save(tmp_path / name)
    picture.convert("1").save(tmp_path / "one.png")
    picture.resize((1, 1)).save(tmp_path / "pixel.png")
    picture.save(tmp_path / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    for path in tmp_path.iterdir():
        with Image.open(path) as file:
            expected = np.asarray(file.convert("RGB"))
        image = ftclip.read_image(path)
        assert image.dtype == torch.uint8, path
        distance = image.permute(1, 2, 0).numpy().astype(int) - expected
        assert np.abs(distance).max() <= 1, path
    deep = np.arange(41 * 50, dtype=np.uint16).reshape(41, 50) * 31
    for name in ("deep.png", "deep.tif"):  # 16 bits, of which the upper eight are kept
        Image.fromarray(deep).save(tmp_path / name)
        image = ftclip.read_image(tmp_path / name)
        opened = ftclip.eval_transform(Image.open(tmp_path / name), 20)
        assert torch.equal(opened, ftclip.eval_transform(image, 20))
        assert image.shape == (3, 41, 50) and np.array_equal(image[1].numpy(), deep >> 8)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ftclip.UserError, match="float.tif.*floats"):
        ftclip.read_image(tmp_path / "float.tif")
    # torchvision has announced that its decoder will be removed. Then Pillow reads JPEGs too.
    decoded = ftclip.read_image(tmp_path / "plain.jpg").int()
    monkeypatch.delattr(ftclip.torchvision.io, "decode_jpeg")
    assert (ftclip.read_image(tmp_path / "plain.jpg") - decoded).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "bit"])
def test_a_broken_image_is_named(damage, kind, tmp_path):
    path = tmp_path / "x.jpg"
    photo(200, 200).save(path, kind)
    whole = bytearray(path.read_bytes())
    half = whole[: len(whole) // 2]
    whole[len(whole) // 2 if kind == "PNG" else 0] ^= 16  # in a JPEG only the header shows it
    contents = {"empty": b"", "text": b"no image", "half": half, "bit": whole}
    path.write_bytes(contents[damage])
    with pytest.raises(ftclip.UserError, match="cannot read image .*x.jpg"):
        ftclip.read_image(path)


def test_whatever_a_decoder_raises_names_the_image(tmp_path):
    path = tmp_path / "blank.avif"
    photo(200, 200).save(path)
    head, mark, content = path.read_bytes().partition(b"mdat")
    path.write_bytes(head + mark + bytes(len(content)))  # a RuntimeError of Pillow's
    with pytest.raises(ftclip.UserError, match="cannot read image .*blank.avif"):
        ftclip.read_image(path)


def test_images_are_told_by_their_ending_and_hidden_ones_left_out(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    ants = tmp_path / "train" / "ant"
    (ants / "below").mkdir()
    photo(9, 9).save(ants / "below" / "more.GIF")
    (ants / "list.txt").write_text("no image")
    (ants / ".DS_Store").write_text("hidden, and no image")
    (ants / "._0.png").write_text("macOS writes such files")
    for hidden in (ants / ".ipynb_checkpoints", tmp_path / "train" / ".trash"):
        hidden.mkdir()
        photo(9, 9).save(hidden / "copy.png")
    dataset = ftclip.FolderDataset(tmp_path / "train")
    assert dataset.classes == CLASSES
    assert len(dataset) == 48 + 1
    assert [Path(path).name for path in dataset.left_out] == ["list.txt"]
    assert [Path(path).name for path, _ in dataset.samples].count("more.GIF") == 1


def test_val_may_lack_a_class_but_not_have_a_new_one(data, tmp_path):
    shutil.copytree(data / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / CLASSES[0])
    val = ftclip.FolderDataset(tmp_path / "val", classes=CLASSES)
    assert val.classes == CLASSES
    assert {label for _, label in val.samples} == {1, 2}  # labels are training's
    for path, label in val.samples:
        assert Path(path).parent.name == CLASSES[label]
    (tmp_path / "val" / "wasp").rename(tmp_path / "val" / "moth")
    with pytest.raises(ValueError, match="val has the class moth, which training does not have"):
        ftclip.FolderDataset(tmp_path / "val", classes=CLASSES)


def keys_of(world: int, micro: int, start: int = 0) -> list[tuple[int, int]]:
    """All keys of a run in the order of its steps, put together from its processes."""
    recipe = ftclip.Recipe(num_images=23, batch_size=8, epochs=3)
    ranks = [
        list(ftclip.micro_batch_keys(recipe, micro, start, rank, world)) for rank in range(world)
    ]
    return [key for turn in zip(*ranks, strict=True) for batch in turn for key in batch]


def test_sample_order_is_the_same_in_every_layout_and_from_every_restart():
    reference = keys_of(world=1, micro=8)
    assert [epoch for epoch, _ in reference] == [0] * 16 + [1] * 16 + [2] * 16
    first = [index for epoch, index in reference if epoch == 0]
    second = [index for epoch, index in reference if epoch == 1]
    assert len(set(first)) == 16 and set(first) <= set(range(23)) and first != second
    assert set(first) != set(second)  # the dropped ones are others
    for world, micro in ((1, 2), (2, 2), (2, 4), (4, 1)):
        assert keys_of(world, micro) == reference
    for restart in range(6):
        assert keys_of(2, 2, start=restart) == reference[8 * restart :]
    other = ftclip.Recipe(num_images=23, batch_size=8, epochs=3, seed=1)
    assert next(ftclip.micro_batch_keys(other, 8, 0)) != reference[:8]


def test_a_sample_depends_on_seed_epoch_and_index_alone(data):
    transform = ftclip.train_transform(32, 0.3, ftclip.RandAugment())

    def sample(key: tuple[int, int], seed: int = 0) -> tuple[Tensor, int]:
        random.seed()  # whatever the state of the process
        torch.seed()
        return ftclip.FolderDataset(data / "train", transform, seed)[key]

    numpy_state = np.random.get_state()
    pickled = pickle.dumps(ftclip.FolderDataset(data / "train", transform))  # for a spawned worker
    for index in (0, 7, 47):
        first = sample((2, index))
        assert same(first, sample((2, index)))
        assert same(first, pickle.loads(pickled)[2, index])
        assert not same(first[0], sample((3, index))[0])
        assert not same(first[0], sample((2, index), seed=1)[0])
    np.testing.assert_equal(np.random.get_state(), numpy_state)


def device_batches(recipe, options, dataset, first_step: int):
    samples = ftclip.load_samples(recipe, options, dataset, first_step)
    return ftclip.device_batches(recipe, options, samples, first_step)


def test_each_micro_batch_has_noise_of_its_own_and_a_resumed_run_the_same():
    recipe = ftclip.Recipe(num_images=8, batch_size=8, epochs=2, random_erasing=1.0)
    options = ftclip.Options(micro_batch_size=4, workers=0, device="cpu")
    black = (torch.zeros(3, 32, 32, dtype=torch.uint8), 0)
    dataset = collections.defaultdict(lambda: black)
    images = [batch for batch, _ in device_batches(recipe, options, dataset, 0)]
    resumed = [batch for batch, _ in device_batches(recipe, options, dataset, 1)]
    assert len(images) == 4 and same(images[2:], resumed)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(images, 2))


def test_images_of_any_shape_go_through_both_transforms_and_other_tensors_do_not():
    for width, height in ((1, 1), (20_000, 3), (3, 20_000)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        assert ftclip.train_transform(32)(image).shape == (3, 32, 32)
        assert ftclip.eval_transform(image, 32).shape == (3, 32, 32)
    for wrong in (torch.rand(3, 40, 40), torch.zeros(40, 40, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"an image is uint8 \(3, H, W\), not"):
            ftclip.eval_transform(wrong, 32)


# ------------------------------------------------------------------------------------ steps


def test_evaluate_counts_every_image_once():
    torch.manual_seed(0)
    images = torch.randn(37, 3, 4, 4)
    labels = torch.randint(0, 8, (37,))
    models = {name: nn.Sequential(nn.Flatten(), nn.Linear(48, 8)) for name in ("a", "b")}
    result = ftclip.evaluate(models, zip(images.split(10), labels.split(10)))
    assert result["images"] == 37
    for name, model in models.items():
        order = model(images).argsort(1, descending=True)
        place = (order == labels[:, None]).int().argmax(1)  # of the label among the outputs
        assert result[f"{name}_top1"] == pytest.approx(100 * (place == 0).float().mean().item())
        assert result[f"{name}_top5"] == pytest.approx(100 * (place < 5).float().mean().item())
    two_classes = {"c": nn.Sequential(nn.Flatten(), nn.Linear(48, 2))}
    assert ftclip.evaluate(two_classes, [(images, labels % 2)])["c_top5"] == 100


def test_accumulated_micro_batches_equal_one_batch_also_when_clipped():
    torch.manual_seed(0)
    images = torch.randn(12, 3, 32, 32)
    labels = torch.randint(0, 5, (12,))
    start = random_model()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms = []
    for clip_grad in (0.0, 0.1):
        found = []
        for parts in (1, 4):
            model = copy.deepcopy(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            batches = zip(images.chunk(parts), labels.chunk(parts))
            loss = ftclip.train_step(model, batches, parts, optimizer, scaler, clip_grad=clip_grad)
            step = [a.detach() - b for a, b in zip(model.parameters(), start.parameters())]
            found.append((loss, torch.cat([part.flatten() for part in step])))
        for one, four in zip(*found):
            torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)
        norms.append(found[0][1].norm().item())
    assert norms[0] > 0.2 and norms[1] == pytest.approx(0.1, rel=1e-3)


def test_train_step_refuses_what_would_train_something_else():
    model = nn.Linear(2, 2).eval()
    batch = (torch.ones(1, 2), torch.tensor([0]))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for batches in ([], [batch]):
        with pytest.raises(StopIteration):
            ftclip.train_step(model, iter(batches), 2, optimizer, scaler)
    with pytest.raises(TypeError):  # a list would start again at each step
        ftclip.train_step(model, [batch, batch], 2, optimizer, scaler)
    assert same(model.state_dict(), before) and model.training


# ------------------------------------------------------------------------------------ checkpoints


def test_what_was_saved_can_be_loaded(tmp_path):
    state = {"anything": torch.ones(3), "nested": [{"a": (1, 2.5)}, "text", None]}
    ftclip.save_checkpoint(tmp_path / "below" / "x.pt", state)
    loaded = ftclip.load_checkpoint(tmp_path / "below" / "x.pt")
    assert same(loaded, state | {"format": ftclip.FORMAT})


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "last.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"format": ftclip.FORMAT, "x": Hostile()}, tmp_path / "best.pt")
    for name in ("last.pt", "best.pt"):
        with pytest.raises(ftclip.UserError, match=name):
            ftclip.load_checkpoint(tmp_path / name)
        with pytest.raises(ftclip.UserError, match=name):
            ftclip.read_weights("ViT-B-16", str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    ftclip.save_checkpoint(tmp_path / "last.pt", {"step": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):  # in the middle of the file
        ftclip.save_checkpoint(tmp_path / "last.pt", {"a": torch.zeros(9), "b": lambda: 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as on a full disk
    try:
        sentence = r"cannot write .*last.pt .*File too large"
        with pytest.raises(ftclip.UserError, match=sentence):
            ftclip.save_checkpoint(tmp_path / "last.pt", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert ftclip.load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_damaged_checkpoint_never_gives_other_contents(tmp_path):
    path = tmp_path / "last.pt"
    ftclip.save_checkpoint(path, {"x": torch.zeros(9), "history": [{"top1": 5.0}]})
    expected = ftclip.load_checkpoint(path)
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for i in range(len(whole)):
        flipped = whole[i] ^ 1 << i % 8
        damaged.append(whole[:i] + bytes([flipped]) + whole[i + 1 :])
    refused = 0
    for contents in damaged:
        path.write_bytes(contents)
        try:
            assert same(ftclip.load_checkpoint(path), expected)
        except ftclip.UserError as error:
            assert f"cannot read checkpoint {path}" in str(error) or "format" in str(error)
            refused += 1
    assert refused > len(whole) / 4  # the others are padding


# ------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="session")
def reference(tiny, data, tmp_path_factory) -> Path:
    """Output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("reference") / "run"
    ftclip.main(flags(tiny, data, output))
    return output


@pytest.fixture
def save_each_step(monkeypatch) -> list:
    """Flags with which last.pt is saved after each step."""
    monkeypatch.setattr(ftclip, "LOG_STEPS", 1)
    return ["--save-minutes", 0]


def test_a_run_leaves_what_readme_says(reference, data):
    files = {path.name for path in reference.iterdir()}
    assert files == {"last.pt", "best.pt", "metrics.jsonl", ".lock"}
    recipe = json.loads((reference / "metrics.jsonl").read_text().splitlines()[0])["recipe"]
    assert recipe["lr"] == 1e-3 and recipe["num_images"] == 48
    records = metrics(reference)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert {"train_loss", "lr", "raw_top1", "raw_top5", "ema_top1", "ema_top5"} < record.keys()
        assert record["images"] == 13
    assert records[0]["lr"] == 1e-3
    assert records[-1]["lr"] == ftclip.lr_at(8, 9, 3, 1e-3, 1e-6)
    model, classes, transform = ftclip.load_classifier(reference / "best.pt")
    transform = pickle.loads(pickle.dumps(transform))  # a dataset that has it must be picklable
    assert classes == CLASSES and not model.training
    path = next((data / "val" / CLASSES[1]).iterdir())
    image = transform(ftclip.read_image(path))
    with Image.open(path) as file:
        assert torch.equal(transform(file), image)
    assert torch.equal(image, ftclip.eval_transform(ftclip.read_image(path), 32))
    assert model(image[None]).shape == (1, 3)
    best = ftclip.load_checkpoint(reference / "best.pt")
    assert best["record"]["ema_top1"] == max(record["ema_top1"] for record in records)
    assert same(dict(model.state_dict()), dict(best["ema"]))
    last, _, _ = ftclip.load_classifier(reference / "last.pt")
    state = ftclip.load_checkpoint(reference / "last.pt")
    assert same(dict(last.state_dict()), dict(state["ema"]))


def test_a_run_is_the_sum_of_its_parts(reference, tiny, data):
    """The same run, written out with the public functions and nothing of `train`."""
    torch.manual_seed(0)
    given, options = ftclip.parse_flags(flags(tiny, data, "unused"))
    recipe = ftclip.resolve(
        ftclip.B16, given | {"image_size": 32, "num_images": 48, "num_classes": 3}
    )
    model = ftclip.build_model(TINY, 3, drop_path=0.2)
    groups = ftclip.param_groups(model, 3, 1e-3, 0.6, 0.05)
    optimizer = torch.optim.AdamW(groups)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ema = ftclip.EMA(model, recipe.ema_decay)
    transform = ftclip.train_transform(32, 0.08, ftclip.RandAugment())
    dataset = ftclip.FolderDataset(data / "train", transform)
    micro_batches = device_batches(recipe, options, dataset, 0)
    found = []
    for step in range(9):
        for group in optimizer.param_groups:
            group["lr"] = ftclip.lr_at(step, 9, 3, 1e-3, 1e-6) * group["lr_scale"]
        loss = ftclip.train_step(model, micro_batches, 4, optimizer, scaler, None, 0.1)
        ema.update(model)
        found.append(loss.item())
    means = [sum(found[i : i + 3]) / 3 for i in (0, 3, 6)]
    assert losses(reference) == pytest.approx(means, rel=1e-6)
    state = ftclip.load_checkpoint(reference / "last.pt")
    for kind, module in (("model", model), ("ema", ema.module)):
        for name, weight in module.state_dict().items():
            torch.testing.assert_close(state[kind][name], weight, rtol=1e-5, atol=1e-6)


def test_a_run_resumes_from_last_pt_bit_for_bit(
    reference, tiny, data, tmp_path, capsys, save_each_step
):
    argv = flags(tiny, data, tmp_path / "run", *save_each_step)
    for steps, done in ((1, 1), (2, 4), (1, 6)):
        with stopped_after(steps):
            ftclip.main(argv)
        assert ftclip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == done
        interrupted = mock.patch.object(ftclip, "evaluate", side_effect=KeyboardInterrupt)
        with interrupted, pytest.raises(KeyboardInterrupt):  # at the end of an epoch
            ftclip.main(argv)
    capsys.readouterr()
    ftclip.main([*argv, "--workers", "2"])
    assert "from step 8" in capsys.readouterr().out
    assert same(outcome(tmp_path / "run"), outcome(reference))
    ftclip.main(argv)  # a finished run
    assert same(outcome(tmp_path / "run"), outcome(reference))


def test_last_pt_is_saved_by_time_and_at_the_end(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr(ftclip, "LOG_STEPS", 2)
    saved = []
    monkeypatch.setattr(
        ftclip,
        "save_checkpoint",
        lambda path, state: saved.append((Path(path).name, state.get("step"))),
    )
    small = ("--batch-size", 8, "--micro-batch-size", 8, "--epochs", 1, "--warmup-epochs", 0)
    for minutes, steps in ((0, [1, 3, 5]), (10, [1])):  # at each report, or only at the first
        saved.clear()
        ftclip.main(flags(tiny, data, tmp_path / "run", *small, "--save-minutes", minutes))
        assert saved == [("last.pt", step) for step in steps] + [("best.pt", None), ("last.pt", 6)]


@pytest.mark.parametrize("number", [1, 2, 3, -1])
def test_a_run_killed_at_a_save_ends_as_if_it_had_not_been(
    number, reference, tiny, data, tmp_path, monkeypatch
):
    """At the first last.pt, the first best.pt, the last.pt after it, and the last of all."""
    argv = flags(tiny, data, tmp_path / "run")
    save = ftclip.save_checkpoint
    saves = []

    def killed(path, state):
        saves.append(Path(path).name)
        finished = saves[-1] == "last.pt" and len(state["history"]) == 3
        if len(saves) == number or (number == -1 and finished):
            raise KeyboardInterrupt
        save(path, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ftclip, "save_checkpoint", killed)
        ftclip.main(argv)
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(reference))


def test_a_run_uses_the_pretrained_weights_and_resumes_without_them(tiny, data, tmp_path, capsys):
    weights = tmp_path / "weights.pt"
    trunk = random_model().trunk.state_dict()
    torch.save(trunk, weights)
    still = ("--lr", 1e-12, "--min-lr", 0, "--pretrained", weights, "--quick-gelu")
    argv = flags(tiny, data, tmp_path / "run", *still, "--save-minutes", 0)
    with stopped_after(3):
        ftclip.main(argv)
    weights.unlink()
    capsys.readouterr()
    ftclip.main(argv)
    assert "from step 3" in capsys.readouterr().out
    state = ftclip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["model_config"]["quick_gelu"]
    for name, weight in trunk.items():
        torch.testing.assert_close(state["model"][f"trunk.{name}"], weight, rtol=0, atol=1e-7)


def test_best_pt_is_the_best_ema_epoch(tiny, data, tmp_path, monkeypatch):
    scores = iter([40.0, 40.0, 30.0])  # of two equal ones the later, which has learned more

    def scored(models, batches, *_):
        assert list(models) == ["raw", "ema"]
        assert max(len(labels) for _, labels in batches) == 4  # what fits in training fits here
        return {"raw_top1": 99.0, "ema_top1": next(scores), "images": 13}

    monkeypatch.setattr(ftclip, "evaluate", scored)
    ftclip.main(flags(tiny, data, tmp_path / "run"))
    best = ftclip.load_checkpoint(tmp_path / "run" / "best.pt")
    last = ftclip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert best["record"]["epoch"] == 2 and not same(best["ema"], last["ema"])
    assert [record["ema_top1"] for record in last["history"]] == [40.0, 40.0, 30.0]


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(
    what, tiny, data, tmp_path, monkeypatch, capsys
):
    step = ftclip.train_step
    done = []

    def poisoned(model, *args):
        loss = step(model, *args)
        done.append(1)
        if len(done) == 5 and what == "loss":
            return loss * float("nan")
        if len(done) == 5:  # as after an infinite gradient of a finite loss
            nn.init.constant_(model.head.bias, float("nan"))
        return loss if what == "loss" else torch.zeros(())

    monkeypatch.setattr(ftclip, "train_step", poisoned)
    argv = flags(tiny, data, tmp_path / "run", "--save-minutes", 0)
    assert run_status(argv, monkeypatch) == 2
    error = capsys.readouterr().err
    assert re.search(
        r"or a weight is not finite at step 6: resume from last.pt with --amp none", error
    )
    assert ftclip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert ftclip.load_checkpoint(tmp_path / "run" / "best.pt")["record"]["epoch"] == 1


def test_a_full_gpu_is_a_sentence_that_names_the_flag(tiny, data, tmp_path, monkeypatch, capsys):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(ftclip, "train_step", mock.Mock(side_effect=full))
    assert run_status(flags(tiny, data, tmp_path / "run"), monkeypatch) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"ftclip: the GPU .*memory: .*--micro-batch-size.*same\n", error)


LONG = ("--batch-size", 2, "--micro-batch-size", 1, "--epochs", 3, "--save-minutes", 0)


LONG += ("--workers", 1, "--eval-every", 2)


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    tiny, data, tmp_path, monkeypatch
):
    """benchmarks/kill_test.py does this for longer, and with two processes."""
    monkeypatch.setattr(ftclip, "LOG_STEPS", 5)
    ftclip.main(flags(tiny, data, tmp_path / "undisturbed", *LONG))
    argv = flags(tiny, data, tmp_path / "run", *LONG)
    rng = random.Random(0)
    last = tmp_path / "run" / "last.pt"
    steps = []
    for _ in range(3):
        pid = start(argv, tmp_path / "log")
        before = last.stat().st_mtime_ns if last.exists() else 0

        def saved(before=before) -> bool:
            return last.exists() and last.stat().st_mtime_ns > before

        wait_for(saved)
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(pid, signal.SIGKILL)  # the loader's worker too
        assert status_of(pid) == -signal.SIGKILL
        steps.append(ftclip.load_checkpoint(last)["step"])
    assert steps == sorted(steps) and steps[0] < steps[-1] < 72  # it went on and was not over
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_ctrl_c_ends_with_a_line_that_says_how_to_resume(tiny, data, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", *LONG)
    pid = start(argv, tmp_path / "log")
    wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    os.killpg(pid, signal.SIGINT)  # a terminal signals the loader's worker too
    assert status_of(pid) == 2
    text = (tmp_path / "log").read_text()
    assert re.search(r"\nftclip: stopped: the same command goes on from the last save .*\n$", text)
    assert "Traceback" not in text
    assert ftclip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] < 72


def test_a_second_run_in_the_same_folder_is_refused(tiny, data, tmp_path):
    argv = flags(tiny, data, tmp_path / "run", "--epochs", 9)
    pid = start(argv, tmp_path / "log")
    wait_for((tmp_path / "run" / "last.pt").exists)
    os.kill(pid, signal.SIGSTOP)  # it holds the folder and does not end
    status = status_of(start(argv, tmp_path / "second"))
    os.killpg(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL
    assert status == 2
    assert "run is in use by another run: give another" in (tmp_path / "second").read_text()
    assert status_of(start(argv, tmp_path / "third")) == 0  # the killed run has left no lock


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_restarts_a_run_whose_process_was_killed(tiny, data, tmp_path):
    """With two processes, a sum of two numbers has the same bits in any order."""
    run_two(flags(tiny, data, tmp_path / "undisturbed", *LONG), tmp_path)
    argv = flags(tiny, data, tmp_path / "run", *LONG)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(tmp_path / "log", "w") as log:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", *launcher, str(SCRIPT), *argv],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        last = tmp_path / "run" / "last.pt"
        wait_for(last.with_name("metrics.jsonl").exists)  # after the first epoch
        os.kill(max(children_of(torchrun.pid)), signal.SIGKILL)
        assert torchrun.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        torchrun.terminate()
    steps = re.findall(r"from step (\d+)", (tmp_path / "log").read_text())
    assert len(steps) == 2 and int(steps[1]) > 0  # it was started twice
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_two_processes_train_as_one_and_evaluate_every_image(
    reference, tiny, data, tmp_path, capsys
):
    run_two(flags(tiny, data, tmp_path / "two", "--workers", 2), tmp_path)
    assert difference(tmp_path / "two", reference) < 1e-5
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), rel=1e-5)
    for one, two in zip(metrics(reference), metrics(tmp_path / "two")):
        assert one["images"] == two["images"] == 13
        assert (one["raw_top1"], one["ema_top1"]) == (two["raw_top1"], two["ema_top1"])
    best = str(tmp_path / "two" / "best.pt")
    evaluation = ["--eval", best, "--data", str(data), "--device", "cpu"]
    printed = run_two(evaluation, tmp_path / "eval")
    capsys.readouterr()
    ftclip.main(evaluation)
    alone = capsys.readouterr().out
    assert "13 images: top-1" in alone
    assert alone in printed


def test_processes_that_see_different_files_are_refused(reference, tiny, data, tmp_path):
    """As without a shared file system: rank 1 sees another last.pt than rank 0."""
    shutil.copytree(reference, tmp_path / "1")
    argvs = [flags(tiny, data, tmp_path / str(rank)) for rank in range(2)]
    logs = [tmp_path / "rank0.log", tmp_path / "rank1.log"]
    pids = start_two(argvs, logs)
    assert status_of(pids[0]) == 2
    assert "ftclip: nodes see different images or another" in logs[0].read_text()
    # Rank 0 says it. torchrun then ends rank 1, which has waited without a word.
    os.killpg(pids[1], signal.SIGKILL)
    assert status_of(pids[1]) == -signal.SIGKILL
    assert "ftclip:" not in logs[1].read_text()
    assert not (tmp_path / "0").exists()


def test_a_stopped_run_resumes_with_another_number_of_processes(
    reference, tiny, data, tmp_path, save_each_step
):
    argv = flags(tiny, data, tmp_path / "run", *save_each_step)
    with stopped_after(4):
        ftclip.main(argv)
    assert "from step 4" in run_two(argv, tmp_path)
    assert difference(tmp_path / "run", reference) < 1e-5


def test_layouts_agree(tiny, data, tmp_path):
    """Without what is drawn per micro-batch, its size makes no difference either."""
    off = shlex.split("--mixup 0 --cutmix 0 --drop-path 0 --random-erasing 0")
    layouts = {"whole": "--micro-batch-size 16", "cut": "--micro-batch-size 2 --workers 2"}
    for name, more in layouts.items():
        ftclip.main(flags(tiny, data, tmp_path / name, *off, *more.split()))
    assert difference(tmp_path / "whole", tmp_path / "cut") < 1e-5


def test_bf16_training_follows_float32(reference, tiny, data, tmp_path):
    ftclip.main(flags(tiny, data, tmp_path / "bf16", "--amp", "bf16"))
    assert losses(tmp_path / "bf16") != losses(reference)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(reference), rel=0.01)


def test_a_compiled_run_follows_the_plain_one(reference, tiny, data, tmp_path, monkeypatch):
    compile_ = functools.partial(
        torch.compile, backend="aot_eager"
    )  # captures graphs, needs no g++
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=compile_))
    ftclip.main(flags(tiny, data, tmp_path / "compiled", "--compile"))
    torch.compile.assert_called_once()
    assert difference(tmp_path / "compiled", reference) < 1e-4
    ftclip.load_classifier(tmp_path / "compiled" / "best.pt")  # names without _orig_mod


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mix", [None, v2.MixUp, v2.CutMix])
def test_a_step_stays_on_the_device_and_reads_nothing_from_it(mix, checkpointing, monkeypatch):
    """An audit of the device's lines without a GPU, on the meta device.

    Its tensors have no values, so whatever would wait for a GPU to read one raises. Most operations
    on tensors of two devices raise too. Autocast and fused AdamW do not exist there.
    """
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    with torch.device("meta"):
        model = ftclip.build_model(TINY, 5, drop_path=0.2)
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        labels = torch.zeros(4, dtype=torch.long)
    model.trunk.grad_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(ftclip.param_groups(model, 3, 1e-3, 0.6, 0.05))
    ema = ftclip.EMA(model, 0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    images = ftclip.random_erasing(ftclip.normalize(images), 1.0)
    targets = labels
    if mix is not None:
        images, targets = mix(num_classes=5)(images, labels)
    batches = iter([(images, targets), (images, targets)])
    loss = ftclip.train_step(model, batches, 2, optimizer, scaler, None, 0.1, clip_grad=1.0)
    ema.update(model)
    tensors = [loss, images, targets, *model.state_dict().values()]
    tensors += [parameter.grad for parameter in model.parameters()]
    tensors += [*ema.module.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.long}
    sums = []
    monkeypatch.setattr(
        ftclip, "all_sum", lambda counts: sums.append(counts) or torch.ones(counts.shape)
    )
    ftclip.evaluate({"raw": model}, [(images, labels)] * 2)  # reads its counts only at the end
    assert [part.device.type for part in sums] == ["meta", "meta"]


@needs_gpu
@pytest.mark.parametrize("more", ["--amp none", "--amp bf16", "--amp fp16", "--amp bf16 --compile"])
def test_gpu_training_follows_the_cpu(more, tiny, data, tmp_path):
    # Without what is drawn on the device.
    off = shlex.split("--mixup 0 --cutmix 0 --drop-path 0 --random-erasing 0")
    ftclip.main(flags(tiny, data, tmp_path / "cpu", *off))
    ftclip.main(flags(tiny, data, tmp_path / "gpu", *off, "--device", "cuda", *more.split()))
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.01)


def torchrun_one(*argv) -> str:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return done.stdout


@needs_gpu
def test_one_gpu_under_torchrun_resumes_and_evaluates(tiny, data, tmp_path):
    for amp in ("fp16", "bf16"):  # another precision may resume a run
        torchrun_one(*flags(tiny, data, tmp_path / "run", "--device", "cuda", "--amp", amp))
    best = tmp_path / "run" / "best.pt"
    assert "13 images: top-1" in torchrun_one("--eval", best, "--data", data)


def test_the_demo_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ftclip.DEMO, "model", TINY)  # half as wide
    ftclip.main(
        ["--demo", "--epochs", "2", "--warmup-epochs", "0", "--workers", "1", "--lr", "2e-3"]
    )
    assert metrics(tmp_path / "runs" / "demo")[-1]["raw_top1"] > 45  # of four classes


# ------------------------------------------------------------------------------------ mistakes


def broken(data: Path, kind: str) -> Path:
    """A copy of the data with one thing wrong."""
    target = data.with_name(kind)
    if target.exists():
        return target
    shutil.copytree(data, target)
    if kind == "flat":
        shutil.rmtree(target / "val")
        (target / "val").mkdir()
        photo(9, 9).save(target / "val" / "0.png")
    elif kind == "single":
        for split, name in itertools.product(("train", "val"), CLASSES[1:]):
            shutil.rmtree(target / split / name)
    elif kind == "differ":
        (target / "val" / "wasp").rename(target / "val" / "moth")
    elif kind == "fewer":
        next((target / "train" / "ant").iterdir()).unlink()
    elif kind == "empty":
        (target / "train" / "cat").mkdir()
    elif kind == "newline":
        (target / "train" / "ant" / "a\nb.png").write_text("no image")
    elif kind == "renamed":
        for split in ("train", "val"):
            (target / split / "wasp").rename(target / split / "moth")
    elif kind == "no-val":
        for path in (target / "val").rglob("*.png"):
            path.rename(path.with_suffix(".heic"))
    elif kind == "unreadable":
        for path in (target / "train" / "ant").iterdir():
            path.write_text("no image")
    return target


BROKEN = (
    "flat",
    "single",
    "differ",
    "fewer",
    "empty",
    "newline",
    "unreadable",
    "renamed",
    "no-val",
)
MISTAKES = {  # flags → what the sentence must name
    "--data {images}/nowhere": "--data DIR needs images of two classes in .*No such file .*nowhere/train",
    "--data {flat}": "Couldn't find any class folder in .*flat/val",
    "--data {differ}": "differ/val has the class moth, which training does not have",
    "--data {empty}": "Found no valid file for the classes cat",
    "--data {no-val}": r"no-val/val has 0 images .*left out: \[.*heic",
    "--data {single}": r"needs images of two classes .*single/train has 16 images of \['ant'\]",
    "--data {unreadable}": r"cannot read image .*ant.*\.png, replace it",
    "--data {newline}": r"cannot read image .*ant/a b\.png,",
    "--batch-size 49": r"a batch of 49 images must be a multiple of 1 .* at most 48, such as 48",
    "--model ViT-B/16": "--model ViT-B/16 is no plain ViT such as ViT-B-16, and no JSON",
    "--model hf-hub:timm/nothing": "--model hf-hub:timm/nothing is no plain .*Failed to download",
    "--model RN50": r"RN50 is no plain ViT .*its layers is \[3, 4, 6, 3\]",
    "--model vit_medium_patch16_gap_256": "is no plain ViT .*its timm_model_name is",
    "--model {junk}": "--model .*junk is no plain .*Expecting value",
    "--model ViT-B-16 --pretrained opnai": "opnai: it takes an intact file, or a tag .*tags are .'none', 'openai', 'laion",
    "--pretrained {weights}": "weights.pt has vision_model.positional_embedding .*transformers'",
    "--pretrained {wide}": "wide.pt does not say its activation: give --quick-gelu",
    "--pretrained {wide} --quick-gelu": "wide.pt does not fit .*tiny.json .*size mismatch",
    "--pretrained {junk} --quick-gelu": "cannot load --pretrained .*junk",
    "--output {reference}": r"last.pt is from another run \(random_erasing 0.25 → 0.1\)",
    "--output {best}": "best has a best.pt, but no last.pt: give another --output",
    "--output {weights}/below": "Not a directory: .*below",
    "--output {reference} --data {fewer}": r"another run \(.*num_images 48 → 47",
    "--output {reference} --data {renamed}": r"another run \(.*class moth, class wasp\)",
    "--output {reference} --model {other}/tiny.json": r"another run \(.*layers 3 → 2",
    "--output {other}": "cannot read .*last.pt .its format is ftclip 3, and this version reads",
    "--ema-decay 1": "--ema-decay 1.0 is not at least 0 and less than 1",
    "--warmup-epochs 3": "--warmup-epochs 3 leaves no epoch",
    "--epochs 1.5": "argument --epochs: invalid int value",
    "--amp fp8": "argument --amp: invalid choice",
    "--nonsense": "unrecognized arguments: --nonsense",
    "--train-block 1": "unrecognized arguments: --train-block 1",  # no abbreviations
}
EVAL_MISTAKES = {
    "--data {differ}": "val has the class moth",
    "--image-size 64": "--eval takes image_size from the checkpoint: leave that out",
    "--eval {weights}": "weights.pt .its format is None, and this",
    "--eval nothing.pt": "cannot read checkpoint nothing.pt",
}


@pytest.fixture(scope="session")
def places(reference, data, tmp_path_factory) -> dict[str, Path]:
    """Files and folders with which something is wrong, by the names in MISTAKES."""
    root = tmp_path_factory.mktemp("places")
    places = {name: root / name for name in ("best", "other", "weights.pt", "wide.pt", "junk")}
    torch.save({"vision_model.positional_embedding": torch.zeros(17, 8)}, places["weights.pt"])
    wide = ftclip.build_model({"vision_cfg": VISION | {"width": 96}}, 3)
    torch.save(wide.trunk.state_dict(), places["wide.pt"])
    places["junk"].write_text("junk")
    places["best"].mkdir()
    shutil.copy(reference / "best.pt", places["best"])
    with mock.patch.object(ftclip, "FORMAT", "ftclip 3"):
        ftclip.save_checkpoint(places["other"] / "last.pt", {})
    two = {"vision_cfg": VISION | {"layers": 2}}
    (places["other"] / "tiny.json").write_text(json.dumps(two))
    places |= {"weights": places["weights.pt"], "wide": places["wide.pt"]}
    places |= {kind: broken(data, kind) for kind in BROKEN}
    return places | {"reference": reference, "images": data}


@pytest.mark.parametrize("mistake", [*MISTAKES, *EVAL_MISTAKES])
def test_a_mistake_is_a_sentence(mistake, places, tiny, data, tmp_path, monkeypatch, capsys):
    before = sorted(places["other"].parent.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = flags(tiny, data, "out", "--random-erasing", 0.1)
    if mistake in EVAL_MISTAKES:
        argv = ["--eval", str(places["best"] / "best.pt"), "--data", str(data)]
    argv += shlex.split(mistake.format(**places))
    with pytest.raises(SystemExit, match="^2$"):  # argparse's, or the status of run()
        sys.exit(run_status(argv, monkeypatch))
    error = capsys.readouterr().err
    assert error.startswith("ftclip: ") and error.count("\n") == 1
    assert re.search((MISTAKES | EVAL_MISTAKES)[mistake], error)
    if "cannot read image" not in error:  # which only the run meets
        assert list(tmp_path.iterdir()) == []  # nothing was written
    assert sorted(places["other"].parent.rglob("*")) == before


def test_the_plan_says_what_was_found(places, tiny, capsys, tmp_path):
    shutil.copytree(places["images"], tmp_path / "d")
    for split in ("train", "val"):
        (tmp_path / "d" / split / "ant" / "photo.heic").write_text("")
    ftclip.main(
        ["--model", str(tiny), "--pretrained", "none", "--data", str(tmp_path / "d"), "--dry-run"]
    )
    text = capsys.readouterr().out
    for split, count in (("train", 48), ("val", 13)):
        assert re.search(rf"{count} images in \S+{split}, left out: 1 \S+/ant/photo.heic", text)
    assert f"3 classes: {', '.join(CLASSES)}" in text


def test_help_shows_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        ftclip.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for cls in (ftclip.Recipe, ftclip.Options):
        for field in dataclasses.fields(cls):
            if not field.name.startswith("num_"):
                flag = "--" + field.name.replace("_", "-")
                entry = re.search(rf" {flag}[ ,].*?default: (.+?)(?: --|$)", text)
                assert entry, flag


def test_too_few_gpus_are_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run_status(["--device", "cuda"], monkeypatch) == 2
    assert re.search("PyTorch sees 0 GPU.*lower --nproc", capsys.readouterr().err)


def test_an_error_in_a_loader_worker_is_one_line(tiny, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds to join
    argv = flags(tiny, places["unreadable"], tmp_path / "out", "--workers", 1)
    assert run_status(argv, monkeypatch) == 2
    gc.collect()  # joins the worker
    error = capsys.readouterr().err
    assert re.fullmatch(r"ftclip: cannot read image \S*ant\S*png, replace it .*\n", error)


# ------------------------------------------------------------------------------------ for copying


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


@functools.cache
def definitions() -> dict[str, list[ast.stmt]]:
    """Top-level statements by the name that they define. A constant may have several."""
    found = collections.defaultdict(list)
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name].append(node)
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[target.id].append(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found["imports"].append(node)
    return found


def cut_out(*names: str) -> dict:
    """Namespace of an empty file with these definitions and ftclip's imports."""
    kept = {"imports", *names}
    nodes = [node for name, nodes in definitions().items() if name in kept for node in nodes]
    space: dict = {}
    exec(compile(ast.Module(nodes, []), "pasted.py", "exec"), space)  # noqa: S102
    return space


def companions() -> dict[str, list[str]]:
    """What the module's docstring says must be copied with each piece."""
    _, *parts = re.split(r"^# -{20,} (.+)\n", SCRIPT.read_text(), flags=re.MULTILINE)
    of_part = {}
    for title, text in zip(parts[::2], parts[1::2]):
        of_part[title] = re.findall(r"^(?:class |def )?(\w+)(?:\(| = |:)", text, re.MULTILINE)
    table = {}
    for pieces, needed in re.findall(r"^    (\w[\w, ]*?)  +(\w.*)$", ftclip.__doc__, re.MULTILINE):
        for piece in pieces.split(", "):
            table[piece] = []
            for word in re.findall(r'"\w+"|\w+', needed):
                names = of_part.get(word.strip('"'), []) if word[0] == '"' else [word]
                for name in names:
                    table[piece] += [name, *table.get(name, [])]
    return table


def test_each_public_piece_works_when_pasted_into_an_empty_file(reference, data, tmp_path):
    path = next((data / "val" / CLASSES[1]).iterdir())
    image = ftclip.read_image(path)
    best = reference / "best.pt"
    linear = nn.Linear(2, 2)
    trunk = ftclip.build_model(TINY, 2).trunk
    batch = (torch.ones(2, 2), torch.tensor([0, 1]))

    def one_step(train_step) -> None:
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_step(linear, iter([batch]), 1, optimizer, scaler)

    uses = {
        "param_groups": lambda f: f(ftclip.build_model(TINY, 2), 3, 1e-3, 0.5, 0.05),
        "lr_at": lambda f: f(3, 10, 2, 1.0, 0.0),
        "CLIPClassifier": lambda f: f(trunk, 64, 2)(torch.ones(1, 3, 32, 32)),
        "EMA": lambda f: f(linear, 0.9).update(linear),
        "RandAugment": lambda f: f(probability=1.0)(Image.open(path).convert("RGB")),
        "train_transform": lambda f: f(16, 0.08, ftclip.RandAugment())(image),
        "random_erasing": lambda f: f(torch.zeros(2, 3, 8, 8), 1.0),
        "train_step": one_step,
        "normalize": lambda f: f(image),
        "eval_transform": lambda f: f(image, 16),
        "read_image": lambda f: f(path),
        "explain": lambda f: f("what").__enter__(),
        "micro_batch_keys": lambda f: next(f(ftclip.Recipe(), 4, 0)),
        "resolve": lambda f: f(ftclip.B16, {"num_images": 99}),
        "FolderDataset": lambda f: f(data / "train", id)[0, 0],
        "evaluate": lambda f: f({"m": linear}, [batch]),
        "build_model": lambda f: f(TINY, 2, str(best))(torch.ones(2, 3, 32, 32)),
        "save_checkpoint": lambda f: f(tmp_path / "x.pt", {}),
        "load_checkpoint": lambda f: f(best),
        "load_classifier": lambda f: f(best)[2](image),
    }
    table = companions()
    assert table.keys() == uses.keys()
    for name, use in uses.items():
        use(cut_out(name, *table[name])[name])


# ------------------------------------------------------------------------------------ documents


DOCUMENTS = ("README.md", "recipes.md", "benchmarks/README.md")
TEXTS = {name: (HERE / name).read_text() for name in DOCUMENTS}


def commands(program: str) -> list[list[str]]:
    """The arguments of each command line of the documents and of ftclip.py's docstring."""
    text = "\n".join([*TEXTS.values(), ftclip.__doc__]).replace("\\\n", " ")
    for name, value in re.findall(r'^([A-Z]+)="(.*)"$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)
    found = re.findall(rf"(?:python|torchrun .*) {program} ?([^`#\n|]*)", text)
    return [shlex.split(command) for command in dict.fromkeys(found) if "--help" not in command]


def test_commands_in_the_documents_run(reference, tiny, data, tmp_path, monkeypatch):
    """Dry, with our images and models in place of theirs. Those that evaluate do it."""
    assert len(commands("ftclip.py")) >= 15
    for i, argv in enumerate(commands("ftclip.py")):
        (tmp_path / str(i)).mkdir()
        monkeypatch.chdir(tmp_path / str(i))
        for name in ("tiny.json", "dinov2_s14.json", "vit_96.json", "vit_192.json"):
            shutil.copy(tiny, name)
        argv = ["32" if word == "128" else word for word in argv]  # a batch of our few images
        _, options = ftclip.parse_flags(argv)
        stand_ins = {options.data: data}
        if options.eval:
            stand_ins[options.eval] = reference / Path(options.eval).name
        for path, real in stand_ins.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).symlink_to(real)
        with monkeypatch.context() as patch:
            if not options.eval:
                argv.append("--dry-run")
                patch.setattr(ftclip, "build_model", mock.Mock())  # quicker, and tested above
                patch.setattr(ftclip, "print_plan", mock.Mock())
            ftclip.main(argv)


def test_flags_of_the_benchmarks_in_the_documents_exist():
    ours = {
        field.name for cls in (ftclip.Recipe, ftclip.Options) for field in dataclasses.fields(cls)
    }
    scripts = sorted(path.name for path in (HERE / "benchmarks").glob("*.py"))
    for name in scripts:
        source = (HERE / "benchmarks" / name).read_text()
        assert name in TEXTS["benchmarks/README.md"]
        for argv in commands(f"benchmarks/{name}"):
            for word in argv:
                if word.startswith("--") and " " not in word:
                    assert f'"{word}"' in source or word[2:].replace("-", "_") in ours, argv


def test_python_in_readme_runs(reference, data, tmp_path, monkeypatch, capsys):
    """Each block, one after the other, with our images and model in place of flowers and CLIP."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        shutil.copytree(data / split, "small", dirs_exist_ok=True)
    Path("runs").mkdir()
    Path("runs/flowers-ViT-B-16-224").symlink_to(reference)
    shutil.copy(next((data / "val" / CLASSES[0]).iterdir()), "rose.jpg")
    build = ftclip.build_model
    for_clip = {"ViT-B-16": lambda *_: build(TINY, 2)}
    monkeypatch.setattr(
        ftclip, "build_model", lambda model, *rest: for_clip.get(str(model), build)(model, *rest)
    )
    blocks = re.findall(r"^```python\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 11
    space = {}
    for block in blocks:
        try:
            exec(block, space)  # noqa: S102
        except ModuleNotFoundError as error:  # which README says how to install
            assert error.name in ("sklearn", "onnxscript"), block
    text = capsys.readouterr().out
    rows = Path("predictions.csv").read_text().splitlines()
    assert len(rows) == len(list(Path("flowers/val").rglob("*.png"))) > 5
    for name in CLASSES:
        assert re.search(rf"^{name}: \d+ of \d+, wrong most often as ", text, re.MULTILINE)
    assert Path("flowers.pt2").exists()


def test_every_row_of_the_recipes_runs_dry_and_changes_what_it_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plans = []
    monkeypatch.setattr(ftclip, "print_plan", lambda nearest, recipe, *_: plans.append(recipe))
    monkeypatch.setattr(ftclip, "build_model", mock.Mock())
    tables = [line for line in TEXTS["recipes.md"].splitlines() if line.startswith("|")]
    rows = set(re.findall(r"`(--[a-z][^`]+)`", "\n".join(tables)))
    rows = [shlex.split(row) for row in rows if " " in row]  # flags with values
    assert len(rows) > 35
    for argv in rows:
        ftclip.main([*argv, "--dry-run"])
        for flag, value in zip(argv, [*argv[1:], "--"]):
            if flag.startswith("--") and not value.startswith("--"):
                decided = getattr(plans[-1], flag[2:].replace("-", "_"))
                assert decided == type(decided)(value), argv
    ftclip.main(["--no-freeze-patch-embed", "--dry-run"])
    assert plans[-1].freeze_patch_embed is False


def test_names_links_and_messages_in_the_documents_exist():
    for document, text in TEXTS.items():
        assert set(re.findall(r"`(test_\w+)`", text)) <= globals().keys()
        for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
            if path.startswith("https://"):
                continue
            target = (HERE / document).parent / path if path else HERE / document
            assert target.exists(), path
            if anchor:
                titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                anchors = [
                    re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
                ]
                assert anchor in anchors, anchor
    details = TEXTS["recipes.md"].split("## Implementation details")[1].split("### Deviations")[0]
    names = re.findall(r"^\| [^|]+ \| `(\w+)` \|", details, re.MULTILINE)
    assert len(names) > 15 and all(hasattr(ftclip, name) for name in names)
    source = re.sub(r'"\s*\n\s*f?"', "", SCRIPT.read_text())
    messages = TEXTS["README.md"].split("## When something goes wrong")[1].split("##")[0]
    parts = re.findall(r"^\| (`.+?) \|", messages, re.MULTILINE)
    assert len(parts) >= 8
    for part in re.findall(r"`([^`]+)`", " ".join(parts)):
        assert part in re.sub(r"\{[^{}]*\}", "", source) or part in source, part


@pytest.mark.parametrize("what", ["loader", "step"])
def test_the_speed_benchmark_starts_small(what, data, monkeypatch, capsys):
    """What it measures is not asserted."""
    if what == "step" and torch.cuda.is_available():
        pytest.skip("on a GPU it is measured, not tried")
    small = [what, "--data", str(data), "--count", "1", "--rounds", "1", "--workers", "0"]
    small += ["--blocks", "1"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *small])
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(HERE / "benchmarks" / "speed.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert re.search(r"^ftclip is [\d.]+ times as fast as timm$", text, re.MULTILINE)


def test_import_is_silent_and_starts_nothing():
    code = "import sys, ftclip; print([m for m in ('open_clip', 'timm') if m in sys.modules])"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""
