"""ftclip: fine-tune CLIP's image encoder with the FT-CLIP recipe, in one file.

"CLIP Itself is a Strong Fine-tuner" (Dong et al., arXiv 2212.06138) fine-tunes CLIP ViT-B/16 to
85.7 % and ViT-L/14 to 88.0 % top-1 on ImageNet-1k. It adds nothing to the model but a linear head.
A small learning rate with layer-wise decay, an exponential moving average (EMA) of the weights, a
short schedule and careful augmentation are enough.

    python ftclip.py --demo                                       # no data and no GPU needed
    torchrun --nproc_per_node 8 ftclip.py --model ViT-B-16        # the 85.7 % recipe on ./imagenet
    python ftclip.py --model ViT-B-16                             # the same recipe on one GPU
    python ftclip.py --model ViT-L-14 --image-size 336 --dry-run  # print the plan, write nothing
    python ftclip.py --data flowers                               # a folder of your own
    python ftclip.py --eval --checkpoint runs/ViT-B-16-224/best.pt

Images lie as in ImageNet: DIR/train/<class>/* and DIR/val/<class>/*. A run writes last.pt (to
resume), best.pt (to use) and metrics.jsonl to --output. The same command again resumes the run.

Read from top to bottom: in short, configuration, model, optimization, augmentation, data, training.
That is all of FT-CLIP. Below it, "files" reads and writes weights, and "the program" turns flags
into a run. To reuse a part:

    layer-wise learning rates   copy layer_id, param_groups and lr_at
    another augmentation        give train_transform any callable on Pillow images
    another model               train_step, evaluate and EMA take any nn.Module; write its layer_id

"Official" means the paper's own code, github.com/LightDXY/FT-CLIP at commit 3f9cefa.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import json
import math
import os
import random
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2


class UserError(ValueError):
    """A mistake that the user can correct. The program prints it as one sentence."""


# ------------------------------------------------------------------------------------ in short
#
# CLIP has learned features from 400 million images with captions. They are better than any that the
# images of one data set alone could teach. Fine-tuning adapts them to the classes of the data set,
# and the danger is to lose them on the way. The usual settings for fine-tuning lose a part of them.
# Figure 1 of the paper shows this for ViT-B/16, at 224 pixels in all rows but the last. Each row
# keeps the changes above it:
#
#     change                                                        top-1   effect
#     (the usual fine-tuning settings)                              82.3 %
#     smaller learning rate                                         84.3 %  weights stay near CLIP's
#     EMA of the weights, decay 0.9998                              84.6 %  noise is averaged out
#     learning rate decays from layer to layer, by 0.6              85.3 %  low layers are kept most
#     fewer epochs, 50 instead of 100 (*)                           85.2 %  half of the compute
#     weaker augmentation, without MixUp and CutMix (*)             85.7 %  one object, one label
#     384 pixels, lr 7e-4 instead of 6e-4, patch embedding trained  86.6 %  more detail
#
# (*) The figure names these two changes, but not their values. Those given here follow from the
# final recipe. The learning rates of the first two rows are not known either.
#
# The model is CLIP's vision transformer with a new head: LayerNorm, mean over the patch tokens, and
# a linear layer. One optimizer step, with AdamW on a global batch of 2048 images:
#
#     set the learning rate of each layer (lr_at, param_groups), train_step, update the EMA
#
# After each epoch both the raw and the EMA weights are evaluated. What to expect from ViT-B/16:
# after one epoch the raw weights have 52 % top-1 and the EMA 20 %, after ten both have 82 %, and
# the EMA is best after thirty of the fifty epochs, with 85.7 %.
#
# With fewer images, `resolve` makes the batch smaller, the EMA shorter and, below 320 images, the
# run longer. The first things to try there are more epochs and another learning rate.

# ------------------------------------------------------------------------------------ configuration


@dataclass
class Config:
    """What a user can set. Each field is a flag: `weight_decay` is `--weight-decay`.

    What is given is used as given. `resolve` fills in the numbers that are None, from the recipe
    that is nearest in depth and image size, the number of training images and the number of
    devices. The comments are the help texts of the flags.
    """

    # Model and data.
    model: str | dict = "ViT-B-16"  # open_clip name of a plain ViT, or a JSON file with one
    pretrained: str = "openai"  # open_clip tag, weights file, or none for random weights
    quick_gelu: bool | None = None  # QuickGELU instead of GELU; default: what the weights need
    image_size: int | None = None  # side in pixels; default: the model's
    data: str | None = None  # folder with train/<class>/* and val/<class>/*; default: imagenet
    output: str | None = None  # folder for the run's files; default: runs/MODEL-SIZE

    # Optimization.
    epochs: int | None = None  # passes over the images; default: recipe, or more for 500 steps
    warmup_epochs: float | None = None  # epochs of rising lr; default: the recipe's share
    batch_size: int | None = None  # images per step on all devices; default: recipe, or fewer
    micro_batch_size: int | None = None  # images on a device at once; lower it to save memory
    lr: float | None = None  # peak lr of the head; default: recipe's, less for a smaller batch
    min_lr: float = 1e-6  # final lr of the head
    layer_decay: float | None = None  # lr of a layer / lr of the layer above; default: recipe
    weight_decay: float = 0.05  # weight decay of AdamW, 0 is off
    ema_decay: float | None = None  # 0 is off; default: recipe, less in a short run
    clip_grad: float = 0.0  # largest norm of the gradient, 0 is off
    train_blocks: int | None = None  # train the last K blocks, 0: linear probe; default: everything
    freeze_patch_embed: bool | None = None  # keep conv1 as it is; default: recipe

    # Augmentation and regularization.
    randaug: float = 9.0  # mean magnitude of RandAugment, at most 10, 0 is off
    random_erasing: float = 0.25  # probability of a box of noise, 0 is off
    crop_scale: float = 0.08  # smallest area of a crop as a share of the image
    mixup: float = 0.0  # alpha of MixUp, 0 is off; with --cutmix, one of the two is used
    cutmix: float = 0.0  # alpha of CutMix, 0 is off
    label_smoothing: float = 0.1  # share of a label that is spread over all classes
    drop_path: float = 0.0  # drop path rate of the last block, 0 is off

    # The run.
    seed: int = 0  # seed of everything random
    eval_every: int = 1  # epochs between evaluations; the last epoch has one
    save_minutes: float = 10.0  # minutes between saves of last.pt; after an epoch, a tenth
    workers: int | None = None  # loader processes per device; default: cores / devices
    device: Literal["cuda", "cpu"] | None = None  # default: cuda if there is a GPU
    amp: Literal["bf16", "fp16", "none"] | None = None  # autocast; default: by the device
    grad_checkpointing: bool = False  # compute the blocks twice: slower, much less memory
    compile: bool = False  # torch.compile: minutes to start, then faster steps
    dry_run: bool = False  # print the plan of the run and write nothing
    eval: bool = False  # evaluate --checkpoint on DIR/val and exit
    checkpoint: str | None = None  # best.pt or last.pt for --eval
    demo: bool = False  # train a tiny ViT on images that the script draws


IMAGENET_IMAGES = 1_281_167  # for training


@dataclass(frozen=True)
class Recipe:
    """One of the paper's four runs. lr is the head's, for this batch size."""

    lr: float
    layer_decay: float
    epochs: int
    warmup_epochs: int
    batch_size: int
    micro_batch_size: int
    freeze_patch_embed: bool
    top1: float  # per cent on ImageNet-1k, from the paper
    ema_decay: float = 0.9998


# Source: the official scripts and logs. What the four runs share is in the defaults of Config and
# Recipe. All start from OpenAI's weights for 224 pixels; at 384 and 336 positions are resized.
RECIPES = {
    # model, image size       lr  decay  epochs, warm-up  batch, micro-batch  conv1 frozen  top-1
    ("ViT-B-16", 224): Recipe(6e-4, 0.60, 50, 10, 2048, 256, True, top1=85.7),
    ("ViT-B-16", 384): Recipe(7e-4, 0.60, 50, 10, 2048, 64, False, top1=86.6),
    ("ViT-L-14", 224): Recipe(4e-4, 0.65, 30, 5, 2048, 64, True, top1=88.0),
    ("ViT-L-14", 336): Recipe(6e-4, 0.65, 30, 5, 1920, 20, False, top1=88.3),
}


@dataclass
class Plan(Config):
    """A Config in which all numbers are decided, and the numbers that follow."""

    recipe: tuple[str, int] = ("", 0)  # key of RECIPES
    num_images: int = 0  # for training
    accumulation: int = 0  # micro-batches per device and step
    steps_per_epoch: int = 0
    total_steps: int = 0
    warmup_steps: int = 0

    def fixed(self) -> dict:
        """The values that must stay the same when a run is resumed: all but MAY_CHANGE."""
        return {
            name: value for name, value in asdict(self).items() if name not in MAY_CHANGE.split()
        }


# These say where and how fast a run is computed. They change its rounding at most, and another
# micro_batch_size changes the noise of erasing, mixing and drop path.
MAY_CHANGE = (
    "model data output micro_batch_size accumulation workers device amp grad_checkpointing compile "
    "save_minutes dry_run eval checkpoint demo"
)


def resolve(config: Config, num_layers: int, num_images: int, devices: int = 1) -> Plan:
    """Decide every number of a run: batch_size = devices * micro_batch_size * accumulation.

    Example: 1,500 images, one device and ViT-B/16 at 224 pixels give batch size 32, 46 steps per
    epoch, lr 6e-4, 50 epochs with 10 of warm-up, and an EMA that averages over 368 of 2,300 steps.
    recipes.md has the experiments behind the rules for few images.

    Args:
        config: the flags; image_size must be set.
        num_layers: number of blocks of the model.
        num_images: number of training images.
        devices: number of processes, one per device.

    Raises UserError for numbers that do not go together.
    """
    plan = Plan(**asdict(config), num_images=num_images)

    # Recipe: the paper's runs of a model of this depth, and of these the nearest image size. For
    # models with more than 24 blocks this is untried.
    depth = "ViT-L-14" if num_layers > 12 else "ViT-B-16"
    keys = [key for key in RECIPES if key[0] == depth]
    plan.recipe = min(keys, key=lambda key: abs(key[1] - plan.image_size))
    recipe = RECIPES[plan.recipe]

    # Batch: the recipe's, or with fewer images the largest power of two that leaves 32 steps per
    # epoch, because with too few optimizer steps the model underfits. But at least 32 images: the
    # gradient of fewer is mostly noise, in which CLIP's features are lost.
    largest = 2 ** int(math.log2(max(32, num_images // 32)))
    default_batch = min(recipe.batch_size, largest, num_images)
    batch_size = default_batch if plan.batch_size is None else plan.batch_size

    # Micro-batches: as few as possible, and none larger than the recipe's. A default batch is
    # rounded down to equal micro-batches on all devices. A batch that was given must divide.
    per_device = max(1, batch_size // devices)
    if plan.micro_batch_size is None:
        plan.accumulation = math.ceil(per_device / recipe.micro_batch_size)
        while plan.batch_size is not None and per_device % plan.accumulation:
            plan.accumulation += 1
        plan.micro_batch_size = per_device // plan.accumulation
    else:
        plan.accumulation = max(1, per_device // plan.micro_batch_size)
    unit = devices * plan.micro_batch_size
    possible = unit * plan.accumulation
    if plan.batch_size is None:
        plan.batch_size = possible
    if plan.batch_size > num_images:
        raise UserError(
            f"a batch of {plan.batch_size} is more than {num_images} images: lower --batch-size"
        )
    if plan.batch_size != possible:
        raise UserError(
            f"--batch-size {plan.batch_size} is not a multiple of {devices} device(s) x "
            f"{plan.micro_batch_size} image(s): try {possible} or {possible + unit}"
        )

    # Learning rate: the recipe's, also for the smaller default batch of few images. Such a run has
    # few steps, and with a smaller lr it would end near its start. A batch below the default
    # scales lr by its square root: half of it makes twice the steps, and AdamW divides the gradient
    # by its own size, so that noise moves the weights as lr * sqrt(steps) (arXiv 2205.10287).
    if plan.lr is None:
        plan.lr = recipe.lr * math.sqrt(min(1.0, plan.batch_size / default_batch))
    if plan.layer_decay is None:
        plan.layer_decay = recipe.layer_decay

    # Schedule: the recipe's epochs, but at least 500 steps, and warm-up keeps its share of them.
    # Images that do not fill a batch are dropped, different ones in each epoch (official
    # run_class_finetuning.py:431).
    plan.steps_per_epoch = num_images // plan.batch_size
    if plan.epochs is None:
        plan.epochs = max(recipe.epochs, math.ceil(500 / plan.steps_per_epoch))
    if plan.warmup_epochs is None:
        plan.warmup_epochs = recipe.warmup_epochs * plan.epochs / recipe.epochs
    if plan.warmup_epochs >= plan.epochs:
        raise UserError(f"--warmup-epochs {plan.warmup_epochs:g} leaves no epoch: lower it")
    plan.total_steps = plan.epochs * plan.steps_per_epoch
    plan.warmup_steps = min(round(plan.warmup_epochs * plan.steps_per_epoch), plan.total_steps - 1)

    # EMA: the recipe's decay averages over about 1 / (1 - decay) = 5,000 steps, 16 % of the run of
    # ViT-B/16 and 27 % of that of ViT-L/14. A shorter run keeps this share. With 5,000 steps its
    # EMA would still consist mostly of the starting weights.
    if plan.ema_decay is None:
        recipe_steps = recipe.epochs * (IMAGENET_IMAGES // recipe.batch_size)
        share = min(1.0, plan.total_steps / recipe_steps)
        plan.ema_decay = max(0.0, 1 - (1 - recipe.ema_decay) / share)

    if plan.freeze_patch_embed is None:  # random weights must not be frozen
        plan.freeze_patch_embed = recipe.freeze_patch_embed and plan.pretrained != "none"
    return plan


# ------------------------------------------------------------------------------------ model


class Attention(nn.Module):
    """Multi-head self-attention, written out, with the names of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to (N, tokens, width)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (N, tokens, 3 * width)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (N, tokens, 3, heads, width / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, tokens, width / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    """The activation with which OpenAI trained CLIP, x * sigmoid(1.702 x).

    With GELU in its place the weights load as well, but each block computes something slightly
    different, and accuracy is lost without a warning.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape."""
        return F.silu(1.702 * x) / 1.702  # the same function, in a fused kernel


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    In training, drop path leaves out each of the two branches of a sample with probability
    `drop_path` (arXiv 1603.09382).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, quick_gelu: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()  # of the three modules below, under open_clip's names
        self.mlp.c_fc = nn.Linear(width, hidden)
        self.mlp.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp.c_proj = nn.Linear(hidden, width)
        self.drop_path = torchvision.ops.StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to (N, tokens, width). A float32 x stays float32 under autocast."""
        x = x + self.drop_path(self.attn(self.ln_1(x)))
        x = x + self.drop_path(self.mlp(self.ln_2(x)))
        return x


class VisionTransformer(nn.Module):
    """CLIP's image encoder without its last norm and projection: the trunk of the classifier.

    Parameters have open_clip's names, so that its state dicts load strictly, and the first seven
    arguments are those of its configurations. Copy Attention, QuickGELU and
    Block with it.

    Args:
        image_size, patch_size: in pixels.
        width: of a token, a multiple of head_width.
        layers: number of blocks.
        head_width: width of an attention head.
        mlp_ratio: hidden width of the MLP over width.
        no_ln_pre: leave out the norm before the first block. Most other ViTs do not have one.
        quick_gelu: QuickGELU instead of GELU.
        drop_path: rate of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        head_width: int,
        mlp_ratio: float,
        no_ln_pre: bool,
        quick_gelu: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        positions = 1 + (image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(positions, width) * width**-0.5)
        self.ln_pre = nn.Identity() if no_ln_pre else nn.LayerNorm(width)
        blocks = nn.ModuleList()
        for i in range(layers):
            rate = drop_path * i / max(1, layers - 1)
            hidden = int(width * mlp_ratio)
            blocks.append(Block(width, width // head_width, hidden, quick_gelu, rate))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, S, S) to tokens (N, 1 + patches, width), class token first.

        Under autocast, conv1 returns bf16 or fp16. The class token and the positions are float32,
        so that concatenation and addition promote the tokens to float32, and each block adds to a
        float32 residual stream: 24 blocks add small updates to a large sum, for which the eight
        significant bits of bf16 are too few.
        """
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, width)
        class_token = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class CLIPClassifier(nn.Module):
    """A trunk with the FT-CLIP head: LayerNorm on each patch token, their mean, a linear layer.

    The class token takes part in attention and is then left out. CLIP's own last norm and its
    projection read only the class token and lead into the space shared with text, which a
    classifier does not need. The patch tokens together describe the whole image. A new LayerNorm
    brings them to one scale before they are averaged.

    The head starts a thousand times smaller than usual. The gradient that reaches the trunk is
    proportional to the head's weights. A random head of the usual size would push the pretrained
    features in random directions before it has learned anything. A head near zero learns first,
    and its first predictions are uniform.

    Source: official models/finetune_clip.py:167-175, 230-231.

    Args:
        trunk: module from images (N, 3, S, S) to tokens (N, 1 + patches, width), class token
            first, such as VisionTransformer.
        width: size of a token.
        num_classes: number of outputs.
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        with torch.no_grad():
            self.head.bias.mul_(0.001)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, S, S) to float32 logits (N, num_classes)."""
        tokens = self.trunk(images)[:, 1:]  # (N, patches, width)
        features = self.norm(tokens).mean(dim=1)  # (N, width)
        # In bf16 the logits of two classes are often equal, and the first would always win.
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))  # another trunk may give bf16


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings for another image size: (1 + old^2, width) to (1 + grid^2, width).

    The result is float32. The class token's position stays as it is. The others are interpolated
    bicubically without antialias, as in the paper's runs. open_clip's own resize uses antialias,
    which is another kernel, also when it enlarges.

    Source: official run_class_finetuning.py:360-385.
    """
    positions = positions.float()
    old = math.isqrt(len(positions) - 1)
    if old == grid:
        return positions
    square = positions[1:].T.reshape(1, -1, old, old)  # (1, width, old, old)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def build_model(
    model: str | dict,
    num_classes: int,
    pretrained: str = "none",
    image_size: int | None = None,
    quick_gelu: bool | None = None,
    drop_path: float = 0.0,
    train_blocks: int | None = None,
    freeze_patch_embed: bool = False,
) -> CLIPClassifier:
    """A CLIP trunk with the FT-CLIP head, float32.

    Its attribute `config` is the configuration from which build_model makes the same model again.
    On the meta device no weights are loaded: a dry run only counts parameters.

    Args:
        model: open_clip name, path of a JSON file, or a configuration.
        num_classes: number of outputs.
        pretrained: open_clip tag, weights file, or "none" for random weights.
        image_size: side in pixels; positions are resized to fit. None keeps the model's.
        quick_gelu: activation. None takes what the tag, the file or the configuration says.
        drop_path: drop path rate of the last block.
        train_blocks: number of last blocks to train besides norm and head. 0 is linear probing;
            None, or as many as there are, trains the embeddings too.
        freeze_patch_embed: keep conv1 as it is. The paper freezes it at 224 pixels, where it sees
            what it saw in pretraining, and trains it at 384 and 336, where a patch shows less of
            the scene.

    Raises UserError for an unknown model or tag, an image size that is not a multiple of the
    patch size, weights that do not fit, or an unknown activation. Copy the part "model" with it,
    and the functions about weights in the part "files".
    """
    config = model_config(model)
    vision = config["vision_cfg"]
    if image_size is not None:
        vision["image_size"] = image_size
    patch_size = vision["patch_size"]
    grid = vision["image_size"] // patch_size
    if vision["image_size"] % patch_size:
        near = max(1, grid) * patch_size
        raise UserError(
            f"--image-size {image_size} is not a multiple of the patch of {patch_size} pixels: "
            f"try {near} or {near + patch_size}"
        )
    if quick_gelu is None:
        quick_gelu = needs_quick_gelu(model, pretrained)
    config["quick_gelu"] = quick_gelu
    trunk = VisionTransformer(**vision, quick_gelu=quick_gelu, drop_path=drop_path)
    if pretrained != "none" and not trunk.conv1.weight.is_meta:
        weights = load_weights(model, pretrained)
        weights["positional_embedding"] = resize_positions(weights["positional_embedding"], grid)
        try:
            trunk.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--pretrained {pretrained} does not fit {model}: {reason}") from error
    classifier = CLIPClassifier(trunk, vision["width"], num_classes)
    classifier.config = config

    blocks = trunk.transformer["resblocks"]
    if train_blocks is not None and train_blocks < len(blocks):
        trunk.requires_grad_(False)
        blocks[len(blocks) - train_blocks :].requires_grad_(True)
    if freeze_patch_embed:
        trunk.conv1.requires_grad_(False)
    return classifier


# ------------------------------------------------------------------------------------ optimization
#
# The learning rate matters most. A large one soon overwrites the pretrained weights, and the model
# then learns from the new images alone, as from scratch. The recipe's 6e-4 is large, but only the
# head has it: with a layer decay of 0.6, the middle of ViT-B/16 has about 2e-5.
#
# A short schedule is enough because little has to be learned. In the paper, a run of 100 epochs is
# best at about half of its epochs and then overfits (Figure 2). Even the runs of 50 and 30 epochs
# are best before their end: in the published logs, the best EMA comes at 56 to 67 % of the run.


def layer_id(name: str, num_layers: int) -> int:
    """Layer of a parameter of CLIPClassifier: 0 embeddings, i + 1 block i, num_layers + 1 the head.

    For another model write such a function for its names. In timm's ViTs, for example, the blocks
    are "blocks.<i>.", norm and head are "norm.", "fc_norm." and "head.", and the embeddings are
    "cls_token", "pos_embed", "patch_embed." and "norm_pre.". As the trunk of a CLIPClassifier, its
    names begin with "trunk.".

    Raises ValueError for an unknown name. Source: official optim_factory.py:22-39.
    """
    if name.startswith("trunk.transformer.resblocks."):
        return int(name.split(".")[3]) + 1
    if re.match(r"trunk\.(class_embedding|positional_embedding|conv1\.|ln_pre\.)", name):
        return 0
    if name.startswith(("norm.", "head.")):
        return num_layers + 1
    raise ValueError(f"no layer is known for parameter {name}: add it to layer_id")


def param_groups(
    model: nn.Module,
    num_layers: int,
    lr: float,
    layer_decay: float,
    weight_decay: float,
    layer_id: Callable[[str, int], int] = layer_id,
) -> list[dict]:
    """AdamW's parameter groups, with a learning rate that decays from the head to the embeddings.

    Low layers of CLIP see edges and textures, which hardly depend on the task. High layers see what
    the task is about. So layer i has the learning rate lr * layer_decay ** (num_layers + 1 - i).
    For ViT-B/16 with lr 6e-4 and layer_decay 0.6:

        layer                                        scale            lr
        13   norm, head                              0.6^0  = 1       6.0e-4
        12   block 11                                0.6^1  = 0.6     3.6e-4
        11   block 10                                0.6^2  = 0.36    2.2e-4
        ...
         6   block 5                                 0.6^7  = 0.028   1.7e-5
        ...
         1   block 0                                 0.6^12 = 0.0022  1.3e-6
         0   class and positional embedding, ln_pre  0.6^13 = 0.0013  7.8e-7
             (and conv1, where it is trained)

    The learning rate changes at each step, so the schedule must apply the scale too, before each
    optimizer step: `group["lr"] = lr_at(...) * group["lr_scale"]`.

    Biases, norms, and class and positional embeddings have no weight decay: they are few, and zero
    is no natural value for them. Frozen parameters are in no group.

    Args:
        model: not wrapped in DDP or torch.compile, which change the names.
        num_layers: number of blocks.
        lr: learning rate of the head.
        layer_decay: lr of a layer over that of the layer above it.
        weight_decay: of matrices and kernels.
        layer_id: function from a parameter's name and num_layers to its layer. Copy the one above
            with this function, or write one of the same name for another model.

    Returns at most two groups per layer, from the embeddings up, with the keys "params", "names",
    "layer", "lr", "lr_scale" and "weight_decay". Raises ValueError unless each layer from 0 to
    num_layers + 1 has a parameter: a mistake in the layer_id of another model would otherwise go
    unnoticed.

    Source: official optim_factory.py:60, run_class_finetuning.py:441.
    """
    layers = {name: layer_id(name, num_layers) for name, _ in model.named_parameters()}
    found = sorted(set(layers.values()))
    if found != list(range(num_layers + 2)):
        raise ValueError(
            f"layer_id finds the layers {found}, not each of 0 to {num_layers + 1}: "
            "correct it or num_layers"
        )
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers[name]
        is_embedding = name.endswith(("_embedding", "_token", "pos_embed"))
        decays = parameter.ndim > 1 and not is_embedding
        if (layer, decays) not in groups:
            scale = layer_decay ** (num_layers + 1 - layer)
            groups[layer, decays] = {
                "params": [],
                "names": [],
                "layer": layer,
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
            }
        groups[layer, decays]["params"].append(parameter)
        groups[layer, decays]["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def lr_at(step: int, total_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate at an optimizer step: linear from 0 to lr, then half a cosine to min_lr.

    Warm-up is there for AdamW and for the head. AdamW divides each step by the root of an average
    of squared gradients, which is unreliable while it has seen few of them. And while the head is
    near zero, its gradients say little about where the trunk should go. The cosine ends the run
    with small learning rates, so that the weights settle.

    Steps count from 0. Step 0 of a warm-up has 0: it only fills AdamW's averages, as in the
    official code. The peak comes twice: at the last step of a warm-up of two or more, and at the
    first step of the cosine. From total_steps on, the result is min_lr. lr and min_lr are the
    head's; those of a group are these times its "lr_scale".

    Source: official utils.py:407-424.
    """
    if step >= total_steps:
        return min_lr
    if step < warmup_steps:
        return lr * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * progress))


class EMA:
    """Exponential moving average of weights: average += (1 - decay) * (weights - average).

    The weights oscillate from step to step around a point to which they converge slowly. Their
    average oscillates less and is closer to it. In the four published runs, the best EMA is 0.9 to
    1.7 points above the best raw weights. Figure 1 reports 0.3 points, without layer decay.

    The average covers about 1 / (1 - decay) steps: 5,000 for the paper's 0.9998, which are eight
    epochs of ImageNet. It starts from the starting weights, and at first it still consists of them:
    after one epoch of ViT-B/16 it has 20 % top-1, the raw weights 52 %. In a run that is not much
    longer, choose a smaller decay. With decay 0 it is a copy of the weights.

    Source: official engine_for_finetuning.py:92.

    Args:
        model: on its device, neither compiled nor wrapped in DDP.
        decay: at least 0 and less than 1; else a ValueError.

    Attribute `module` is the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not at least 0 and less than 1")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call it after each optimizer step, not after each micro-batch."""
        averages = self.module.parameters()
        torch._foreach_lerp_([*averages], [*model.parameters()], 1 - self.decay)  # in few kernels
        for average, buffer in zip(self.module.buffers(), model.buffers()):
            average.copy_(buffer)  # CLIP has none; those of batch norm are averages already


# ------------------------------------------------------------------------------------ augmentation
#
# Augmentation shows each image differently in each epoch, which keeps a large model from learning
# the images by heart. RandAugment and random erasing distort an image, but it still shows one
# object with one label, and they stay in the recipe. MixUp and CutMix blend two images and two
# labels into something that CLIP has never seen, and the final recipe is without them.
#
# The way of a training image:
#
#     in a loader worker, uint8:  read_image, crop and resize, flip, RandAugment
#     on the device, float32:     normalize, random_erasing, MixUp or CutMix if they are on

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels from 0 to 1: red, green, blue
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class RandAugment:
    """RandAugment (arXiv 1909.13719) as in the paper: timm's rand-m9-mstd0.5-inc1.

    "inc1" means that a larger magnitude always is a stronger change.

    Of fifteen operations, num_ops are drawn with replacement. Each is applied with the given
    probability, with a magnitude from N(magnitude, std) clipped to [0, 10]; signs are equally
    likely. torchvision's RandAugment(2, 9) is something else: 30 % of full strength where this has
    90 %, always applied, nearest-neighbour and with black borders.

    Called with an RGB Pillow image, it returns one. All randomness comes from the module `random`.
    """

    magnitude: float = 9.0
    std: float = 0.5
    num_ops: int = 2
    probability: float = 0.5
    fill: tuple[int, int, int] = (123, 117, 104)  # what comes from outside the image: CLIP_MEAN

    OPS = (
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
        "Color", "Contrast", "Brightness", "Sharpness",
        "ShearX", "ShearY", "TranslateX", "TranslateY",
    )  # fmt: skip

    def __call__(self, image: Image.Image) -> Image.Image:
        for op in random.choices(self.OPS, k=self.num_ops):
            if random.random() < self.probability:
                magnitude = min(max(random.gauss(self.magnitude, self.std), 0.0), 10.0)
                image = self.apply(image, op, magnitude / 10, random.choice((-1, 1)))
        return image

    def apply(self, image: Image.Image, op: str, strength: float, sign: int) -> Image.Image:
        """One operation with strength 0 to 1 and sign -1 or 1, which some operations ignore."""
        signed = sign * strength
        match op:
            case "AutoContrast":
                return ImageOps.autocontrast(image)
            case "Equalize":
                return ImageOps.equalize(image)
            case "Invert":
                return ImageOps.invert(image)
            case "Rotate":
                return image.rotate(30 * signed, Image.Resampling.BICUBIC, fillcolor=self.fill)
            case "Posterize":
                dropped = 4 + int(4 * strength)  # bits; all eight leave a black image
                return image.point([value & (255 << dropped) for value in range(256)] * 3)
            case "Solarize":
                return ImageOps.solarize(image, 256 - int(256 * strength))
            case "SolarizeAdd":
                added = [value + int(110 * strength) for value in range(128)]
                return image.point([*added, *range(128, 256)] * 3)
            case "Color" | "Contrast" | "Brightness" | "Sharpness":
                enhancer = getattr(ImageEnhance, op)(image)
                return enhancer.enhance(max(0.1, 1 + 0.9 * signed))
            # The last four: the pixel at (x, y) comes from (ax + by + c, dx + ey + f).
            case "ShearX":
                matrix = (1, 0.3 * signed, 0, 0, 1, 0)
            case "ShearY":
                matrix = (1, 0, 0, 0.3 * signed, 1, 0)
            case "TranslateX":
                matrix = (1, 0, 0.45 * signed * image.width, 0, 1, 0)
            case "TranslateY":
                matrix = (1, 0, 0, 0, 1, 0.45 * signed * image.height)
        affine = Image.Transform.AFFINE
        bicubic = Image.Resampling.BICUBIC
        return image.transform(image.size, affine, matrix, bicubic, fillcolor=self.fill)


def augment(image: Tensor, crop: Callable, randaug: Callable | None = None) -> Tensor:
    """Crop, flip and RandAugment of a training image, uint8 (3, H, W) to uint8 (3, S, S).

    The crop is taken and resized on the tensor, which is faster than on a Pillow image. Bytes are
    copied to the GPU in a quarter of the time of floats.
    """
    image = crop(image)
    if random.random() < 0.5:
        image = image.flip(-1)
    if randaug is not None:
        image = TF.pil_to_tensor(randaug(TF.to_pil_image(image)))
    return image


def train_transform(
    image_size: int, crop_scale: float = 0.08, randaug: Callable | None = None
) -> Callable:
    """Transform of a training image: a function of uint8 (3, H, W) alone. Copy augment with it.

    A crop of 8 to 100 % of the area shows objects at many sizes, and often only a part of one. All
    randomness comes from the global generators of `random` and torch.

    Args:
        image_size: side of the result in pixels.
        crop_scale: smallest area of the crop as a share of the image.
        randaug: function from Pillow image to Pillow image, such as RandAugment().
    """
    crop = v2.RandomResizedCrop(
        image_size, scale=(crop_scale, 1.0), interpolation=TF.InterpolationMode.BICUBIC
    )
    return functools.partial(augment, crop=crop, randaug=randaug)


def normalize(images: Tensor) -> Tensor:
    """uint8 images (..., 3, H, W) to float32 with CLIP_MEAN and CLIP_STD, as CLIP was trained."""
    images = images.float() / 255
    for channel in range(3):  # tensors would be copied to the GPU each time
        images[..., channel, :, :].sub_(CLIP_MEAN[channel]).div_(CLIP_STD[channel])
    return images


def eval_transform(image: Tensor | Image.Image, image_size: int) -> Tensor:
    """Transform of an image for evaluation: resize its short side, take the middle, normalize.

    The crop has the full height or width (crop ratio 1.0). The usual ratio of 0.875 cuts away an
    eighth of the height and of the width, and objects with it. Copy normalize with it.

    Takes uint8 (3, H, W) or a Pillow image, returns float32 (3, image_size, image_size).
    Source: official datasets.py:76-84.
    """
    if isinstance(image, Image.Image):
        image = TF.pil_to_tensor(image.convert("RGB"))
    image = TF.resize(image, [image_size], interpolation=TF.InterpolationMode.BICUBIC)
    return normalize(TF.center_crop(image, [image_size]))


def random_erasing(images: Tensor, probability: float, rng: random.Random = random) -> Tensor:
    """Random erasing (arXiv 1708.04896): a box of some images becomes noise, in place.

    The model must then recognize an object from the rest of it. The box covers 2 to 33 % of the
    image, with a height / width from 0.3 to 1 / 0.3, log-uniform. It is filled with N(0, 1) per
    pixel and channel, the mean and variance of a normalized image.

    Args:
        images: normalized images (N, C, H, W).
        probability: chance of each image to be erased.
        rng: source of the boxes, a random.Random or the module random. The noise comes from
            torch's generator.
    """
    height, width = images.shape[2:]
    for image in images:
        if rng.random() >= probability:
            continue
        for _ in range(10):  # tries for a box that is smaller than the image
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            if h < height and w < width:
                top = rng.randint(0, height - h)
                left = rng.randint(0, width - w)
                image[:, top : top + h, left : left + w].normal_()
                break
    return images


# ------------------------------------------------------------------------------------ data
#
# A run must see the same images with the same noise however often it is interrupted, and on any
# number of devices that take micro-batches of the same size. So nothing is drawn from a generator
# whose state would have to be saved. What a loader worker draws for an image follows from (seed,
# epoch, index). What a device draws for a micro-batch follows from (seed, step, its place in the
# global batch). Both use one mechanism: seed the generators from a text with these numbers, then
# call ordinary random functions.


def seed_generators(text: str) -> None:
    """Seed the global generators of `random` and torch, on the CPU and the GPU in use."""
    random.seed(text)
    seed = random.getrandbits(63)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms: much for a worker
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def read_image(path: str | Path) -> Tensor:
    """Read an image file as RGB, uint8 (3, H, W), whatever its own mode and format are.

    torchvision decodes JPEGs twice as fast as Pillow; Pillow reads everything else. EXIF rotation
    is ignored, as in the official code. Raises UserError, which names the file, if it is damaged.
    """
    try:
        with open(path, "rb") as file:
            is_jpeg = file.read(2) == b"\xff\xd8"
        if is_jpeg:
            # Pillow takes what torchvision cannot decode, or all if torchvision has no decoder.
            with contextlib.suppress(RuntimeError, AttributeError):
                return torchvision.io.decode_image(str(path), mode="RGB")
        with Image.open(path) as file:
            if file.mode.startswith("I"):  # 16 bits, of which the upper eight are kept
                grey = TF.pil_to_tensor(file.convert("I"))
                return (grey >> 8).to(torch.uint8).expand(3, -1, -1)
            return TF.pil_to_tensor(file.convert("RGB"))
    except Exception as error:  # each decoder has its own
        raise UserError(f"cannot read image {path} ({error}): replace it and run again") from error


IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")


class FolderDataset(Dataset):
    """Images in ROOT/<class>/*, at any depth below the class.

    The key (epoch, index) gives a training sample: its randomness follows from (seed, epoch, index)
    alone, so it is the same in any process, worker and restart. The key index gives an image for
    evaluation. Both return (transform(image), label).

    Images are recognized by the ending of their name. What begins with a dot is left out, because
    systems and notebooks put copies there. Copy IMAGE_ENDINGS, read_image and seed_generators too.

    Args:
        root: folder of the class folders.
        transform: function of a uint8 image (3, H, W).
        seed: seed of the training samples.
        classes: class names in the order of their labels; None takes the sorted folders. With the
            names of the training images, validation images get the same labels; a class without
            validation images is allowed.

    Raises UserError for no such folder, a class without images, or a class that is not in classes.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable | None = None,
        seed: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        self.transform = transform
        self.seed = seed
        self.samples = []  # (path, label)
        self.left_out = 0  # files that are no images by their name
        need = "--data DIR needs images in DIR/train/<class>/ and DIR/val/<class>/"
        try:
            folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        except OSError as error:
            raise UserError(f"cannot read {root} ({error.strerror}): {need}") from error
        folders = [name for name in folders if not name.startswith(".")]
        self.classes = folders if classes is None else classes
        for name in folders:
            if name not in self.classes:
                raise UserError(f"{root} has the class {name}, which training has not: remove it")
            files = []
            for folder, below, names in os.walk(f"{root}/{name}", followlinks=True):
                below[:] = [child for child in below if not child.startswith(".")]
                files += [f"{folder}/{file}" for file in names if not file.startswith(".")]
            images = sorted(file for file in files if file.lower().endswith(IMAGE_ENDINGS))
            if not images:
                endings = ", ".join(IMAGE_ENDINGS)
                raise UserError(f"{root}/{name} has no file that ends in {endings}: {need}")
            label = self.classes.index(name)
            self.samples += [(file, label) for file in images]
            self.left_out += len(files) - len(images)
        if not folders or len(self.classes) < 2:
            raise UserError(f"{root} has class folders {folders}, but two are needed: {need}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index = key
        if isinstance(key, tuple):
            epoch, index = key
            seed_generators(f"sample {self.seed} {epoch} {index}")
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


@dataclass
class MicroBatches:
    """One process's micro-batches of keys (epoch, index); the batch_sampler of a DataLoader.

    In each epoch all images are shuffled by (seed, epoch) and cut into global batches; the rest is
    dropped (official run_class_finetuning.py:431). Each process takes its part of each global
    batch, one micro-batch after the other. Put together, the processes always have the same images
    in the same order, however many they are. PyTorch's DistributedSampler does not do that, and
    cannot start in the middle of an epoch.

    Args:
        num_images: number of training images.
        batch_size: size of the global batch.
        micro_batch_size: images on one device at once.
        steps: the optimizer steps to make, counted from the start of the run. A resumed run begins
            in the middle. One DataLoader serves the whole run.
        seed: seed of the shuffle.
        rank: number of this process.
        world: number of processes.

    Raises ValueError if batch_size is not a multiple of world * micro_batch_size, or more than
    num_images.
    """

    num_images: int
    batch_size: int
    micro_batch_size: int
    steps: range
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        unit = self.world * self.micro_batch_size
        if self.batch_size % unit or self.batch_size > self.num_images:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of {unit} = world * "
                f"micro_batch_size, or it is more than {self.num_images} images"
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        per_process = self.batch_size // self.world
        shuffled = -1  # epoch
        for step in self.steps:
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if epoch != shuffled:
                seed = random.Random(f"shuffle {self.seed} {epoch}").getrandbits(63)
                generator = torch.Generator().manual_seed(seed)
                order = torch.randperm(self.num_images, generator=generator).tolist()
                shuffled = epoch
            first = step_of_epoch * self.batch_size + self.rank * per_process
            for i in range(first, first + per_process, self.micro_batch_size):
                yield [(epoch, index) for index in order[i : i + self.micro_batch_size]]


@dataclass(frozen=True)
class Process:
    """One process of a run: the device it drives, and its place among the others."""

    device: torch.device
    amp_dtype: torch.dtype | None  # of autocast; None is float32 throughout
    rank: int = 0
    world: int = 1


@dataclass
class DeviceBatches:
    """This process's micro-batches as train_step takes them, from optimizer step `first` on.

    Loader workers give uint8 images (N, 3, S, S) and labels (N,). On the device, the images become
    float32, normalized, erased, and mixed if MixUp or CutMix is on; mixed labels are probabilities
    (N, num_classes). Drop path draws from the generators in the forward pass that follows, so that
    each micro-batch must be used before the next is taken.
    """

    dataset: FolderDataset
    plan: Plan
    process: Process
    first: int
    waited: float = 0.0  # seconds spent waiting for the workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan
        device = self.process.device
        rank = self.process.rank
        alphas = {v2.MixUp: plan.mixup, v2.CutMix: plan.cutmix}
        classes = len(self.dataset.classes)
        mixes = [mix(alpha=a, num_classes=classes) for mix, a in alphas.items() if a > 0]
        steps = range(self.first, plan.total_steps)
        sizes = [plan.num_images, plan.batch_size, plan.micro_batch_size]
        keys = MicroBatches(*sizes, steps, plan.seed, rank, self.process.world)
        pin = device.type == "cuda"
        loader = DataLoader(
            self.dataset, batch_sampler=keys, num_workers=plan.workers, pin_memory=pin
        )
        samples = iter(loader)
        for step in steps:
            for i in range(plan.accumulation):
                began = time.perf_counter()
                images, labels = next(samples)
                self.waited += time.perf_counter() - began
                place = rank * plan.accumulation + i  # of the micro-batch in the global batch
                seed_generators(f"device {plan.seed} {step} {place}")
                images = normalize(images.to(device, non_blocking=True))
                labels = labels.to(device, non_blocking=True)
                random_erasing(images, plan.random_erasing)
                if mixes:
                    images, labels = random.choice(mixes)(images, labels)
                yield images, labels


# ------------------------------------------------------------------------------------ training
#
# Precision. Weights, gradients, AdamW's averages and the EMA are float32: a step of 1e-6 would
# vanish in a bf16 weight, which has eight significant bits. Autocast computes matrix products and
# convolutions in bf16 or fp16; most of the time and memory goes there. Norms, the residual stream,
# the head and the loss stay in float32. bf16 has the range of float32. fp16 does not, and small
# gradients become 0. So the GradScaler multiplies the loss by a large factor before the backward
# pass and divides the gradients by it before the step. If they overflow, it skips the step and
# halves the factor: the weights stay, the EMA averages the same weights once more, and the schedule
# goes on by one step. This happens a few times at the start, now and then later, and is no error.
#
# Batch and devices. A global batch of 2048 images does not fit into a GPU, so each device computes
# its part in micro-batches. The losses are means, so the gradient of the batch is the mean of the
# gradients of its micro-batches: backward() adds them up on a device, and DistributedDataParallel
# averages them over the devices, once per step. Nothing in the model depends on the other images of
# a batch, as batch norm would. So any split of the batch gives the same step, up to rounding.
#
# Memory. Each parameter needs 20 bytes: weight, gradient, AdamW's two averages and the EMA. That is
# 1.7 GB for ViT-B/16 and 6.1 GB for ViT-L/14, whatever the batch. The rest are activations, which
# grow with the micro-batch. Gradient checkpointing keeps only the input of each block and computes
# the block a second time in the backward pass.


def train_step(
    model: nn.Module,
    micro_batches: Iterator[tuple[Tensor, Tensor]],
    accumulation: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
) -> Tensor:
    """One optimizer step on one global batch, in `accumulation` micro-batches of equal size.

    Each loss is divided by `accumulation`, so that the sum of the gradients is the gradient of the
    mean over the whole batch: one GPU with accumulation 8 makes the same step as eight GPUs.

    Label smoothing moves a share of the target probability from the label to all classes alike.
    Without it the logits grow without bound, and wrong labels are believed as firmly as right ones.

    Args:
        model: from images to logits (N, num_classes), plain or in DistributedDataParallel. It is
            put in training mode.
        micro_batches: iterator, on the model's device: normalized images (N, 3, S, S), and labels
            (N,) or probabilities (N, num_classes).
        accumulation: number of micro-batches to take from it.
        optimizer: with the learning rates of this step.
        scaler: enabled for fp16, disabled otherwise.
        amp_dtype: of autocast, or None for float32 throughout.
        label_smoothing: share of the probability that is spread over all classes.
        clip_grad: largest norm of the gradient, 0 is off.

    Returns the mean loss of this process's images, on the device: reading it waits for the GPU.
    Raises ValueError if there are too few micro-batches; the weights are then unchanged.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    total_loss = 0.0
    for i in range(accumulation):
        images, labels = next(micro_batches, (None, None))
        if images is None:
            raise ValueError(f"micro_batches ended after {i} of {accumulation}")
        sync = contextlib.nullcontext()
        if i < accumulation - 1 and hasattr(model, "no_sync"):
            sync = model.no_sync()  # DDP exchanges gradients once, with the last micro-batch
        with sync:
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            loss = loss / accumulation
            scaler.scale(loss).backward()
        total_loss = total_loss + loss.detach()
    if clip_grad > 0:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)  # divides the gradients by its factor, or skips the step
    scaler.update()
    return total_loss


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of each named model, in one pass over the images. Copy all_sum too.

    Accuracy is a ratio of counts. Each process counts its own share of the images, and the counts
    are summed, so each image counts once. A distributed sampler that repeats images until all
    shares are equal gives slightly wrong numbers, as in the official code
    (run_class_finetuning.py:275-281).

    Args:
        models: from images to logits (N, num_classes), on one device. They are put in evaluation
            mode.
        batches: normalized images (N, 3, S, S) and labels (N,), such as a DataLoader's.
        amp_dtype: of autocast, or None.

    Returns NAME_top1 and NAME_top5 in per cent for each model, and the number of "images".
    """
    device = next(next(iter(models.values())).parameters()).device
    counts = torch.zeros(len(models), 3, dtype=torch.long, device=device)  # top-1, top-5, images
    for images, labels in batches:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        for row, model in zip(counts, models.values()):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model.eval()(images)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, at most 5)
            row[0] += hits[:, 0].sum()
            row[1] += hits.sum()
            row[2] += len(labels)
    result = {}
    for name, (top1, top5, total) in zip(models, all_sum(counts).tolist()):
        result[f"{name}_top1"] = 100 * top1 / total
        result[f"{name}_top5"] = 100 * top5 / total
    return result | {"images": total}


def eval_loader(dataset: Dataset, process: Process, workers: int, batch_size: int) -> DataLoader:
    """Batches of this process's share of a data set, in which each image is in one process."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(process.rank, len(dataset), process.world),  # any iterable of indices
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
    )


def mean_losses(losses: list[Tensor], model: nn.Module, step: int, world: int) -> list[float]:
    """Losses of the last steps, each as the mean over the processes.

    Raises UserError, in all processes, if a loss or a weight is not finite: a run that has diverged
    must stop before it is saved, and last.pt is from before. Waits for the GPU.
    """
    means = all_sum(torch.stack(losses) / world).tolist()
    # A finite loss can have an infinite gradient, which shows in the weights.
    norms = torch._foreach_norm(list(model.parameters()))
    if not math.isfinite(sum(means) + torch.stack(norms).sum().item()):
        raise UserError(
            f"loss {means[-1]:g} or a weight is not finite at step {step}: resume from last.pt "
            "with --amp none, or start anew with a lower --lr"
        )
    return means


LOG_STEPS = 20  # between reports, because reading a loss waits for the GPU


def train(
    plan: Plan,
    process: Process,
    classifier: CLIPClassifier,
    train_set: FolderDataset,
    val_set: FolderDataset,
    output: Path,
    state: dict | None = None,
) -> Iterator[dict]:
    """A run: optimizer steps, and an evaluation after each epoch.

    Each step sets the learning rate of each group, makes a train_step and updates the EMA. After
    each epoch the raw and the EMA weights are evaluated. best.pt gets the EMA weights whenever
    their top-1 is the highest so far or equals it. That is how the paper's numbers are chosen, on
    the images on which they are reported; the last epoch's are lower (84.7 instead of 85.7 for
    ViT-B/16). last.pt gets all that is needed to resume: weights, EMA, optimizer, scaler, step and
    history. It is written at the start and at the end, every save_minutes within an epoch, and
    after an epoch if a tenth of that has passed since the last time.

    It is a generator that yields what happens, and the caller prints it.

    Args:
        classifier: on the device.
        output: folder for last.pt and best.pt, which rank 0 writes.
        state: contents of last.pt, to go on from there. The run then enters the loop in the
            middle; nothing else distinguishes it.

    Yields every LOG_STEPS steps {"step", "loss", "lr", "steps", "waited"}: the number of steps
    done, loss and lr of the last one, and since the last report the number of steps and the seconds
    of waiting for data. Yields after each epoch {"history"}: a record for each epoch so far, with
    accuracies if it was evaluated.
    Raises UserError if the loss or the weights are not finite.
    """
    num_layers = len(classifier.trunk.transformer["resblocks"])
    groups = param_groups(classifier, num_layers, plan.lr, plan.layer_decay, plan.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.amp_dtype == torch.float16)
    ema = EMA(classifier, plan.ema_decay)
    parts = {"model": classifier, "ema": ema.module, "optimizer": optimizer, "scaler": scaler}
    step = 0  # optimizer steps done
    history = []
    loss_sum = 0.0  # of the steps of this epoch
    if state is not None:
        for name, part in parts.items():
            if state[name]:  # the scaler of a run that was not in fp16 has nothing
                part.load_state_dict(state[name])
        step = state["step"]
        history = state["history"]
        loss_sum = state["loss_sum"]
        state.clear()  # gigabytes that the run does not need any more

    model = torch.compile(classifier) if plan.compile else classifier
    if dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    batches = DeviceBatches(train_set, plan, process, first=step)
    micro_batches = iter(batches)
    val_batches = eval_loader(val_set, process, plan.workers, plan.micro_batch_size)
    about = {"model_config": classifier.config, "classes": train_set.classes, "plan": plan.fixed()}

    def save_last() -> None:
        nonlocal saved
        saved = time.monotonic()
        if process.rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            progress = {"step": step, "history": history, "loss_sum": loss_sum}
            save_checkpoint(output / "last.pt", about | states | progress)

    saved = time.monotonic()
    if state is None:
        save_last()  # a disk that is full or read-only shows now, not after hours
    losses = []
    for epoch in range(len(history), plan.epochs):
        epoch_end = (epoch + 1) * plan.steps_per_epoch
        while step < epoch_end:
            lr = lr_at(step, plan.total_steps, plan.warmup_steps, plan.lr, plan.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss = train_step(
                model,
                micro_batches,
                plan.accumulation,
                optimizer,
                scaler,
                process.amp_dtype,
                plan.label_smoothing,
                plan.clip_grad,
            )
            ema.update(classifier)
            losses.append(loss)
            step += 1
            if step % LOG_STEPS == 0 or step == epoch_end:
                means = mean_losses(losses, classifier, step, process.world)
                loss_sum += sum(means)
                speed = {"steps": len(losses), "waited": batches.waited}
                yield {"step": step, "loss": means[-1], "lr": lr} | speed
                losses.clear()
                batches.waited = 0.0
                if time.monotonic() - saved >= 60 * plan.save_minutes:
                    save_last()

        record = {"epoch": epoch + 1, "train_loss": loss_sum / plan.steps_per_epoch}
        record["lr"] = optimizer.param_groups[-1]["lr"]  # of the head
        if (epoch + 1) % plan.eval_every == 0 or epoch + 1 == plan.epochs:
            models = {"raw": classifier, "ema": ema.module}
            record |= evaluate(models, val_batches, process.amp_dtype)
            past = [other.get("ema_top1", -1.0) for other in history]
            if process.rank == 0 and record["ema_top1"] >= max(past, default=-1.0):
                weights = {"ema": ema.module.state_dict(), "record": record}
                save_checkpoint(output / "best.pt", about | weights)
        history.append(record)
        loss_sum = 0.0
        yield {"history": history}
        # Not after each epoch: with few images, it is shorter than the writing of gigabytes. These
        # seconds are a tenth of save_minutes.
        if time.monotonic() - saved >= 6 * plan.save_minutes or step == plan.total_steps:
            save_last()


# ------------------------------------------------------------------------------------ files
#
# The recipe is complete above. Here weights are read, and checkpoints are written and read.


def model_config(model: str | dict) -> dict:
    """Configuration of a plain vision transformer: {"quick_gelu": bool, "vision_cfg": {...}}.

    Args:
        model: open_clip name, path of a JSON file as open_clip and its hub have them, or the
            contents of such a file.

    Raises UserError for an unknown model, or one with parts that VisionTransformer does not have.
    """
    import open_clip  # not at the top: it takes a second, for which --help need not wait

    if isinstance(model, dict):
        config = model
    elif os.path.isfile(model):
        try:
            config = json.loads(Path(model).read_text())
        except ValueError as error:
            raise UserError(f"--model {model} is not valid JSON ({error}): correct it") from error
    else:
        config = open_clip.get_model_config(model) or {}
    config = config.get("model_cfg", config)  # the hub's files have it one level down
    if "vision_cfg" not in config:
        raise UserError(
            f"--model {model} is neither a file nor an open_clip model such as ViT-B-16"
        )
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
    vision |= {"head_width": 64, "mlp_ratio": 4.0, "no_ln_pre": False}
    without_effect = ("pool_type", "final_ln_after_pool", "output_tokens")  # about the output
    for key, value in config["vision_cfg"].items():
        if key in vision and not isinstance(value, list):  # a ResNet has a list of layers
            vision[key] = value
        elif value and key not in without_effect:
            raise UserError(
                f"--model {model} is not a plain ViT such as ViT-B-16: it has {key} {value}"
            )
    return {"quick_gelu": config.get("quick_gelu", False), "vision_cfg": vision}


def pretrained_tag(model: str | dict, pretrained: str) -> dict:
    """What open_clip knows about a tag of a model: where its weights are and their activation.

    Raises UserError if there is no such tag.
    """
    import open_clip

    tag = open_clip.get_pretrained_cfg(str(model), pretrained)
    if not tag:
        tags = ["none", *open_clip.list_pretrained_tags_by_model(str(model))]
        raise UserError(f"--pretrained {pretrained} is no file and no tag: give one of {tags}")
    return tag


def read_weights(model: str | dict, pretrained: str) -> dict:
    """Contents of a weights file or a tag: a state dict, or a dict that has one inside.

    A tag is downloaded once. A file may be OpenAI's TorchScript archive, safetensors, or from
    torch.save; nothing in a pickle is executed. Raises UserError if it cannot be had or read.
    """
    import open_clip
    import safetensors.torch

    is_file = os.path.isfile(pretrained)
    tag = {} if is_file else pretrained_tag(model, pretrained)
    try:
        path = pretrained if is_file else open_clip.download_pretrained(tag)
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        # Training scripts often save their flags, an argparse.Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return dict(torch.load(path, map_location="cpu", weights_only=True))
            except RuntimeError:  # perhaps it is TorchScript, as OpenAI's own files are
                return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception as error:  # the hub, zip, pickle, safetensors and torch each have their own
        reason = str(error).split(". ")[0]  # torch goes on to advise weights_only=False
        raise UserError(
            f"cannot load --pretrained {pretrained} ({reason}): give a good file, or a tag with a "
            "network; without both, see From scratch in README"
        ) from error


def needs_quick_gelu(model: str | dict, pretrained: str) -> bool:
    """Whether a model with these weights uses QuickGELU. Downloads nothing.

    open_clip itself does not switch QuickGELU on for OpenAI's weights, but its list of tags knows
    which weights need it. A best.pt has its activation inside, and OpenAI's files are known by
    their contents. For another file, the configuration of the model must say that it is QuickGELU.
    Raises UserError if nothing tells.
    """
    configured = model_config(model)["quick_gelu"]
    if pretrained == "none":
        return configured
    if not os.path.isfile(pretrained):
        return pretrained_tag(model, pretrained).get("quick_gelu", False)
    contents = read_weights(model, pretrained)
    if "model_config" in contents:  # a best.pt or last.pt of this program
        return contents["model_config"]["quick_gelu"]
    if not configured and "input_resolution" not in contents:  # which only OpenAI's own files have
        raise UserError(
            f"--pretrained {pretrained} does not say its activation: give --quick-gelu for weights "
            "of OpenAI, MetaCLIP, DFN or LAION-400M's ViT-B-32, else --no-quick-gelu"
        )
    return True


def load_weights(model: str | dict, pretrained: str) -> dict[str, Tensor]:
    """Weights of a trunk, named as in VisionTransformer, from a tag or from a file.

    They may be of an image encoder or a whole CLIP, also under a key such as "model", with any
    prefix before the names. Raises UserError if they cannot be had, or are not of a ViT.
    """
    weights = read_weights(model, pretrained)
    for key in ("state_dict", "ema", "model", "model_ema"):
        weights = weights.get(key, weights)

    # The trunk is where conv1 is: behind "visual." in a whole CLIP, "module.visual." after DDP,
    # "trunk." in a best.pt of this program. Other parts are left behind.
    prefixes = [name[: -len("conv1.weight")] for name in weights if name.endswith("conv1.weight")]
    if len(prefixes) != 1:
        names = ", ".join(list(weights)[:3])
        raise UserError(
            f"--pretrained {pretrained} has {names} instead of open_clip's names: give open_clip's "
            "file of these weights, or its tag"
        )
    prefix = prefixes[0]
    trunk = {name[len(prefix) :]: weights[name] for name in weights if name.startswith(prefix)}
    for unused in ("proj", "ln_post.weight", "ln_post.bias"):
        trunk.pop(unused, None)
    return trunk


FORMAT = "ftclip 3"  # of checkpoints; another number when they change


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write tensors and plain values to a file, so that it always is the old or the new one, whole.

    The file is written beside and renamed when it is complete. Raises UserError if it cannot be
    written, for example on a full disk.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state | {"format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before the name points to it
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # the disk's error behind torch's
        raise UserError(f"cannot write {path} ({cause}): make room, or write elsewhere") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # it is still there after a failure


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, to the CPU. Only tensors and plain values are accepted.

    Raises UserError for a file that is missing, damaged, or not of this format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checks the checksums, which torch.load does not
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, zlib, pickle and torch each have their own
        reason = str(error).split(". ")[0]  # torch goes on to advise weights_only=False
        raise UserError(f"cannot read checkpoint {path} ({reason}): give a whole one") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, not {FORMAT}: it is of another version")
    return state


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[CLIPClassifier, list[str], Callable]:
    """A trained model for use, with the EMA weights of a best.pt or last.pt.

    Copy build_model and what it needs, eval_transform, normalize and load_checkpoint with it.

    Returns the model in evaluation mode, the class names in the order of its outputs, and the
    transform from an image of read_image or Pillow to the float32 (3, S, S) that it takes. Raises
    UserError for a file that is not a checkpoint of this program.
    """
    state = load_checkpoint(path)
    model = build_model(state["model_config"], len(state["classes"]))
    model.load_state_dict(state["ema"])
    image_size = model.config["vision_cfg"]["image_size"]
    transform = functools.partial(eval_transform, image_size=image_size)
    return model.eval().to(device), state["classes"], transform


# ------------------------------------------------------------------------------------ the program
#
# Here flags become a run, and what the user should know is printed.

# A tiny ViT from scratch. Nothing is pretrained, so that all layers learn at one pace.
DEMO_FLAGS = {
    "model": {"vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4}},
    "output": "runs/demo",
    "pretrained": "none",
    "layer_decay": 1.0,
    "lr": 1e-3,
    "batch_size": 64,
    "epochs": 12,
    "warmup_epochs": 1.0,
    "crop_scale": 0.5,
}
DEMO_CLASSES = ("pillars", "stripes", "checkerboard", "rings")


def parse_flags(argv: list[str] | None = None) -> Config:
    """Config from the command line."""
    parser = argparse.ArgumentParser(
        prog="ftclip",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # `given` has only the flags that were given
        allow_abbrev=False,
    )
    help_texts = dict(re.findall(r"    (\w+): .*  # (.*)", inspect.getsource(Config)))
    for field in fields(Config):
        name = "--" + field.name.replace("_", "-")
        help = help_texts[field.name]
        if field.default not in (None, False):
            help += f"; default: {field.default}"
        kind = (get_args(field.type) or [field.type])[0]  # float of float | None
        choices = get_args(kind) or None  # of a Literal
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=help)
        else:
            if kind not in (int, float):
                kind = os.path.expanduser  # of a path; any other text stays as it is
            parser.add_argument(name, type=kind, choices=choices, help=help)
    given = vars(parser.parse_args(argv))
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "RANK" not in os.environ:
        parser.error("srun started several tasks: let torchrun start the processes, see README")
    if given.get("demo"):
        given = DEMO_FLAGS | given
    config = Config(**given)
    if config.eval != (config.checkpoint is not None):
        parser.error("--eval and --checkpoint FILE go together: give both or none")
    if config.eval and config.image_size is not None:
        parser.error("--eval uses the image size of the checkpoint: leave out --image-size")
    if config.workers is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))  # those that a container or SLURM allows
        config.workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return config


def start_process(config: Config) -> Process:
    """The device and precision of this process. Under torchrun it joins the others."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() if config.device is None else config.device == "cuda"
    amp = config.amp or "none"
    if on_gpu:
        torch.cuda.set_device(local_rank)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        amp = config.amp or ("bf16" if bf16 else "fp16")
    if "RANK" in os.environ and not config.dry_run:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp]
    device = torch.device(f"cuda:{local_rank}" if on_gpu else "cpu")
    return Process(device, amp_dtype, rank, world)


def draw_demo(root: Path) -> None:
    """Draw the demo's images, 32x32 pixels: four patterns in two colours, 750 + 150 of each."""
    generator = torch.Generator().manual_seed(0)
    part = root.with_name(root.name + ".part")  # renamed when it is complete
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    for i in range(3600):
        wave, left, top = torch.rand(3, generator=generator)
        wave = 0.6 + 0.4 * wave  # radians per pixel
        x = (columns - 32 * left) * wave
        y = (rows - 32 * top) * wave
        pattern = [x.sin(), y.sin(), x.sin() * y.sin(), x.hypot(y).sin()][i % 4]
        colours = torch.randint(256, (2, 3), generator=generator, dtype=torch.uint8)
        pixels = colours[(pattern > 0).long()]  # (32, 32, 3)
        folder = part / ("train" if i < 3000 else "val") / DEMO_CLASSES[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:04d}.png")
    part.rename(root)


def print_plan(plan: Plan, process: Process, model: CLIPClassifier) -> None:
    """Four tables: the recipe and what differs from it, the batch, the schedule, lr by layer."""
    recipe = RECIPES[plan.recipe]
    name, size = plan.recipe
    print(f"Recipe: {name} at {size} pixels, {recipe.top1} % top-1 on ImageNet-1k in the paper")
    print(f"  {'':20} {'recipe':>10} {'this run':>24}")
    for key, value in asdict(recipe).items():
        print(f"  {key:20} {value!s:>10} {getattr(plan, key, '')!s:>24}")
    print(
        f"""Batch: {plan.num_images:,} training images, {plan.steps_per_epoch:,} steps per epoch
  {plan.batch_size} images per step = {process.world} device(s) x {plan.micro_batch_size} image(s) \
x {plan.accumulation} micro-batch(es)
  device {process.device.type}, autocast to {process.amp_dtype}, {plan.workers} worker(s) per device
Schedule: {plan.epochs} epochs, {plan.total_steps:,} steps
  warm-up  {plan.warmup_steps:>8,} steps, lr of the head from 0 to {plan.lr:.3g}
  cosine   {plan.total_steps - plan.warmup_steps:>8,} steps, to {plan.min_lr:.3g}
  EMA      {1 / (1 - plan.ema_decay):>8,.0f} steps of memory"""
    )
    num_layers = len(model.trunk.transformer["resblocks"])
    groups = param_groups(model, num_layers, plan.lr, plan.layer_decay, plan.weight_decay)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"Layers: {trained:,} parameters are trained")
    print(f"  activation {'QuickGELU' if model.config['quick_gelu'] else 'GELU'}")
    for layer in range(num_layers + 1, -1, -1):
        members = [group for group in groups if group["layer"] == layer]
        if members:
            names = [name for group in members for name in group["names"]]
            text = ", ".join(names) if layer in (0, num_layers + 1) else f"block {layer - 1}"
            print(f"  {layer:>2}  lr {members[0]['lr']:.2e}  {text}")


def print_reports(reports: Iterator[dict], plan: Plan, process: Process, output: Path) -> None:
    """Run `train`: print what it yields and write the records of the epochs to metrics.jsonl."""
    began = time.perf_counter()
    for report in reports:
        if process.rank > 0:
            continue
        seconds = time.perf_counter() - began
        if "step" in report:
            speed = report["steps"] / seconds
            left = timedelta(seconds=round((plan.total_steps - report["step"]) / speed))
            waiting = report["waited"] / seconds
            text = "step {step:,}  loss {loss:.4f}  lr {lr:.2e}".format(**report)
            text += f"  {speed * plan.batch_size:,.0f} images/s  {waiting:.0%} waiting for data"
            if process.device.type == "cuda":
                text += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            print(f"{text}  {left} left", end="\r" if sys.stdout.isatty() else "\n", flush=True)
        else:
            history = report["history"]
            last = history[-1]
            text = "epoch {epoch}  train loss {train_loss:.4f}".format(**last)
            if "ema_top1" in last:
                for key in ("raw_top1", "ema_top1"):
                    best = max(reversed(history), key=lambda record: record.get(key, -1.0))
                    text += f"  {key} {last[key]:.2f} %"
                    text += f" (best {best[key]:.2f} in epoch {best['epoch']})"
            print(text.ljust(100))
            text = "".join(json.dumps(line) + "\n" for line in [{"plan": asdict(plan)}, *history])
            (output / "metrics.jsonl").write_text(text)
        began = time.perf_counter()
    best = output / "best.pt"
    content = "has the EMA weights of the best epoch on val" if best.exists() else "is gone"
    if process.rank == 0:
        print(f"Finished: {best} {content}")


def load_last(
    output: Path, plan: Plan, vision: dict, classes: list[str], process: Process
) -> dict | None:
    """Contents of last.pt if the run has begun before, else None.

    Raises UserError if going on would mix two runs or overwrite weights.
    """
    last = output / "last.pt"
    now = plan.fixed() | vision | {"classes": classes}
    state = None
    if last.exists():
        state = load_checkpoint(last)
        if "optimizer" not in state:
            raise UserError(f"{last} has weights only, from a best.pt: give another --output")
        before = state["plan"] | state["model_config"]["vision_cfg"] | {"classes": state["classes"]}
        changes = [f"{key} {before[key]} → {now[key]}" for key in now if now[key] != before[key]]
        if changes:
            raise UserError(
                f"{last} is from another run ({', '.join(changes)[:300]}): "
                "give its flags, or another --output"
            )
    elif (output / "best.pt").exists():
        raise UserError(f"{output} has a best.pt, but no last.pt: give another --output")
    if process.world > 1:
        views = [None] * process.world
        dist.all_gather_object(views, (now, state["step"] if state else 0))
        if any(view != views[0] for view in views):
            raise UserError(f"processes see different images, or another {last}: share both")
    return state


def run_eval(config: Config, process: Process) -> None:
    """Print the accuracy of --checkpoint on DIR/val."""
    model, classes, transform = load_classifier(config.checkpoint, process.device)
    val_set = FolderDataset(f"{config.data or 'imagenet'}/val", transform, classes=classes)
    batches = eval_loader(val_set, process, config.workers, config.micro_batch_size or 64)
    result = evaluate({"model": model}, batches, process.amp_dtype)
    if process.rank == 0:
        size = model.config["vision_cfg"]["image_size"]
        print(f"{config.checkpoint} on {result['images']} images of {size} pixels:", end=" ")
        print(f"top-1 {result['model_top1']:.3f} %, top-5 {result['model_top5']:.3f} %")


def open_folders(config: Config, data: Path, process: Process) -> tuple[Dataset, Dataset]:
    """Training and validation images, without their transforms. Draws the demo's."""
    if config.demo and not config.dry_run:
        if process.rank == 0 and not data.is_dir():
            draw_demo(data)
        all_sum(torch.zeros(1))  # the other processes wait here until the images are drawn
    train_set = FolderDataset(data / "train", seed=config.seed)
    if train_set.left_out and process.rank == 0:
        print(f"Left out: {train_set.left_out} files for training that do not end in .jpg or such")
    return train_set, FolderDataset(data / "val", classes=train_set.classes)


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say. Nothing but the demo's images is written before all is checked."""
    config = parse_flags(argv)
    process = start_process(config)
    if config.eval:
        run_eval(config, process)
        return

    model = config.model
    vision = model_config(model)["vision_cfg"]
    config.image_size = vision["image_size"] = config.image_size or vision["image_size"]
    output = Path(config.output or f"runs/{Path(model).stem}-{config.image_size}")
    data = Path(config.data or (output / "data" if config.demo else "imagenet"))
    if config.dry_run and config.data is None and not data.is_dir():
        # A dry run without images is of ImageNet or of the demo.
        num_images, num_classes = (3000, 4) if config.demo else (IMAGENET_IMAGES, 1000)
    else:
        train_set, val_set = open_folders(config, data, process)
        num_images, num_classes = len(train_set), len(train_set.classes)
    plan = resolve(config, vision["layers"], num_images, process.world)

    state = None
    if not plan.dry_run:
        state = load_last(output, plan, vision, train_set.classes, process)
    pretrained = plan.pretrained
    step = 0
    if state is not None:
        step = state["step"]
        model = state["model_config"]  # with the activation
        pretrained = "none"  # because the state has the weights
    torch.manual_seed(plan.seed)
    with torch.device("meta" if plan.dry_run else "cpu"):  # meta: shapes without numbers
        classifier = build_model(
            model,
            num_classes,
            pretrained,
            plan.image_size,
            plan.quick_gelu,
            plan.drop_path,
            plan.train_blocks,
            plan.freeze_patch_embed,
        )
    if process.rank == 0:
        print_plan(plan, process, classifier)
        print(f"Output: {output}, from step {step:,}", flush=True)
    if plan.dry_run:
        return

    classifier.trunk.grad_checkpointing = plan.grad_checkpointing
    classifier.to(process.device)
    randaug = RandAugment(plan.randaug) if plan.randaug > 0 else None
    train_set.transform = train_transform(plan.image_size, plan.crop_scale, randaug)
    val_set.transform = functools.partial(eval_transform, image_size=plan.image_size)
    reports = train(plan, process, classifier, train_set, val_set, output, state)
    print_reports(reports, plan, process, output)


def run() -> int:
    """main(), with a UserError as one sentence instead of a traceback. Returns the exit status."""
    try:
        main()
        return 0  # without destroy_process_group(), in which gloo of torch 2.6 can wait for ever
    except UserError as error:
        text = str(error)
    except KeyboardInterrupt:
        text = "stopped: the same command resumes from last.pt"
    except torch.OutOfMemoryError:
        text = "the GPU has not enough memory: halve --micro-batch-size, the batch stays the same"
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # rank 0 has most likely said the same, and torchrun now ends this process
    # After an error in a loader worker, the text is a traceback that ends with the sentence.
    text = text.split("UserError: ")[-1].replace("\n", " ")
    print(f"ftclip: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run())
