"""What ftclip promises, each promise against a reference: timm, PyTorch, a closed form, or published figures.

python -m pytest test_ftclip.py
"""

import ast
import collections
import contextlib
import copy
import functools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

# Before torch looks: all but AMX, which some sandboxes announce, and then stop whoever uses it (for bf16).
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_FP16"

import numpy as np
import pytest
import timm.data
import timm.loss
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torchvision.transforms import v2

import ftclip

HERE = Path(__file__).resolve().parent
SCRIPT = str(HERE / "ftclip.py")
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 3},
}
torch.set_num_threads(1)  # quicker for tiny models, and the two-process tests need the other core
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB Pillow image as a photograph is: light and colour at all scales, some grain, 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, height, width, generator=generator) / 20
    for cells in (2, 4, 9, 20, 45):
        light = torch.randn(1, 1, cells, cells, generator=generator)
        colour = torch.randn(1, 3, cells, cells, generator=generator) / 2
        image += F.interpolate((light + colour) / cells**0.7, size=(height, width), mode="bicubic")[0]
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    image = ((image - low) / (high - low)) ** torch.tensor([0.7, 1.0, 1.4]).view(3, 1, 1)  # in warm light
    return v2.functional.to_pil_image((image * 255).round().byte())


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return draw_data(tmp_path_factory.mktemp("data"))


CLASSES = ["ant", "honey bée", "wasp"]


def draw_data(root: Path) -> Path:
    """3 classes, 48 training and 13 validation images of odd sizes."""
    for split, count in (("train", 48), ("val", 13)):
        for i in range(count):
            path = root / split / CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(40 + i % 7, 36 + i % 5, seed=1000 * count + i).save(path)
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def flags(tiny, data, output, *more) -> list[str]:
    """A run of 3 epochs of 3 steps, with everything random switched on."""
    base = f"--model {tiny} --pretrained none --data {data} --output {output} --epochs 3 --warmup-epochs 1"
    base += " --batch-size 16 --micro-batch-size 4 --lr 1e-3 --workers 0 --device cpu --drop-path 0.2"
    return shlex.split(base + " --mixup 0.5 --cutmix 0.5") + list(map(str, more))


def run(*argv, processes: int = 0, env: dict | None = None, timeout: int = 60) -> subprocess.CompletedProcess:
    """The script as a user starts it."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    command = [*start, SCRIPT, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)


def same(a, b) -> bool:
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(output) -> dict:
    """All that a run leaves behind, to be compared with another's."""
    state, best = (ftclip.load_checkpoint(Path(output) / name) for name in ("last.pt", "best.pt"))
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return {"last": state, "best": best, "metrics": lines[1:]}


def far(output, other) -> float:
    """The largest difference between two runs' last weights, EMA included."""
    one, two = (ftclip.load_checkpoint(Path(path) / "last.pt") for path in (output, other))
    return max((one[k][n] - two[k][n]).abs().max().item() for k in ("model", "ema") for n in one[k])


# ---------------------------------------------------------------------------------------------- recipes

# Printed by the four logs that github.com/LightDXY/FT-CLIP publishes: trainable parameters, steps per epoch,
# warm-up steps, and for some epochs (from 0) the mean lr of the head and of the embeddings.
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


@pytest.mark.parametrize(("model", "size"), PUBLISHED)
def test_dry_run_prints_the_published_runs(model, size, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ftclip.main(["--model", model, "--image-size", str(size), "--dry-run"])
    text = capsys.readouterr().out
    parameters, steps, warmup, _ = PUBLISHED[model, size]
    recipe = ftclip.RECIPES[model, size]
    batch, micro = recipe["batch_size"], recipe["micro_batch_size"]
    assert f"{parameters:,} of" in text
    assert re.search("^activation +QuickGELU$", text, re.MULTILINE)
    expected = {
        "num_images": 1_281_167,
        "steps_per_epoch": steps,
        "warmup_steps": warmup,
        "ema_decay": 0.9998,
    }
    expected |= {"total_steps": steps * recipe["epochs"]}
    for name, value in expected.items():
        assert re.search(rf"^{name} +{value}$", text, re.MULTILINE), name
    assert re.search(
        rf"^batch_size +{batch} = 1 device\(s\) x {micro} images x {batch // micro} ", text, re.MULTILINE
    )
    eight = ftclip.resolve(recipe, {}, 1_281_167, devices=8)
    assert (eight.micro_batch_size, eight.accumulation) == (micro, batch // micro // 8)
    layers = {"ViT-B-16": 12, "ViT-L-14": 24}[model]
    printed = [
        float(lr) for lr in re.search("^lr +(.*) from embeddings to head$", text, re.MULTILINE)[1].split()
    ]
    scales = [recipe["layer_decay"] ** (layers + 1 - i) for i in range(layers + 2)]
    assert printed == pytest.approx([recipe["lr"] * scale for scale in scales], rel=1e-4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", PUBLISHED)
def test_schedule_gives_the_mean_lr_of_the_published_epochs(key):
    _, steps, warmup, epochs = PUBLISHED[key]
    recipe = ftclip.RECIPES[key]
    embeddings = recipe["layer_decay"] ** {"ViT-B-16": 13, "ViT-L-14": 25}[key[0]]
    for epoch, head_lr, embeddings_lr in epochs:
        at = (recipe["epochs"] * steps, warmup, recipe["lr"], recipe["min_lr"])
        mean = sum(ftclip.lr_at(step, *at) for step in range(epoch * steps, (epoch + 1) * steps)) / steps
        assert mean == pytest.approx(head_lr, rel=1e-13)
        assert mean * embeddings == pytest.approx(embeddings_lr, rel=1e-13)


def test_what_is_not_given_follows_from_what_is():
    b16 = ftclip.RECIPES["ViT-B-16", 224]

    def plan(num_images=1_281_167, devices=1, **given):
        return ftclip.resolve(b16, given, num_images, devices)

    assert (plan(batch_size=512).lr, plan(batch_size=512).min_lr) == pytest.approx((6e-4 / 2, 1e-6 / 2))
    assert plan(batch_size=512, lr=6e-4).lr == 6e-4  # literal
    assert (plan(epochs=25).warmup_epochs, plan(epochs=25, warmup_epochs=1).warmup_epochs) == (5, 1)
    one = plan(9, batch_size=8, epochs=1, warmup_epochs=0.9)
    assert (one.total_steps, one.warmup_steps) == (1, 0)  # or else it would learn at lr 0
    # On few images, the batch leaves 32 steps an epoch, and everything follows it.
    for images, batch in ((65536, 2048), (65535, 1024), (1437, 32), (1024, 32), (1023, 16), (40, 1), (5, 1)):
        assert plan(images).batch_size == batch
        assert plan(images).lr == pytest.approx(6e-4 * math.sqrt(batch / 2048))
    assert plan(1437).ema_decay == pytest.approx(1 - 3 / (50 * 44))  # a third of the run
    assert plan(1437, ema_decay=0.9).ema_decay == 0.9
    assert plan(1437, micro_batch_size=24).batch_size == 24  # what is given stays
    assert (plan(devices=6).batch_size, plan(40, devices=8).batch_size) == (
        2046,
        8,
    )  # each device has as many
    assert plan(devices=8).accumulation == 1 and plan(micro_batch_size=64).accumulation == 32
    for wrong in (
        {"batch_size": 6},
        {"batch_size": 2048, "micro_batch_size": 3},
        {"min_lr": 1.0},
        {"warmup_epochs": 50.0},
    ):
        with pytest.raises(ValueError, match="--"):
            plan(devices=4, **wrong)


# ---------------------------------------------------------------------------------------------- model


def reference_logits(model: ftclip.CLIPClassifier, images: torch.Tensor, heads: int) -> torch.Tensor:
    """The whole forward pass in float64 tensor algebra, from the weights alone."""
    w = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    kernel = w["trunk.conv1.weight"]
    width, _, patch, _ = kernel.shape
    patches = images.double().unfold(2, patch, patch).unfold(3, patch, patch)  # (N, 3, g, g, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (N, g*g, 3*p*p)
    x = patches @ kernel.flatten(1).T
    x = torch.cat([w["trunk.class_embedding"].expand(len(x), 1, -1), x], 1) + w["trunk.positional_embedding"]
    x = norm(x, "trunk.ln_pre")
    for i in range(len(model.trunk.transformer.resblocks)):
        name = f"trunk.transformer.resblocks.{i}"
        qkv = norm(x, f"{name}.ln_1") @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(width / heads)).softmax(-1) @ v
        attention = attention.transpose(1, 2).flatten(2)
        x = x + attention @ w[f"{name}.attn.out_proj.weight"].T + w[f"{name}.attn.out_proj.bias"]
        h = norm(x, f"{name}.ln_2") @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
        h = h / (1 + (-1.702 * h).exp())  # QuickGELU
        x = x + h @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]
    return norm(x[:, 1:], "norm").mean(1) @ w["head.weight"].T + w["head.bias"]


def random_model(**how) -> ftclip.CLIPClassifier:
    """A tiny model in which no parameter is zero, one or negligible: each has a part in the output."""
    model = ftclip.build_model(TINY, 5, quick_gelu=True, **how)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_pass_equals_plain_tensor_algebra(mode):
    torch.manual_seed(0)
    model = getattr(random_model(), mode)()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        model(images).double(), reference_logits(model, images, 2), rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.float32  # not rounded to eight bits, which would tie


def test_the_faster_trunk_gives_open_clips_own_numbers_and_a_better_bf16():
    import open_clip

    torch.manual_seed(0)
    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    vision = TINY["vision_cfg"] | {"layers": 8}
    trunk = open_clip.CLIP(8, vision, text, quick_gelu=True).visual
    own = ftclip.CLIPClassifier(trunk, 5)
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.1)
    fast = copy.deepcopy(own)
    for block in fast.trunk.transformer.resblocks:
        block.__class__ = ftclip.Block
    assert fast.state_dict().keys() == own.state_dict().keys()
    images, results = torch.randn(8, 3, 32, 32), {}
    for name, model in (("own", own), ("fast", fast)):
        logits = model(images)
        logits.square().sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tokens = model.trunk(images).float()
        error = (tokens - model.trunk(images)).norm() / tokens.norm()
        results[name] = (logits, [p.grad for p in model.parameters()], error.item())
    for ours, theirs in zip(results["fast"][:2], results["own"][:2]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results["fast"][2] < 0.8 * results["own"][2]  # the residual stream is float32


def test_class_token_reaches_the_output_only_through_attention():
    torch.manual_seed(0)
    model = random_model().eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    assert not torch.allclose(changed_class_token(model)(images), before)
    for block in model.trunk.transformer.resblocks:
        nn.init.zeros_(block.attn.out_proj.weight)  # no token sees another one any more
    assert torch.equal(changed_class_token(model)(images), model(images))


def changed_class_token(model):
    changed = copy.deepcopy(model)
    nn.init.normal_(changed.trunk.class_embedding)
    return changed


def test_head_starts_near_zero():
    model = ftclip.build_model(TINY, 1000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert model.head.bias.abs().max() <= 1e-3 / math.sqrt(64)
    assert model.norm.eps == 1e-5


@pytest.fixture(scope="session")
def clip_weights() -> dict:
    """A whole tiny CLIP's state dict, named as OpenAI and open_clip do: both towers and the logit scale."""
    import open_clip

    torch.manual_seed(1)
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    return open_clip.CLIP(**TINY, text_cfg=text, quick_gelu=True).state_dict()


class Archive(nn.Module):
    """What torch.jit.save needs to write weights under OpenAI's names, in half precision as OpenAI did."""

    def __init__(self, weights: dict):
        super().__init__()
        for name, value in weights.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, value.half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_every_form_of_weights_file_gives_the_same_features(clip_weights, tmp_path):
    import safetensors.torch

    half = {name: value.half() for name, value in clip_weights.items()}
    torch.save(half, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in half.items()}, "epoch": 3}, tmp_path / "ddp.pt")
    torch.save({k[7:]: v for k, v in half.items() if k.startswith("visual.")}, tmp_path / "tower.pt")
    safetensors.torch.save_file({k: v.contiguous() for k, v in half.items()}, tmp_path / "file.safetensors")
    torch.jit.save(torch.jit.script(Archive(clip_weights)), tmp_path / "openai.pt")
    images, outputs = torch.randn(2, 3, 32, 32), {}
    for path in sorted(tmp_path.iterdir()):
        quick_gelu = None if path.name == "openai.pt" else True  # OpenAI's archive says it by itself
        model = ftclip.build_model(TINY, 5, pretrained=str(path), quick_gelu=quick_gelu).eval()
        assert model.config["quick_gelu"] and next(model.parameters()).dtype == torch.float32
        outputs[path.name] = model.trunk(images)
    assert len(outputs) == 5
    assert all(torch.equal(output, outputs["plain.pt"]) for output in outputs.values())


def test_openai_tag_goes_through_the_hub_cache_with_quickgelu(tmp_path, monkeypatch):
    import open_clip
    import safetensors.torch

    text = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    config = open_clip.get_model_config("ViT-B-32") | {"text_cfg": text}
    weights = {
        k: v.half() for k, v in open_clip.CLIP(**config).state_dict().items() if k.startswith("visual.")
    }
    cache = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots" / ("0" * 40)).mkdir(parents=True)
    safetensors.torch.save_file(weights, cache / "snapshots" / ("0" * 40) / "open_clip_model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = ftclip.build_model("ViT-B-32", 3, pretrained="openai")
    assert isinstance(model.trunk.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert torch.equal(model.trunk.conv1.weight, weights["visual.conv1.weight"].float())
    assert not any("text" in name or "token_embedding" in name for name, _ in model.named_parameters())


def test_positions_are_resized_bicubic_without_antialias(clip_weights, tmp_path):
    torch.save(clip_weights, tmp_path / "clip.pt")
    old = clip_weights["visual.positional_embedding"]  # (17, 64)
    for size, grid in ((48, 6), (24, 3)):  # antialias would differ in both directions
        how = {"pretrained": str(tmp_path / "clip.pt"), "quick_gelu": True}
        model = ftclip.build_model(TINY, 5, image_size=size, **how)
        new = model.trunk.positional_embedding
        square = old[1:].reshape(4, 4, 64).permute(2, 0, 1)[None]
        square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False, antialias=False)
        torch.testing.assert_close(new[1:].reshape(grid, grid, 64), square[0].permute(1, 2, 0))
        assert torch.equal(new[0], old[0])
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)


def test_partial_fine_tuning_trains_the_last_blocks_norm_and_head():
    head = {"norm.weight", "norm.bias", "head.weight", "head.bias"}

    def trained(**how):
        model = ftclip.build_model(TINY, 5, **how)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained(train_blocks=0) == head
    one = trained(train_blocks=1)
    assert len(one) == 4 + 12 and all(
        name.startswith("trunk.transformer.resblocks.2.") for name in one - head
    )
    everything = trained()
    assert trained(train_blocks=3) == everything
    assert everything - trained(freeze_patch_embed=True) == {"trunk.conv1.weight"}


def test_drop_path_drops_each_branch_of_a_sample_at_its_blocks_rate():
    torch.manual_seed(0)
    model = random_model(drop_path=0.5).train()  # rates 0, 0.25, 0.5 in the three blocks
    for block, rate in zip(model.trunk.transformer.resblocks, (0, 0.25, 0.5)):
        ends = {"c_proj": block.mlp.c_proj, "out_proj": block.attn.out_proj}
        for off, on in (("c_proj", "out_proj"), ("out_proj", "c_proj")):  # one is 0, the other constant
            for name, value in ((off, 0.0), (on, 1.0)):
                nn.init.zeros_(ends[name].weight)
                nn.init.constant_(ends[name].bias, value)
            out = block.train()(torch.zeros(20_000, 1, 64))[:, 0]
            whole, kept = block.eval()(torch.zeros(1, 1, 64))[0], (out != 0).all(1)
            assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.02)
            assert torch.allclose(out[kept], whole / (1 - rate)) and not out[~kept].any()
    model = random_model(drop_path=0.5)
    assert model.state_dict().keys() == random_model().state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), model(images))


# ---------------------------------------------------------------------------------------------- optimization


@pytest.mark.parametrize(("name", "decay", "blocks"), [("ViT-B-16", 0.6, 12), ("ViT-L-14", 0.65, 24)])
def test_every_parameter_is_in_one_group_with_its_scale_and_decay(name, decay, blocks):
    with torch.device("meta"):
        model = ftclip.build_model(name, 1000, freeze_patch_embed=True)
    groups = ftclip.param_groups(model, ftclip.layer_id, 1.0, decay, 0.05)
    place = {n: group for group in groups for n in group["names"]}
    assert sum(len(group["names"]) for group in groups) == len(place)
    assert place.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "trunk.conv1.weight" not in place
    for n, parameter in model.named_parameters():
        if n in place:
            block = re.search(r"resblocks\.(\d+)\.", n)
            depth = int(block[1]) + 1 if block else 0 if n.startswith("trunk.") else blocks + 1
            assert place[n]["lr_scale"] == place[n]["lr"] == decay ** (blocks + 1 - depth)
            exempt = parameter.ndim == 1 or n.endswith(("class_embedding", "positional_embedding", "bias"))
            assert place[n]["weight_decay"] == (0.0 if exempt else 0.05)


def test_a_step_of_adamw_moves_each_group_by_its_own_lr():
    model = random_model()
    groups = ftclip.param_groups(model, ftclip.layer_id, 1e-3, 0.5, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # Adam's first step is then lr in each coordinate
    optimizer.step()
    for n, parameter in model.named_parameters():
        moved = (before[n] - parameter.detach()).abs().mean().item()
        assert moved == pytest.approx(1e-3 * 0.5 ** (4 - min(4, ftclip.layer_id(n))), rel=1e-3)


def test_layers_that_do_not_fit_the_model_are_refused():
    """The traps that strangers fell into: a timm trunk in layer 0, too many or too few layers."""
    model = nn.ModuleDict({"trunk": nn.ModuleDict({"blocks": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="trunk.blocks.weight belongs to no layer"):
        ftclip.param_groups(model, ftclip.layer_id, 1.0, 0.5, 0.05)
    for layers in ((0, 0, math.inf), (0, 2, math.inf), (1, 2, math.inf), (0, 1, 2)):
        depth = {f"{i}.weight": layer for i, layer in enumerate(layers)}
        with pytest.raises(ValueError, match="layer_id finds"):
            ftclip.param_groups(
                nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in layers), depth.get, 1.0, 0.5, 0.05
            )


def test_a_timm_vit_gets_the_same_scales_and_no_decay_of_its_tokens():
    def layer_id(name: str) -> float:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return math.inf if name.startswith(("norm.", "head.")) else 0

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, reg_tokens=2)
    groups = ftclip.param_groups(vit, layer_id, 1.0, 0.5, 0.05)
    place = {name: group for group in groups for name in group["names"]}
    assert place.keys() == dict(vit.named_parameters()).keys()
    assert {place[name]["weight_decay"] for name in ("cls_token", "reg_token", "pos_embed")} == {0}
    assert (
        place["blocks.3.attn.qkv.weight"]["lr"] == 0.5**9
        and place["blocks.3.attn.qkv.weight"]["weight_decay"]
    )


def test_lr_stays_within_its_bounds():
    assert ftclip.lr_at(12, 10, 2, 1.0, 0.1) == ftclip.lr_at(10, 10, 2, 1.0, 0.1) == pytest.approx(0.1)
    assert max(ftclip.lr_at(step, 10, 2.5, 1.0, 0.0) for step in range(10)) == 1.0
    assert [ftclip.lr_at(step, 3, 9, 0.8, 0.1) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.1, 0.1])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_an_ema_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="EMA decay"):
        ftclip.EMA(nn.Linear(1, 1), decay)


def test_ema_equals_its_closed_form():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema, decay = ftclip.EMA(model, 0.9), 0.9
    history = [model.weight.detach().clone().double()]
    for _ in range(40):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model)
        history.append(model.weight.detach().clone().double())
    closed = decay**40 * history[0]
    closed += sum((1 - decay) * decay ** (40 - i) * history[i] for i in range(1, 41))
    torch.testing.assert_close(ema.module.weight.double(), closed, rtol=1e-5, atol=1e-5)
    assert not ema.module.weight.requires_grad and not ema.module.training


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


PAPER = ftclip.COMMON
PAPER_OPS = [PAPER[f"randaug{key}"] for key in ("", "_std", "_ops", "_probability")]
PAPER_OPS.append(tuple(round(255 * mean) for mean in ftclip.CLIP_MEAN))
PAPER_RANDAUGMENT = ftclip.RandAugment(*PAPER_OPS)
BOXES = [PAPER[key] for key in ("random_erasing", "erasing_area", "erasing_aspect")]
PAPER_ERASING = ftclip.RandomErasing(*BOXES)
ASPECT = PAPER["crop_aspect"]


def tensor(image):
    """uint8 (3, H, W) of a Pillow image."""
    return v2.functional.pil_to_tensor(image)


def same_picture(ours, theirs):
    """Whether greys (0 to 255) agree within 1, and of 1,000 values at most one within 2.

    Both resize along one side, round, resize along the other, and round: in another precision, and since
    Pillow 13 (for some sizes) in another order. That is 1, and in some of a million values 2.
    """
    difference = (ours.double() - theirs).abs()
    return difference.max() < 2.01 and (difference > 1.01).double().mean() < 1e-3


def timm_train(size):
    """timm's training transform, as official datasets.py:57-69 calls it."""
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
    return timm.data.create_transform(
        size, is_training=True, color_jitter=None, interpolation="bicubic", **augment, **CLIP
    )


def timm_randaugment():
    (found,) = (t for t in timm_train(224).transforms if isinstance(t, timm.data.auto_augment.RandAugment))
    return found


def assert_fits(observed, expected):
    """Chi-square: the observed cells come as often as expected (cell: probability), within 5 deviations."""
    counts = collections.Counter(observed)
    assert counts.keys() <= expected.keys()
    total, free = counts.total(), len(expected) - 1
    chi2 = sum((counts[cell] - total * share) ** 2 / (total * share) for cell, share in expected.items())
    assert abs(chi2 - free) < 5 * math.sqrt(2 * free)  # too good a fit is not chance either


# ---------------------------------------------------------------------------------------------- augmentation


def test_randaugment_defaults_are_timms():
    ours, theirs = PAPER_RANDAUGMENT, timm_randaugment()
    names = [op.name.removesuffix("Increasing").removesuffix("Rel") for op in theirs.ops]
    assert list(ours.OPS) == names
    assert ours.num_ops == theirs.num_layers and theirs.choice_weights is None  # with replacement
    for op in theirs.ops:
        assert (op.magnitude, op.magnitude_std, op.prob) == (ours.magnitude, ours.std, ours.probability)
        assert op.magnitude_max is None  # timm then clips at 10
        assert op.kwargs == {"fillcolor": ours.fill, "resample": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("index", range(15), ids=list(ftclip.RandAugment.OPS))
def test_randaugment_op_equals_timms_in_every_pixel(index, monkeypatch):
    name, theirs = list(ftclip.RandAugment.OPS)[index], timm_randaugment().ops[index]
    theirs.prob, theirs.magnitude_std = 1.0, 0.0
    magnitudes = {i / 10 for i in range(101)}
    steps = {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110}.get(name, 0)
    for i in range(steps + 1):  # where int() jumps, and the floats beside it
        here = 10 * i / max(steps, 1)
        magnitudes |= {here, math.nextafter(here, 0), min(10.0, math.nextafter(here, 11))}
    bright = photo(61, 40)
    dull = photo(40, 61, seed=1).point(lambda value: 30 + value // 2)  # so that there is contrast to add
    for sign in (-1, 1):
        monkeypatch.setattr(timm.data.auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        for theirs.magnitude in magnitudes:
            for image in (bright, dull):
                result = PAPER_RANDAUGMENT.OPS[name](PAPER_RANDAUGMENT, image, theirs.magnitude / 10, sign)
                if name == "Posterize" and theirs.magnitude == 10:
                    # 0 bits: black, for which timm asks Pillow, but Pillow 13 raises.
                    assert not np.asarray(result).any() and result.mode == "RGB" and result.size == image.size
                else:
                    assert result == theirs(image), (theirs.magnitude, sign)


def test_randaugment_draws_ops_magnitudes_and_signs_as_specified():
    class Recorder(ftclip.RandAugment):  # its "image" is what has been applied to it
        OPS = {  # noqa: RUF012
            op: lambda self, image, m, sign, op=op: (*image, (op, 10 * m, sign))
            for op in ftclip.RandAugment.OPS
        }

    rng, ops = random.Random(0), list(ftclip.RandAugment.OPS)
    images = [Recorder(*PAPER_OPS)((), rng) for _ in range(60_000)]
    assert_fits(map(len, images), {0: 0.25, 1: 0.5, 2: 0.25})

    # Tenths of N(9, 0.5), the last of them cut at 10. All cells together show independence as well.
    normal = statistics.NormalDist(9, 0.5)
    edges = [*(normal.inv_cdf(i / 10) for i in range(1, 10)), 10]
    shares = np.diff([0, *map(normal.cdf, edges), 1])

    def cell(op, magnitude, sign):
        assert 0 <= magnitude <= 10
        return op, sign, sum(magnitude >= edge for edge in edges)

    cells = {(op, sign, i): p / 30 for op in ops for sign in (-1, 1) for i, p in enumerate(shares)}
    assert_fits((cell(*applied) for image in images for applied in image), cells)

    # Two on one image: independent in op (so also twice the same), in sign, and in magnitude.
    pairs = [image for image in images if len(image) == 2]
    assert_fits(((a[0], b[0]) for a, b in pairs), {(a, b): 1 / 225 for a in ops for b in ops})
    quarter = {(above, sign): 1 / 4 for above in (False, True) for sign in (-1, 1)}
    joint = {(a, b): quarter[a] * quarter[b] for a in quarter for b in quarter}
    assert_fits((((a[1] > 9, a[2]), (b[1] > 9, b[2])) for a, b in pairs), joint)

    weak = [m for _ in range(1000) for _, m, _ in Recorder(0.1, *PAPER_OPS[1:])((), rng)]
    assert min(weak) == 0  # cut below as well


@pytest.mark.parametrize("height, width", [(64, 64), (40, 90), (200, 4)])  # in the last, ten tries may fail
def test_random_erasing_draws_timms_boxes(height, width):
    # Both take the same numbers in the same order, so the boxes can be compared one by one.
    ours, theirs = PAPER_ERASING, RandomErasing(probability=0.25, mode="pixel", device="cpu")
    for seed in range(3000):
        random.seed(seed)
        rows, columns = theirs(torch.zeros(1, height, width))[0].nonzero(as_tuple=True)
        box = (0, 0, 0, 0)
        if len(rows):
            top, left = rows.min().item(), columns.min().item()
            box = top, left, rows.max().item() + 1 - top, columns.max().item() + 1 - left
        assert ours.sample(height, width, random.Random(seed)) == box


@pytest.mark.parametrize("given", [True, False])
def test_random_erasing_fills_boxes_with_independent_normal_noise(given):
    torch.manual_seed(0)
    random.seed(0)
    images = torch.full((400, 3, 48, 40), 7.0)
    erasing = PAPER_ERASING
    boxes = [erasing.sample(48, 40) for _ in images] if given else None
    assert erasing(images, boxes) is images
    noise, neighbours, channels = [], [], []
    erased = 0
    for i, image in enumerate(images):
        changed = (image != 7).any(0)
        if changed.any():
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            inside = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (inside != 7).all()  # one whole box, in all channels
            noise.append(inside.flatten())
            neighbours += [(inside[..., 1:] * inside[..., :-1]).flatten()]
            neighbours += [(inside[:, 1:] * inside[:, :-1]).flatten()]
            channels.append((inside * inside.roll(1, 0)).flatten())
            erased += 1
            box = (rows.min(), columns.min(), *inside.shape[1:])
        else:
            box = (0, 0, 0, 0)
        assert not given or box == boxes[i]
    assert abs(erased / 400 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)
    tenths = torch.tensor([statistics.NormalDist().inv_cdf(i / 10) for i in range(1, 10)])
    assert_fits(torch.bucketize(torch.cat(noise), tenths).tolist(), dict.fromkeys(range(10), 0.1))
    for products in map(torch.cat, (neighbours, channels)):  # of independent values: mean 0, variance 1
        assert abs(products.mean()) < 5 / math.sqrt(len(products))


@pytest.mark.parametrize("scale", [0.08, 0.5])
@pytest.mark.parametrize("size", [(120, 90), (90, 120), (24, 24), (200, 20), (15, 200)])
def test_train_crop_is_timms_and_mirrored_half_the_time(size, scale):
    # Both take the same numbers in the same order, so the crops can be compared one by one. In the two long
    # images, ten tries may fail.
    image, theirs = photo(*size), RandomResizedCropAndInterpolation(48, (scale, 1), interpolation="bicubic")
    flips = 0
    for seed in range(400):
        random.seed(seed)
        expected = tensor(theirs(image))
        ours = ftclip.train_transform(tensor(image), random.Random(seed), 48, scale, ASPECT)
        assert ours.dtype == torch.uint8 and ours.shape == (3, 48, 48)
        flipped = same_picture(ours.flip(-1), expected)
        assert flipped != same_picture(ours, expected), seed
        flips += flipped
    assert abs(flips / 400 - 0.5) < 5 * math.sqrt(0.25 / 400)


@pytest.mark.parametrize("image_size", [224, 63])
@pytest.mark.parametrize("size", [(300, 225), (225, 301), (224, 224), (63, 64), (40, 50), (500, 71)])
def test_eval_image_is_timms(size, image_size):
    theirs = timm.data.create_transform(image_size, crop_pct=1.0, interpolation="bicubic", **CLIP)
    image, grey = photo(*size), 1 / 255 / torch.tensor(CLIP["std"]).view(3, 1, 1)  # in normalised units
    for given in (tensor(image), image, image.convert("L"), image.convert("P")):
        expected = theirs(given.convert("RGB") if isinstance(given, Image.Image) else image)
        ours = ftclip.eval_transform(given, image_size, **CLIP)
        assert ours.shape == (3, image_size, image_size) and ours.dtype == torch.float32
        assert same_picture(ours / grey, expected / grey)


def test_augmentation_takes_all_chance_from_rng():
    image, augment = tensor(photo(60, 50)), PAPER_RANDAUGMENT
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()
    for seed in range(50):
        first, second = (
            (
                ftclip.train_transform(image, rng, 32, 0.08, ASPECT, augment),
                PAPER_ERASING.sample(32, 32, rng),
            )
            for rng in (random.Random(seed), random.Random(seed))
        )
        assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_equal(np.random.get_state(), states[2])


def test_training_images_have_timms_statistics(monkeypatch):
    def posterize(image, bits, **_):  # timm's own crashes with Pillow 13 at 0 bits
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)

    monkeypatch.setitem(timm.data.auto_augment.NAME_TO_OP, "PosterizeIncreasing", posterize)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    image, rng, draws = photo(140, 100, seed=5), random.Random(0), 10_000
    theirs, augment, erasing = timm_train(32), PAPER_RANDAUGMENT, PAPER_ERASING

    def statistic(images):
        """(N, 21): of each image the light in each quarter, and the mean, square and edges of each colour."""
        edges = images.diff(dim=-1).abs().mean((2, 3))
        quarters = F.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.cat([quarters, images.mean((2, 3)), images.square().mean((2, 3)), edges], 1)

    ours = [ftclip.train_transform(tensor(image), rng, 32, 0.08, ASPECT, augment) for _ in range(draws)]
    ours = statistic(erasing(ftclip.normalize(torch.stack(ours), ftclip.CLIP_MEAN, ftclip.CLIP_STD)))
    theirs = statistic(torch.stack([theirs(image) for _ in range(draws)]))
    for power in (1, 2):  # means, then spread between images
        x, y = ours**power, theirs**power
        error = ((x.var(0) + y.var(0)) / draws).sqrt()
        assert ((x.mean(0) - y.mean(0)) / error).abs().max() < 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mix", [None, v2.MixUp, v2.CutMix])
def test_train_step_minimizes_timms_loss(mix, smoothing):
    torch.manual_seed(0)
    num_classes, images = 7, torch.randn(6, 3, 8, 8)
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
        # timm's partner is the one at the same place from the end.
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


# ---------------------------------------------------------------------------------------------- data


def test_read_image_makes_rgb_of_every_kind_as_pillow_does(tmp_path, monkeypatch):
    picture = photo(50, 41)
    picture.save(tmp_path / "plain.jpg", quality=90)
    for mode, name in (
        ("L", "l.jpg"),
        ("CMYK", "cmyk.jpg"),
        ("P", "p.png"),
        ("RGBA", "rgba.png"),
        ("LA", "la.png"),
    ):
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
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1, path
    deep = np.arange(41 * 50, dtype=np.uint16).reshape(41, 50) * 31
    Image.fromarray(deep).save(tmp_path / "deep.png")  # 16 bits, of which the upper eight stay
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    for _ in range(2):
        for name in ("deep.png", "deep.tif"):
            image = ftclip.read_image(tmp_path / name)
            assert image.shape == (3, 41, 50) and np.array_equal(image[1].numpy(), deep >> 8)
        monkeypatch.delattr(ftclip.torchvision.io, "decode_image", raising=False)  # as announced


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "bit"])
def test_a_broken_image_is_named(damage, kind, tmp_path):
    photo(200, 200).save(tmp_path / "x.jpg", kind)
    whole = bytearray((tmp_path / "x.jpg").read_bytes())
    if damage == "bit":  # torchvision 0.29.2 crashes at such a PNG; in a JPEG, the header makes it visible
        whole[len(whole) // 2 if kind == "PNG" else 2] ^= 16
    damaged = {"empty": b"", "text": b"no image", "half": whole[: len(whole) // 2], "bit": whole}
    (tmp_path / "x.jpg").write_bytes(damaged[damage])
    with pytest.raises(ValueError, match="x.jpg"):
        ftclip.read_image(tmp_path / "x.jpg")


def test_what_a_decoder_says_is_a_wall_too(tmp_path):
    photo(200, 200).save(tmp_path / "blank.avif")
    head, mark, content = (tmp_path / "blank.avif").read_bytes().partition(b"mdat")
    (tmp_path / "blank.avif").write_bytes(head + mark + bytes(len(content)))  # a RuntimeError of Pillow's
    with pytest.raises(ValueError, match="cannot read image .*blank.avif"):
        ftclip.read_image(tmp_path / "blank.avif")


def test_images_are_told_by_their_names(data, tmp_path):
    shutil.copytree(data / "train" / "ant", tmp_path / "ant")
    photo(9, 9).save(tmp_path / "ant" / "more.GIF")
    (tmp_path / "ant" / "list.txt").write_text("no image")
    assert len(ftclip.FolderDataset(str(tmp_path), ftclip.read_image, ftclip.eval_transform)) == 17


def keys_of(world, micro, start=0, stop=6):
    """All keys of a run in the order of steps, put together from its processes."""
    ranks = [
        list(ftclip.MicroBatches(23, 8, micro, range(start, stop), 0, rank, world)) for rank in range(world)
    ]
    per_step = 8 // (micro * world)
    steps = range(stop - start)
    return [
        key for i in steps for rank in ranks for b in rank[i * per_step : (i + 1) * per_step] for key in b
    ]


def test_sample_order_is_the_same_in_every_layout_and_from_every_restart():
    reference = keys_of(1, 8)
    assert len(reference) == 48 and [epoch for epoch, _ in reference] == [0] * 16 + [1] * 16 + [2] * 16
    first, second = ([index for epoch, index in reference if epoch == e] for e in (0, 1))
    assert len(set(first)) == 16 and set(first) <= set(range(23)) and first != second
    for world, micro in ((1, 2), (2, 2), (2, 4), (4, 1)):
        assert keys_of(world, micro) == reference
    assert keys_of(2, 2, start=3) == reference[24:]
    assert len(ftclip.MicroBatches(23, 8, 2, range(6), world=2)) == 12
    for wrong in ((23, 8, 3, 1), (23, 8, 2, 3), (7, 8, 2, 1)):
        with pytest.raises(ValueError, match="global batch of 8 is not"):
            ftclip.MicroBatches(*wrong[:3], range(6), world=wrong[3])


def test_a_sample_depends_on_seed_epoch_and_index_alone(data):
    def sample(key, seed=0):
        random.seed(random.SystemRandom().random())  # whatever the state of the process
        crop = lambda image, rng: ftclip.train_transform(image, rng, 32, 0.3, ASPECT, PAPER_RANDAUGMENT)
        return ftclip.FolderDataset(str(data / "train"), ftclip.read_image, crop, PAPER_ERASING.sample, seed)[
            key
        ]

    augment = functools.partial(ftclip.train_transform, image_size=32, crop_scale=0.3, crop_aspect=ASPECT)
    folder, box = str(data / "train"), PAPER_ERASING.sample
    dataset = ftclip.FolderDataset(
        folder, ftclip.read_image, functools.partial(augment, augment=PAPER_RANDAUGMENT), box
    )
    assert same(
        pickle.loads(pickle.dumps(dataset))[2, 7], sample((2, 7))
    )  # as workers that are not forked need it
    assert same(sample((2, 7)), sample((2, 7)))
    assert not same(sample((2, 7))[0], sample((3, 7))[0])
    assert not same(sample((2, 7))[0], sample((2, 7), seed=1)[0])


# ---------------------------------------------------------------------------------------------- engine


def test_evaluate_counts_every_image_once():
    torch.manual_seed(0)
    images, labels = torch.randn(37, 3, 4, 4), torch.randint(0, 8, (37,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    result = ftclip.evaluate({"a": model}, zip(images.split(10), labels.split(10)))
    ranks = (model(images).argsort(1, descending=True) == labels[:, None]).int().argmax(1)
    assert result["images"] == 37 and result["a_correct"] == (ranks == 0).sum()
    assert result["a_top1"] == pytest.approx(100 * (ranks == 0).float().mean().item())
    assert result["a_top5"] == pytest.approx(100 * (ranks < 5).float().mean().item())


def test_accumulated_micro_batches_equal_one_batch():
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 32, 32), torch.randint(0, 5, (12,))
    one = random_model()
    four = copy.deepcopy(one)
    losses = []
    for model, parts in ((one, 1), (four, 4)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = zip(images.chunk(parts), labels.chunk(parts))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses.append(ftclip.train_step(model, batches, parts, optimizer, scaler, clip_grad=1.0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for a, b in zip(one.parameters(), four.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_train_step_refuses_what_would_train_something_else():
    model, batch = nn.Linear(2, 2).eval(), (torch.ones(1, 2), torch.tensor([0]))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for batches in (iter([]), iter([batch])):
        with pytest.raises(ValueError, match="micro_batches ended after"):
            ftclip.train_step(model, batches, 2, optimizer, scaler)
    with pytest.raises(TypeError):  # a DataLoader would start again at each step
        ftclip.train_step(model, [batch, batch], 2, optimizer, scaler)
    assert same(model.state_dict(), before) and model.training


def test_what_was_saved_can_be_loaded(tmp_path):
    ftclip.save_checkpoint(tmp_path / "x.pt", {"anything": torch.ones(3)})
    state = ftclip.load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(state["anything"], torch.ones(3))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # read, not mapped


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "last.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"format": "ftclip 2", "x": Hostile()}, tmp_path / "best.pt")
    for name in ("last.pt", "best.pt"):
        with pytest.raises(ValueError, match=name):
            ftclip.load_checkpoint(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            ftclip.load_weights("ViT-B-16", str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    ftclip.save_checkpoint(tmp_path / "last.pt", {"format": "ftclip 2", "step": 1})
    with pytest.raises(AttributeError):  # halfway through the write
        ftclip.save_checkpoint(tmp_path / "last.pt", {"a": torch.zeros(9), "b": lambda: 0})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert ftclip.load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_images_of_any_shape_go_through_both_transforms():
    for width, height in ((1, 1), (20_000, 3), (3, 20_000)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        assert ftclip.train_transform(image, random.Random(0), 32, 0.08, ASPECT).shape == (3, 32, 32)
        assert ftclip.eval_transform(image, 32, **CLIP).shape == (3, 32, 32)


def test_a_link_that_closes_a_circle_is_a_wall(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    (tmp_path / "train" / "ant" / "up").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="are one folder"):
        ftclip.FolderDataset(str(tmp_path / "train"), ftclip.read_image, ftclip.eval_transform)


@contextlib.contextmanager
def unprivileged():
    """Root reads and writes everything; this is nobody, in the parts that check permissions."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_folders_that_cannot_be_read_or_written_are_walls(data, tmp_path, monkeypatch):
    shutil.copytree(data / "train", tmp_path / "train")
    (tmp_path / "train" / "ant" / "closed").mkdir(mode=0)
    (tmp_path / "out").mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # what is above it stays closed to others
    with (
        unprivileged(),
        pytest.raises(ValueError, match=r"cannot use train/ant/closed \(Permission denied\): --data"),
    ):
        ftclip.FolderDataset("train", ftclip.read_image, ftclip.eval_transform)
    for path in ("out/last.pt", "out/run/last.pt"):
        with unprivileged(), pytest.raises(ValueError, match=rf"cannot write {path} \(.*Permission denied"):
            ftclip.save_checkpoint(path, {})


def test_a_full_disk_is_a_wall_and_spares_the_old_file(tmp_path):
    ftclip.save_checkpoint(tmp_path / "last.pt", {"format": "ftclip 2", "step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*last.pt .*: make room"):
            ftclip.save_checkpoint(tmp_path / "last.pt", {"format": "ftclip 2", "x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ftclip.load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_truncated_checkpoint_is_a_wall(tmp_path):
    ftclip.save_checkpoint(tmp_path / "last.pt", {"format": "ftclip 2", "x": torch.zeros(1000)})
    whole = (tmp_path / "last.pt").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "last.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot read checkpoint"):
            ftclip.load_checkpoint(tmp_path / "last.pt")
    middle = whole.index(bytes(1000)) + 500  # among the numbers, whose checksum the archive has
    (tmp_path / "last.pt").write_bytes(whole[:middle] + b"\1" + whole[middle + 1 :])
    with pytest.raises(ValueError, match="cannot read checkpoint .* is damaged"):
        ftclip.load_checkpoint(tmp_path / "last.pt")


def test_a_flipped_bit_in_a_checkpoint_never_gives_other_contents(tmp_path):
    path, state = (
        tmp_path / "last.pt",
        {"format": "ftclip 2", "x": torch.zeros(9), "history": [{"top1": 5.0}]},
    )
    ftclip.save_checkpoint(path, state)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        try:
            assert same(ftclip.load_checkpoint(path), state)
        except ValueError as error:
            assert type(error) is ValueError and str(path) in str(error)


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def reference(tiny, data, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("reference") / "run"
    ftclip.main(flags(tiny, data, output))
    return output


def test_a_run_leaves_what_readme_says(reference, data):
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["lr"] == 1e-3 and [line["epoch"] for line in lines[1:]] == [1, 2, 3]
    assert all(
        {"train_loss", "raw_top1", "raw_top5", "ema_top1", "ema_top5"} <= line.keys() for line in lines[1:]
    )
    files = {"last.pt", "best.pt", "metrics.jsonl"} | ({"curves.png"} if find_spec("matplotlib") else set())
    assert {path.name for path in reference.iterdir()} == files
    model, classes, transform = ftclip.load_classifier(reference / "best.pt")
    transform = pickle.loads(pickle.dumps(transform))  # as a dataset that holds it must be
    assert classes == CLASSES and not model.training
    path = next((data / "val" / CLASSES[1]).iterdir())
    with Image.open(path) as file:
        from_pillow = transform(file)
    image = transform(ftclip.read_image(path))
    assert torch.equal(image, from_pillow) and image.shape == (3, 32, 32)
    assert torch.equal(image, ftclip.eval_transform(ftclip.read_image(path), 32, **CLIP))
    assert model(image[None]).shape == (1, 3)
    best = max(line["ema_top1"] for line in lines[1:])
    assert ftclip.load_checkpoint(reference / "best.pt")["record"]["ema_top1"] == best


def test_a_run_that_goes_on_needs_no_weights_file(tiny, data, tmp_path, capsys):
    torch.save(ftclip.build_model(TINY, 3).trunk.state_dict(), tmp_path / "weights.pt")
    argv = flags(tiny, data, tmp_path / "run", "--epochs", 1, "--warmup-epochs", 0)
    argv += ["--pretrained", str(tmp_path / "weights.pt"), "--no-quick-gelu"]
    assert ftclip.main(argv) == 0
    (tmp_path / "weights.pt").unlink()
    assert ftclip.main(argv) == 0 and "resumed from" in capsys.readouterr().out


def test_curves_show_every_epoch_and_without_matplotlib_a_line_says_how(
    tiny, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    monkeypatch.setattr(ftclip.importlib.util, "find_spec", lambda name: None)
    ftclip.main(flags(tiny, data, tmp_path / "without"))
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    panels = np.array([mock.Mock() for _ in range(3)])
    figure = mock.Mock(return_value=mock.Mock(subplots=lambda *_: panels))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", mock.Mock(Figure=figure))
    ftclip.main(flags(tiny, data, tmp_path / "with"))
    history = outcome(tmp_path / "with")["metrics"]
    for panel, keys in zip(panels, (["train_loss"], ["raw_top1", "ema_top1"], ["lr"])):
        last = panel.plot.call_args_list[-len(keys) :]  # drawn anew each epoch
        assert [call.args[:2] for call in last] == [
            (range(1, 4), [line[key] for line in history]) for key in keys
        ]
    assert history[0]["lr"] == 1e-3 and history[-1]["lr"] == ftclip.lr_at(
        8, 9, 3, 1e-3, 1e-6 * (16 / 2048) ** 0.5
    )
    assert figure().savefig.call_count == 3


def test_preview_is_what_the_model_gets(tiny, data, tmp_path, monkeypatch):
    seen, step = [], ftclip.train_step
    monkeypatch.setattr(ftclip, "train_step", lambda model, batches, *a: step(model, spy(batches), *a))

    def spy(batches):
        for images, labels in batches:
            seen.extend(zip(images.clone(), labels))
            yield images, labels

    off = ["--randaug", "9", "--random-erasing", "0.5"]
    assert ftclip.main(flags(tiny, data, tmp_path / "run", *off, "--preview", str(tmp_path / "sheet"))) == 0
    assert not (tmp_path / "run").exists()
    ftclip.main(flags(tiny, data, tmp_path / "run", *off))
    sheet = tensor(Image.open(tmp_path / "sheet"))
    assert sheet.shape == (3, 3 * (128 + 14 + 2) + 2, 8 * (128 + 2) + 2)
    for i, (image, _) in enumerate(seen[:24]):
        top, left = 2 + i // 8 * (128 + 14 + 2), 2 + i % 8 * (128 + 2)
        tile = sheet[:, top : top + 128 : 4, left : left + 128 : 4]  # each pixel is four wide and high
        mean, std = (torch.tensor(CLIP[key]).view(3, 1, 1) for key in ("mean", "std"))
        assert (tile - 255 * (image * std + mean).clamp(0, 1)).abs().max() < 1.01


def test_best_pt_is_the_best_ema_epoch_and_the_first_step_is_saved(tiny, data, tmp_path, monkeypatch):
    scores, first = iter([20.0, 40.0, 30.0]), []

    def scored(models, batches, *_):
        assert list(models) == ["raw", "ema"]
        assert max(len(labels) for _, labels in batches) == 4  # what fits in training fits here
        return {"raw_top1": 99.0, "ema_top1": next(scores), "images": 13}

    step = ftclip.train_step
    monkeypatch.setattr(ftclip, "evaluate", scored)
    monkeypatch.setattr(
        ftclip,
        "train_step",
        lambda *args: first.append((tmp_path / "run" / "last.pt").exists()) or step(*args),
    )
    ftclip.main(flags(tiny, data, tmp_path / "run"))
    assert first == [False] + [True] * 8
    best, last = (ftclip.load_checkpoint(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert best["record"]["epoch"] == 2 and not same(best["model"], last["ema"])
    assert [record["ema_top1"] for record in last["history"]] == [20.0, 40.0, 30.0]


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_run_goes_on_from_last_pt_bit_for_bit(stop, reference, tiny, data, tmp_path, monkeypatch):
    step, seen = ftclip.train_step, []

    def stopping(*args):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(1)
        return step(*args)

    argv = flags(tiny, data, tmp_path / "run", "--save-every", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ftclip, "train_step", stopping)
        ftclip.main(argv)
    ftclip.main([*argv, "--workers", "2"])
    assert same(outcome(tmp_path / "run"), outcome(reference))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_step_and_saves(number, reference, tiny, data, tmp_path, monkeypatch, capsys):
    step, seen = ftclip.train_step, []
    signal.signal(number, signal.SIG_DFL)  # a shell may have started us with SIGINT ignored

    def interrupted(*args):
        seen.append(1)
        if len(seen) % 2 == 0:  # in the second step of a start, which is not saved for another reason
            for _ in range(2):  # a torchrun that is told to stop tells its processes again
                os.kill(os.getpid(), number)
        return step(*args)

    argv = flags(tiny, data, tmp_path / "run")
    for i in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(ftclip, "train_step", interrupted)
            patch.setattr(sys, "argv", ["ftclip.py", *argv])
            assert ftclip.run() == 128 + number
        assert f"stopped by {signal.Signals(number).name}: the same" in capsys.readouterr().out
        assert ftclip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == i
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(reference))


def test_a_run_that_goes_on_does_not_hold_the_old_checkpoint(tiny, data, tmp_path, monkeypatch):
    """A mapped file keeps its room on the disk after it was replaced."""
    step, maps = ftclip.train_step, []

    def stopping(*args):
        maps.append(Path("/proc/self/maps").read_text())
        if len(maps) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(ftclip, "train_step", stopping)
    argv = flags(tiny, data, tmp_path / "run", "--save-every", 2)
    with pytest.raises(KeyboardInterrupt):
        ftclip.main(argv)
    ftclip.main(argv)
    assert len(maps) == 3 + 7 and not any("last.pt" in text for text in maps)


def test_a_signal_that_was_ignored_stays_so(tiny, data, tmp_path, monkeypatch):
    """As under nohup, when the terminal closes."""
    before, step = signal.signal(signal.SIGHUP, signal.SIG_IGN), ftclip.train_step
    monkeypatch.setattr(
        ftclip, "train_step", lambda *args: os.kill(os.getpid(), signal.SIGHUP) or step(*args)
    )
    ftclip.main(flags(tiny, data, tmp_path / "run"))
    signal.signal(signal.SIGHUP, before)


def test_a_signal_within_an_evaluation_leaves_it_for_later(reference, tiny, data, tmp_path, monkeypatch):
    evaluate = ftclip.evaluate
    argv = flags(tiny, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(
            ftclip, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*args)
        )
        patch.setattr(sys, "argv", ["ftclip.py", *argv])
        assert ftclip.run() == 143
    state = ftclip.load_checkpoint(tmp_path / "run" / "last.pt")
    assert (state["step"], state["history"]) == (3, [])
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(reference))


def test_a_signal_to_all_does_not_end_a_worker_from_its_first_moment(tiny, data, tmp_path, monkeypatch):
    """torchrun 2.15 and a terminal signal the whole process group; the step in hand still needs its workers."""

    class Loader(ftclip.DataLoader):
        def __init__(self, *args, **how):
            super().__init__(*args, worker_init_fn=lambda _: os.kill(os.getpid(), signal.SIGTERM), **how)

    monkeypatch.setattr(ftclip, "DataLoader", Loader)
    assert ftclip.main(flags(tiny, data, tmp_path / "run", "--workers", 1)) == 0


def test_a_killed_worker_is_a_wall(tiny, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ftclip, "read_image", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(sys, "argv", ["ftclip.py", *flags(tiny, data, tmp_path / "run"), "--workers", "1"])
    assert ftclip.run() == 2
    assert re.fullmatch(r"ftclip: DataLoader worker .*lower --workers.*\n", capsys.readouterr().err)


def test_a_full_shared_memory_is_a_wall(tiny, data, tmp_path):
    """As in a Docker container, which has 64 MB of it."""
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(f"unshare -m sh -c '{small}'", shell=True, check=False).returncode:
        pytest.skip("no right to make /dev/shm small")
    argv = flags(tiny, data, tmp_path / "run", "--workers", 1, "--micro-batch-size", 16)
    command = shlex.join([sys.executable, SCRIPT, *argv])
    how = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"{small}; {command}"], check=False, **how)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]  # torch 2.6 writes a line of its own before it
    assert re.search("ftclip: .*/dev/shm .*--ipc=host.*--workers", last)


def test_a_stop_during_an_evaluation_loses_nothing(reference, tiny, data, tmp_path, monkeypatch):
    argv = flags(tiny, data, tmp_path / "run")
    for _ in range(3):  # in each of the three evaluations
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ftclip, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            ftclip.main(argv)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ftclip, "train_step", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            ftclip.main(argv)
            raise KeyboardInterrupt  # after the last epoch there is no further step
    assert outcome(tmp_path / "run")["metrics"] == outcome(reference)["metrics"][:1]
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(reference))


@pytest.mark.parametrize(("what", "at"), [("loss", 5), ("norm of the weights", 6)])
def test_what_is_not_finite_stops_before_it_is_saved(what, at, tiny, data, tmp_path, monkeypatch, capsys):
    step, losses = ftclip.train_step, []

    def poisoned(model, *args):
        losses.append(step(model, *args))
        if len(losses) == at and what == "loss":
            return losses[-1] * float("nan")
        if len(losses) == at:  # as after an infinite gradient of a finite loss, in a step that is saved
            torch.nn.init.constant_(model.head.bias, float("nan"))
        return losses[-1]

    monkeypatch.setattr(ftclip, "train_step", poisoned)
    monkeypatch.setattr(sys, "argv", ["ftclip.py", *flags(tiny, data, tmp_path / "run"), "--amp", "bf16"])
    assert ftclip.run() == 2
    sentence = rf"the {what} is nan at step {at}; last.pt, if any, is from before it: resume with --amp none"
    assert re.search(sentence, capsys.readouterr().err)
    assert ftclip.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_a_full_gpu_is_a_sentence_that_names_the_flag(tiny, data, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ftclip, "train_step", full)
    monkeypatch.setattr(sys, "argv", ["ftclip.py", *flags(tiny, data, tmp_path / "run")])
    assert ftclip.run() == 2
    assert re.fullmatch(r"ftclip: the GPU's memory .*--micro-batch-size.*same\n", capsys.readouterr().err)


def processes_of(folder: Path) -> list[int]:
    """All whose command line names the folder: torchrun, its processes, and their loaders' workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # gone meanwhile
                if str(folder) in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
    return found


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def start(*argv, launcher: tuple = (), log: Path | str = os.devnull) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, *launcher, SCRIPT, *map(str, argv)]
    with open(log, "w") as out:
        how = {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, env=environment, **how)


def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_if_it_had_not_been(tiny, data, tmp_path):
    """benchmarks/kill_test.py does this for longer, and with two processes."""
    more = ("--epochs", 28, "--workers", 1, "--save-every", 2, "--eval-every", 2)
    ftclip.main(flags(tiny, data, tmp_path / "undisturbed", *more))
    argv, rng = flags(tiny, data, tmp_path / "run", *more), random.Random(0)
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process, last = start(*argv), tmp_path / "run" / "last.pt"
        before = last.stat().st_mtime if last.exists() else 0
        wait_for(lambda: last.exists() and last.stat().st_mtime > before)  # noqa: B023
        time.sleep(rng.uniform(0, 1))
        os.killpg(process.pid, number)  # the workers too, as Ctrl-C and a scheduler do
        assert process.wait(20) == status
        wait_for(lambda: not processes_of(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") > 28  # it was not over
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_torchrun_restarts_a_run_whose_process_was_killed(tiny, data, tmp_path):
    """With three, as two numbers have the same sum in any order."""
    more = ("--batch-size", 12, "--epochs", 12, "--workers", 1, "--save-every", 2, "--eval-every", 3)
    assert run(*flags(tiny, data, tmp_path / "undisturbed", *more), processes=3).returncode == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "--max-restarts", "1")
    torchrun = start(*flags(tiny, data, tmp_path / "run", *more), launcher=launcher)
    wait_for((tmp_path / "run" / "last.pt").exists)
    ranks = [pid for pid in processes_of(tmp_path / "run") if parent_of(pid) == torchrun.pid]
    os.kill(max(ranks), signal.SIGKILL)
    assert torchrun.wait(120) == 0 and not processes_of(tmp_path / "run")
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_a_signal_to_torchrun_ends_all_processes_with_their_state_saved(tiny, data, tmp_path):
    more = ("--epochs", 12, "--workers", 1)
    ftclip.main(flags(tiny, data, tmp_path / "undisturbed", *more))
    argv, last = flags(tiny, data, tmp_path / "run", *more), tmp_path / "run" / "last.pt"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = start(*argv, launcher=launcher, log=tmp_path / "log")
    wait_for(last.exists)
    time.sleep(0.5)
    run.terminate()
    assert run.wait(20) and not processes_of(tmp_path / "run")
    assert "stopped by SIGTERM: the same command resumes" in (tmp_path / "log").read_text()
    assert ftclip.load_checkpoint(last)["step"] < 36
    ftclip.main(argv)
    assert far(tmp_path / "run", tmp_path / "undisturbed") < 1e-5


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler, which torch.compile needs on a CPU")
def test_a_compiled_run_follows_the_plain_one_and_resumes_bit_for_bit(
    reference, tiny, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    step, seen = ftclip.train_step, []

    def stopping(*args):
        seen.append(1)
        if len(seen) == 9 + 5:  # in the second of three starts
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(ftclip, "train_step", stopping)
    argv = flags(tiny, data, tmp_path / "run", "--compile", "--save-every", 2)
    ftclip.main([*argv, "--output", str(tmp_path / "whole")])
    with pytest.raises(KeyboardInterrupt):
        ftclip.main(argv)
    ftclip.main(argv)
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    assert far(tmp_path / "whole", reference) < 1e-4  # and without a prefix in the weights' names


def test_a_stopped_run_goes_on_with_another_number_of_processes(reference, tiny, data, tmp_path, monkeypatch):
    step, seen = ftclip.train_step, []

    def stopping(*args):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(1)
        return step(*args)

    argv = flags(tiny, data, tmp_path / "run", "--save-every", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ftclip, "train_step", stopping)
        ftclip.main(argv)
    assert run(*argv, processes=2).returncode == 0
    assert far(tmp_path / "run", reference) < 1e-5


def test_two_processes_train_as_one_and_evaluate_every_image(reference, tiny, data, tmp_path, capsys):
    done = run(*flags(tiny, data, tmp_path / "two", "--workers", 2), processes=2)
    assert done.returncode == 0, done.stderr
    assert far(tmp_path / "two", reference) < 1e-5
    losses = [
        [record["train_loss"] for record in outcome(run)["metrics"]] for run in (reference, tmp_path / "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    counts = [
        [(line["images"], line["ema_correct"]) for line in outcome(path)["metrics"]]
        for path in (reference, tmp_path / "two")
    ]
    assert counts[0] == counts[1] and counts[0][0][0] == 13
    evaluation = ["--eval", "--checkpoint", str(tmp_path / "two" / "best.pt"), "--data", str(data)]
    done = run(*evaluation, processes=2)
    ftclip.main([*evaluation, "--device", "cpu"])
    one, two = (re.search(r"\d+ of 13 right.*", text)[0] for text in (capsys.readouterr().out, done.stdout))
    assert one == two


def test_processes_that_see_different_files_are_refused(reference, tiny, data, tmp_path):
    """As without a shared file system: rank 1 sees another last.pt than rank 0."""
    shutil.copytree(reference, tmp_path / "1")
    script = tmp_path / "own_disks.py"
    code = f"import os, sys; sys.path.insert(0, {str(HERE)!r}); import ftclip\n"
    code += f"sys.argv = ['ftclip.py', *{flags(tiny, data, tmp_path)!r}, '--output', {str(tmp_path)!r} + '/' + os.environ['RANK']]\n"
    script.write_text(code + "os._exit(ftclip.run())\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode and "ftclip: not all processes see the same --data and" in done.stderr
    assert not (tmp_path / "0").exists()


def test_layouts_agree(tiny, data, tmp_path):
    """Without MixUp and drop path, which are drawn per micro-batch, its size makes no difference either."""
    for name, more in {"whole": "--micro-batch-size 16", "cut": "--micro-batch-size 2 --workers 2"}.items():
        off = shlex.split(f"{more} --mixup 0 --cutmix 0 --drop-path 0 --random-erasing 0")
        ftclip.main(flags(tiny, data, tmp_path / name, *off))
    assert far(tmp_path / "whole", tmp_path / "cut") < 1e-5


def test_bf16_training_follows_float32(tiny, data, tmp_path):
    for amp in ("none", "bf16"):
        ftclip.main(flags(tiny, data, tmp_path / amp, "--amp", amp))
    losses = [[line["train_loss"] for line in outcome(tmp_path / amp)["metrics"]] for amp in ("none", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


@needs_gpu
@pytest.mark.parametrize("more", ["--amp none", "--amp bf16", "--amp fp16", "--amp bf16 --compile"])
def test_gpu_training_follows_the_cpu(more, tiny, data, tmp_path):
    off = shlex.split("--mixup 0 --cutmix 0 --drop-path 0 --random-erasing 0")  # chance drawn on the device
    ftclip.main(flags(tiny, data, tmp_path / "cpu", *off))
    ftclip.main(flags(tiny, data, tmp_path / "gpu", *off, "--device", "cuda", *shlex.split(more)))
    losses = [[line["train_loss"] for line in outcome(tmp_path / name)["metrics"]] for name in ("cpu", "gpu")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@needs_gpu
def test_one_gpu_under_torchrun_stops_goes_on_and_evaluates(tiny, data, tmp_path):
    for amp in ("fp16", "bf16"):  # another precision may go on with a run
        argv = flags(tiny, data, tmp_path / "run", "--device", "cuda", "--amp", amp)
        assert run(*argv, processes=1, timeout=200).returncode == 0
    done = run("--eval", "--checkpoint", tmp_path / "run" / "best.pt", "--data", data, processes=1)
    assert "of 13 right" in done.stdout


def test_demo_learns_from_the_command_line(tmp_path):
    done = run("--demo", "--epochs", 3, "--output", tmp_path / "demo", timeout=200)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "demo")["metrics"][-1]["raw_top1"] > 50  # of six classes


# ---------------------------------------------------------------------------------------------- walls


def broken(root: Path, kind: str) -> Path:
    """A copy of the data with one thing wrong."""
    target = root.with_name(kind)
    if target.exists():
        return target
    shutil.copytree(root, target)
    if kind == "flat":
        shutil.rmtree(target / "val")
        (target / "val").mkdir()
        photo(9, 9).save(target / "val" / "0.png")
    elif kind == "differ":
        (target / "val" / "wasp").rename(target / "val" / "moth")
    elif kind == "fewer":
        next((target / "train" / "ant").iterdir()).unlink()
    elif kind == "unseen":
        next((target / "val" / "ant").iterdir()).unlink()
    elif kind == "empty":
        (target / "train" / "cat").mkdir()
    elif kind == "newline":
        (target / "train" / "ant" / "a\nb.png").write_text("no image")
    elif kind == "unreadable":
        for path in (target / "train" / "ant").iterdir():
            path.write_text("no image")
    return target


WALLS = {  # what is wrong → what the sentence must name
    "--data {data}/nowhere": "cannot use .*nowhere/train \\(No such file.*--data DIR",
    "--data flat": "cannot use .*flat/val .*any class folder.*--data DIR",
    "--data differ": r"val has other classes than expected, such as \['moth', 'wasp'\]",
    "--data empty": r"cannot use .*train .*no valid file for the classes cat\).*readable images",
    "--data unreadable": r"cannot read image .*ant.*\.png",
    "--data newline": r"cannot read image .*ant/a b\.png",
    "--batch-size 49": "49 is more than 48",
    "--batch-size 18": "18 is not a multiple of 1 device.* x 4 .* 16 or 20",
    "--model ViT-B/16": "ViT-B/16 is not a plain ViT known to open_clip: give one such as ViT-B-16",
    "--model RN50": "RN50 is not a plain ViT",
    "--model vit_medium_patch16_gap_256": "not a plain ViT",
    "--model ViT-B-16 --pretrained opnai": "give a weights file, none, openai, laion400m_e31",
    "--image-size 33": "33 is not a multiple of .* 8 pixels: try 32 or 40",
    "--pretrained {weights}": "weights.pt does not say its activation: give --quick-gelu",
    "--pretrained {weights} --quick-gelu": "does not fit .*Missing key.*class_embedding.*give the --model",
    "--pretrained {data}/junk --quick-gelu": "cannot load --pretrained",
    "--train-blocks 4": "give 3 at most",
    "--output {reference}": r"of another run \(.*random_erasing .* → 0.1",
    "--output {best}": "no last.pt",
    "--output {other}": "other has a run's weights but no last.pt of it",
    "--output {weights}/below": "below/last.pt .*Not a directory",
    "--output {reference} --data {fewer}": r"of another run \(.*num_images 48 → 47",
    "--output {reference} --data {unseen}": r"of another run \(.*num_val 13 → 12",
    "--output {reference} --model {other}/tiny.json": r"of another run \(.*'layers': 3.* → .*'layers': 2",
    "--eval": "--checkpoint",
    "--eval --checkpoint {best}/best.pt --data {differ}": r"val has other classes than expected, such as \['moth', 'wasp'\]",
    "--eval --checkpoint {weights}": "has format None",
    "--eval --checkpoint nothing.pt": "cannot read checkpoint nothing.pt",
    "--min-lr 1": "above --lr",
    "--warmup-epochs 3": "leaves nothing to train",
    "--epochs 0": "argument --epochs: 0 is not from",
    "--lr nan": "argument --lr: nan is not from",
    "--crop-scale 0": "argument --crop-scale: 0 is not from",
    "--drop-path 1": "argument --drop-path: 1 is not from",
    "--nonsense": "unrecognized arguments: --nonsense",
}


@pytest.mark.parametrize("wrong", WALLS)
def test_a_wall_is_a_sentence(wrong, reference, tiny, data, tmp_path, monkeypatch, capsys):
    torch.save({"positional_embedding": torch.zeros(17, 8)}, tmp_path / "weights.pt")
    (tmp_path / "best").mkdir()
    shutil.copy(reference / "best.pt", tmp_path / "best")
    (tmp_path / "other").mkdir()
    shutil.copy(reference / "best.pt", tmp_path / "other" / "last.pt")
    small = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2}
    (tmp_path / "other" / "tiny.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": small}))
    (data.parent / "junk").write_text("junk")
    names = {"data": data.parent, "reference": reference, "weights": tmp_path / "weights.pt"}
    names |= {kind: broken(data, kind) for kind in ("differ", "fewer", "unseen")}
    text = wrong.format(**names, best=tmp_path / "best", other=tmp_path / "other")
    kinds = [
        kind for kind in ("flat", "differ", "empty", "unreadable", "newline") if text == f"--data {kind}"
    ]
    more = ["--data", str(broken(data, kinds[0]))] if kinds else shlex.split(text)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["ftclip.py", *flags(tiny, data, "out", "--random-erasing", "0.1", *more)]
    )
    with pytest.raises(SystemExit, match="^2$"):  # by argparse, or with the status of run()
        sys.exit(ftclip.run())
    error = capsys.readouterr().err
    assert error.startswith("ftclip: ") and error.count("\n") == 1
    assert re.search(WALLS[wrong], error)
    assert sorted(tmp_path.rglob("*")) == before


OUTSIDE = """--image-size 0; --train-blocks -1; --drop-path 1; --epochs 0; --warmup-epochs -1; --batch-size 0
--micro-batch-size 0; --lr 0; --lr inf; --min-lr -1e-9; --layer-decay 0; --layer-decay 1.1; --weight-decay -1
--label-smoothing 1; --ema-decay 1; --ema-decay -0.1; --clip-grad -1; --randaug 10.1; --randaug -1
--random-erasing 1.1; --crop-scale 0; --crop-scale 1.1; --mixup -1; --cutmix -1; --workers -1; --eval-every 0
--save-every -1; --seed -1; --epochs 1.5; --epochs many; --amp fp8; --device tpu"""


@pytest.mark.parametrize("wrong", re.split(r";\s|\n", OUTSIDE))
def test_a_value_just_outside_what_makes_sense_is_a_wall(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        ftclip.parse_args(wrong.split())
    assert re.fullmatch(f"ftclip: error: argument {wrong.split()[0]}: .*\n", capsys.readouterr().err)


def test_walls_from_the_command_line_and_from_a_worker(tiny, data, tmp_path):
    done = run(*flags(tiny, broken(data, "unreadable"), tmp_path / "out", "--workers", 2))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.fullmatch(r"ftclip: cannot read image .*ant.*\n", done.stderr)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="process 0 has none of 0 GPUs"):
            ftclip.main(flags(tiny, data, tmp_path / "out", "--device", "cuda"))
    done = run("--data", tmp_path / "nowhere", processes=2)
    assert done.stderr.count("ftclip: cannot use") == 1  # once, not once a process


# ---------------------------------------------------------------------------------------------- for copying


def cut_out(*names: str) -> dict:
    """These definitions, alone in a namespace that holds nothing but the file's imports."""
    tree = ast.parse(Path(SCRIPT).read_text())
    kept = [
        n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) or getattr(n, "name", "") in names
    ]
    space: dict = {}
    exec(compile(ast.Module(kept, []), "pasted.py", "exec"), space)  # noqa: S102
    return space


def test_each_public_piece_works_when_pasted_into_an_empty_file(reference, data, tmp_path):
    picture = next((data / "val" / CLASSES[1]).iterdir())
    image, rng = ftclip.read_image(picture), random.Random(0)
    built = ("build_model", "CLIPClassifier", "model_config", "load_weights", "resize_positions", "Block")
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def trained(step):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return step(model, iter([(torch.ones(2, 3, 2, 2), torch.tensor([0, 1]))]), 1, optimizer, scaler)

    def folder(cls):
        return cls(str(data / "train"), ftclip.read_image, lambda image, rng: image, lambda *_: (0, 0, 1, 1))[
            (0, 0)
        ]

    flat, layered = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    uses = {
        "CLIPClassifier": lambda f: f(ftclip.build_model(TINY, 3).trunk, 2)(torch.ones(1, 3, 32, 32)),
        "model_config": lambda f: f("ViT-B-16"),
        "load_weights": lambda f: pytest.raises(ValueError, f, "ViT-B-16", "no such tag"),
        "build_model": lambda f: f(TINY, 2, drop_path=0.1).train()(torch.ones(2, 3, 32, 32)),
        "layer_id": lambda f: f("head.bias"),
        "param_groups": lambda f: f(layered, lambda name: (0, 1, math.inf)[int(name[0])], 1e-3, 0.5, 0.05),
        "Block": lambda f: f(),
        "resize_positions": lambda f: f(torch.ones(5, 3), 4),
        "lr_at": lambda f: f(3, 10, 2, 1.0, 0.0),
        "EMA": lambda f: f(flat, 0.9).update(flat),
        "read_image": lambda f: f(picture),
        "RandAugment": lambda f: [f(*PAPER_OPS)(Image.open(picture).convert("RGB"), rng) for _ in range(40)],
        "RandomErasing": lambda f: f(*BOXES)(torch.zeros(2, 3, 8, 8)),
        "train_transform": lambda f: f(image, rng, 16, 0.08, ASPECT),
        "eval_transform": lambda f: f(image, 16, **CLIP),
        "normalize": lambda f: f(image, **CLIP),
        "FolderDataset": folder,
        "MicroBatches": lambda f: list(f(8, 4, 2, range(3))),
        "train_step": trained,
        "evaluate": lambda f: f({"m": flat}, [(torch.ones(2, 2), torch.tensor([0, 1]))]),
        "save_checkpoint": lambda f: f(tmp_path / "x.pt", {}),
        "load_checkpoint": lambda f: f(reference / "best.pt"),
        "load_classifier": lambda f: f(reference / "best.pt")[2](image),
    }
    together = {"build_model": built}
    together["eval_transform"] = ("eval_transform", "normalize")
    together["load_classifier"] = (*built, "load_classifier", "load_checkpoint", *together["eval_transform"])
    together["evaluate"] = ("evaluate", "all_sum")
    above, _ = Path(SCRIPT).read_text().split("# " + "-" * 94 + " the program")
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = {n.name for n in ast.parse(above).body if isinstance(n, kinds)}
    # What belongs to a run of this program: it takes its plan and system.
    run = {"resolve", "start_loader", "train_batches"}
    run |= {"all_sum", "prepare", "checked_losses", "train"}
    assert public - run == uses.keys()
    for name, use in uses.items():
        use(cut_out(*together.get(name, (name,)))[name])


def test_commands_in_the_documents_run(reference, tiny, data, tmp_path, monkeypatch):
    """Dry, with our data in place of theirs; those that evaluate, for real."""
    text = "\n".join((HERE / name).read_text() for name in ("README.md", "recipes.md", "ftclip.py"))
    commands = re.findall(r"(?:python|torchrun .*) ftclip\.py ?([^`#\n|]*)", text)
    assert len(commands) >= 15
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny, "tiny.json")
    for command in dict.fromkeys(commands):
        args = ftclip.parse_args(shlex.split(command))
        for path, real in ((args.data or "imagenet", data), (args.checkpoint, reference / "best.pt")):
            if path and not Path(path).exists():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).symlink_to(real)
        assert ftclip.main([*shlex.split(command), *([] if args.eval else ["--dry-run"])]) == 0, command


def test_every_row_of_the_recipes_runs_dry_and_changes_what_it_names(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = re.findall(r"\| `(--[^`]+)` \|$", (HERE / "recipes.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for row in dict.fromkeys(rows):
        flags = shlex.split(row)
        assert ftclip.main([*flags, "--dry-run"]) == 0
        printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        for flag, value in zip(flags, [*flags[1:], ""]):
            name = flag[2:].replace("-", "_")
            if name in ftclip.SETTINGS and name != "lr":
                assert float(printed[name]) == float(value), row
            elif flag == "--lr":
                assert printed["lr"].split(" from ")[0].endswith(f"{float(value):.4e}"), row


def test_links_of_the_recipes_lead_to_what_they_name():
    text, lines = (HERE / "recipes.md").read_text(), Path(SCRIPT).read_text().splitlines()
    links = re.findall(r"\[`([\w.]+)`\]\(ftclip\.py#L(\d+)\)", text)
    defined = re.compile(r"(?:class |def )?(\w+)")
    right = {
        defined.match(line)[1]: i
        for i, line in enumerate(lines, 1)
        if re.match(r"class |def |[A-Z]\w+ = ", line)
    }
    assert len(links) >= 20
    wrong = [
        f"{name} is in line {right[name]}, not {line}" for name, line in links if right[name] != int(line)
    ]
    assert not wrong
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert len(tests) >= 12 and tests <= globals().keys()


@pytest.mark.parametrize("what", ["loader", "step"])
def test_the_speed_benchmark_starts_small(what, data):
    """What it measures is not asserted."""
    if what == "step" and torch.cuda.is_available():
        pytest.skip("on a GPU it is measured, not tried")
    small = f"{what} --data {shlex.quote(str(data))} --count 1 --rounds 1 --workers 0"
    command = [sys.executable, str(HERE / "benchmarks" / "speed.py"), *shlex.split(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.search(r"^ftclip is [\d.]+ times as fast as timm$", done.stdout, re.MULTILINE)


def test_import_is_silent_and_starts_nothing():
    code = "import sys, ftclip; print([m for m in ('open_clip', 'timm') if m in sys.modules])"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""
