"""ftclip: fine-tune CLIP's image encoder with the FT-CLIP recipe, in one file.

"CLIP Itself is a Strong Fine-tuner" (Dong et al., arXiv 2212.06138) fine-tunes CLIP ViT-B/16 to
85.7 % and ViT-L/14 to 88.0 % top-1 on ImageNet-1k. A small learning rate with layer-wise decay, an
exponential moving average (EMA) of the weights, a short schedule and careful augmentation are
enough. The only new parameters are a LayerNorm and a linear head.

    python ftclip.py --demo                                       # no data and no GPU needed
    torchrun --nproc_per_node 8 ftclip.py --model ViT-B-16        # the 85.7 % recipe on ./imagenet
    python ftclip.py --model ViT-B-16                             # the same recipe on one GPU
    python ftclip.py --model ViT-L-14 --image-size 336 --dry-run  # print the plan, write nothing
    python ftclip.py --data flowers                               # a folder of your own
    python ftclip.py --eval runs/imagenet-ViT-B-16-224/best.pt

Put images into folders as in ImageNet: DIR/train/<class>/* and DIR/val/<class>/*. A run writes
last.pt (to resume), best.pt (to use) and metrics.jsonl to --output. The same command resumes it.
To use best.pt in Python:

    model, classes, transform = load_classifier("runs/flowers-ViT-B-16-224/best.pt")
    scores = model(transform(read_image("rose.jpg"))[None]).softmax(-1)  # (1, number of classes)

All accuracies here are the paper's. They have not been measured with this file. It needs Python
3.10, torch 2.6, torchvision 0.21 and open_clip_torch 3, or newer.

Read from top to bottom. The method ends with the part "few images". The last part, "the program",
has flags, files and printing. To use a piece elsewhere, copy it with the imports and with
the names on the right, in the order of this file. If a name on the right has a row of its own, copy
that row too.

    lr_at, EMA, train_step, CLIPClassifier                nothing more
    RandAugment, train_transform, random_erasing          nothing more
    explain                 UserError
    param_groups            layer_id, also if you pass a layer_of for the names of your model
    normalize               CLIP_MEAN, CLIP_STD
    eval_transform          to_rgb, normalize
    read_image              to_rgb, explain
    FolderDataset           read_image, seed_generators, IMAGE_ENDINGS
    resolve                 Recipe, UserError
    micro_batch_keys        Recipe
    evaluate                all_sum
    build_model             the part "model", model_config, read_weights, explain
    save_checkpoint         rank_and_world, FORMAT, UserError
    load_checkpoint         FORMAT, explain
    load_classifier         build_model, eval_transform, load_checkpoint

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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal, get_args

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
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

# ------------------------------------------------------------------------------------ in short
#
# CLIP has learned features from 400 million images with captions. Fine-tuning adapts them to the
# classes of a data set. The danger is losing them on the way: the usual settings for fine-tuning
# lose some of them. Figure 1 of the paper shows this for ViT-B/16, at 224 pixels in all rows but
# the last. Each row keeps the changes above it:
#
#     change                                                        top-1   effect
#     (the usual fine-tuning settings)                              82.3 %
#     smaller learning rate                                         84.3 %  weights stay near CLIP's
#     EMA of the weights, decay 0.9998                              84.6 %  noise is averaged out
#     learning rate decays from layer to layer, by 0.6              85.3 %  low layers change least
#     fewer epochs, 50 instead of 100 (*)                           85.2 %  half of the compute
#     weaker augmentation, without MixUp and CutMix (*)             85.7 %  one object, one label
#     384 pixels, lr 7e-4 instead of 6e-4, patch embedding trained  86.6 %  more detail
#
# (*) The figure names these two changes without their values. 50 epochs, no MixUp and no CutMix are
# the final recipe's. The row halves the compute, so the rows above it presumably have 100 epochs.
# The learning rates of the first two rows are not known either.
#
# The model is CLIP's vision transformer with a new head: LayerNorm, mean over the patch tokens, and
# a linear layer. One optimizer step, with AdamW on a global batch of 2048 images:
#
#     set the learning rate of each layer (lr_at, param_groups), train_step, update the EMA
#
# After each epoch both the raw and the EMA weights are evaluated. What the official log of ViT-B/16
# shows: after one epoch the raw weights have 52 % top-1 and the EMA 20 %, because the EMA still
# remembers the starting weights. After ten epochs both have 82 %. The EMA is best after thirty of
# the fifty epochs, with 85.7 %.
#
# With few images, the batch is smaller, the lr half as large, the EMA shorter and, if needed, the
# run longer. The part "few images" says how.

# ------------------------------------------------------------------------------------ recipe


@dataclass
class Recipe:
    """The numbers that decide the result of a run. The values here are ViT-B/16's at 224 pixels.

    Each field but the last two is a flag, and its comment is the flag's help text. A flag that you
    give is used as given. One that you leave out has the value here, or what its comment calls the
    default. "Nearest run" is the one of the paper's four runs below that has the same depth and the
    closest image size.
    """

    # Model.
    model: str | dict = "ViT-B-16"  # open_clip's name of a plain ViT, or a JSON configuration file
    pretrained: str = "openai"  # open_clip tag, weights file, or none for random weights
    quick_gelu: bool | None = None  # QuickGELU instead of GELU; default: what the weights need
    image_size: int = 224  # side in pixels; default: the model's
    train_blocks: int | None = None  # train the last K blocks, 0: norm and head; default: all
    freeze_patch_embed: bool = True  # keep conv1 as it is; default: the nearest run's

    # Optimization.
    lr: float = 6e-4  # peak learning rate of the head; default: the nearest run's or half
    min_lr: float = 1e-6  # learning rate of the head at the end
    layer_decay: float = 0.60  # lr of a layer over that of the next; default: nearest run's
    epochs: int = 50  # passes over the images; default: nearest run's, at least 500 steps
    warmup_epochs: float = 10.0  # epochs of rising lr; default: same fraction as in nearest run
    batch_size: int = 2048  # images per step on all devices; default: nearest run's or fewer
    weight_decay: float = 0.05  # weight decay of AdamW, 0 is off
    ema_decay: float = 0.9998  # 0: the EMA equals the weights; default: the nearest run's or less
    clip_grad: float = 0.0  # largest norm of the gradient, 0 is off

    # Augmentation and regularization.
    randaug: float = 9.0  # mean magnitude of RandAugment, at most 10, 0 is off
    random_erasing: float = 0.25  # probability of a box of noise, 0 is off
    crop_scale: float = 0.08  # smallest area of a crop as a share of the image
    mixup: float = 0.0  # alpha of MixUp, 0 is off
    cutmix: float = 0.0  # alpha of CutMix, 0 is off; with MixUp too, one of them is drawn each time
    label_smoothing: float = 0.1  # share of a label that is spread over all classes
    drop_path: float = 0.0  # drop path rate of the last block, 0 is off

    seed: int = 0  # seed of everything random

    # Counted in the training folder, not flags.
    num_images: int = 1_281_167  # ImageNet's
    num_classes: int = 1000

    @property
    def steps_per_epoch(self) -> int:
        """Images that do not fill a last batch are left out. Each epoch leaves out others."""
        return self.num_images // self.batch_size  # official run_class_finetuning.py:431

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        steps = round(self.warmup_epochs * self.steps_per_epoch)
        return min(steps, self.total_steps - 1)  # a run of one step must not have lr 0


# The paper's four runs. Source: the official scripts and logs. All start from OpenAI's weights for
# 224 pixels. At 384 and 336 pixels a patch shows less of the scene than in pretraining, so conv1,
# the patch embedding, is trained too.
B16 = Recipe()
L14 = Recipe(model="ViT-L-14", lr=4e-4, layer_decay=0.65, epochs=30, warmup_epochs=5.0)
L14_336 = replace(L14, image_size=336, lr=6e-4, batch_size=1920, freeze_patch_embed=False)
RECIPES = [
    # (recipe, its micro-batch: the most images that a GPU computes at once)  # top-1, ImageNet-1k
    (B16, 256),  # 85.7 %
    (replace(B16, image_size=384, lr=7e-4, freeze_patch_embed=False), 64),  # 86.6 %
    (L14, 64),  # 88.0 %
    (L14_336, 20),  # 88.3 %
]

# ------------------------------------------------------------------------------------ model


class Attention(nn.Module):
    """Multi-head self-attention, with the parameter names of nn.MultiheadAttention and of CLIP."""

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

    With GELU in its place the weights still load, but each block computes something slightly
    different, and accuracy is lost without a warning.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # silu(y) is y * sigmoid(y), and keeps only y for backward


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    In training, drop path leaves out each of the two branches of a sample with probability
    `drop_path` (arXiv 1603.09382). It draws from torch's global generator. The part "data" seeds
    that for each micro-batch, so that a resumed run draws the same.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, quick_gelu: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(hidden, width),
            )
        )
        self.drop_path = torchvision.ops.StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to (N, tokens, width). A float32 x stays float32 under autocast."""
        x = x + self.drop_path(self.attn(self.ln_1(x)))
        x = x + self.drop_path(self.mlp(self.ln_2(x)))
        return x


class VisionTransformer(nn.Module):
    """CLIP's image encoder without its last norm and projection: the trunk of the classifier.

    Parameters have open_clip's names, so open_clip's state dicts load with strict=True. The first
    seven arguments are the keys of open_clip's "vision_cfg". Image and patch size are in pixels.
    Pixels at the right and the bottom that fill no patch are not seen. `no_ln_pre` leaves out the
    norm before the first block, which CLIP has and most other ViTs do not. `drop_path` is the rate
    of the last block. It grows linearly from 0 at the first block.
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
        positions = 1 + (image_size // patch_size) ** 2  # the class token's and the patches'
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(positions, width) * width**-0.5)
        self.ln_pre = nn.Identity() if no_ln_pre else nn.LayerNorm(width)
        blocks = nn.ModuleList()
        for i in range(layers):
            rate = drop_path * i / max(1, layers - 1)
            hidden = int(width * mlp_ratio)
            blocks.append(Block(width, width // head_width, hidden, quick_gelu, rate))
        self.transformer = nn.ModuleDict({"resblocks": blocks})  # open_clip's name of the blocks
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, S, S) to tokens (N, 1 + patches, width), class token first.

        Under autocast, conv1 returns bf16 or fp16. The class token and the positions are float32,
        so that concatenation and addition promote the tokens to float32, and each block adds to a
        float32 residual stream. 12 or 24 blocks add small updates to a large sum, for which the
        eight significant bits of bf16 are too few.
        """
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, width)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)
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
    projection act on the class token only. They lead to the space that CLIP shares with text, and a
    classifier does not need that. The patch tokens together describe the whole image. A new
    LayerNorm brings them to one scale before they are averaged.

    The head starts a thousand times smaller than usual, so its first predictions are uniform. As
    long as a head is mostly random, it sends random directions to the trunk, and AdamW follows them
    whatever their size. In the paper's run of ViT-B/16 the small head has outgrown its random start
    after about 20 steps, in which the learning rate is still near 0. A head of the usual size would
    need about 600.

    `trunk` is any module from images (N, 3, S, S) to tokens (N, 1 + patches, width), class token
    first. Source: official models/finetune_clip.py:167-175, 230-231.
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            self.head.weight.mul_(0.001)
            self.head.bias.mul_(0.001)  # nn.Linear's bias is random, and the official code keeps it

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (N, 3, S, S) to float32 logits (N, num_classes)."""
        tokens = self.trunk(images)[:, 1:]  # (N, patches, width)
        features = self.norm(tokens).mean(dim=1)  # (N, width)
        # In bf16 the two largest logits are often equal, and the order of the classes would decide.
        # So the head computes outside autocast, in the dtype of the weights.
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features.to(self.norm.weight.dtype))


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings for another image size: (1 + old^2, width) to (1 + grid^2, width).

    The class token's position stays as it is. The others are interpolated bicubically without
    antialias, as in the paper's runs. open_clip resizes with antialias. With antialias PyTorch uses
    another cubic kernel, so the results differ even when the grid grows. The result is float32.

    Source: official run_class_finetuning.py:360-385.
    """
    positions = positions.float()
    old = math.isqrt(len(positions) - 1)
    if old == grid:
        return positions
    square = positions[1:].T.reshape(1, -1, old, old)  # (1, width, old, old)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T])


def load_trunk(trunk: VisionTransformer, weights: dict[str, Tensor]) -> None:
    """Put CLIP's weights, under open_clip's names, into a trunk of any image size, as float32.

    For another image size, such as 384 or 336, the positions are resized here. Raises RuntimeError
    or KeyError if a name is missing or unknown, or a shape differs.
    """
    grid = math.isqrt(len(trunk.positional_embedding) - 1)
    weights = {name: weight.float() for name, weight in weights.items()}
    weights["positional_embedding"] = resize_positions(weights["positional_embedding"], grid)
    # build_model makes the trunk on the meta device, where it has no memory to copy weights into.
    # With assign, the tensors themselves become its parameters.
    trunk.load_state_dict(weights, assign=True)


def freeze(
    model: CLIPClassifier, train_blocks: int | None = None, freeze_patch_embed: bool = False
) -> None:
    """Choose what is trained. The new norm and the head always are.

    train_blocks: None trains the whole trunk, and so does a number of all blocks or more. A smaller
    K trains the last K blocks and freezes the rest of the trunk. In the paper, training half of the
    blocks is nearly as good as training all (Figure 3). 0 is linear probing, and the new norm.

    freeze_patch_embed: conv1 stays as it is. The paper freezes it at 224 pixels, where it sees what
    it saw in pretraining, and trains it at larger sizes.
    """
    blocks = model.trunk.transformer["resblocks"]
    if train_blocks is not None and train_blocks < len(blocks):
        model.trunk.requires_grad_(False)
        frozen = len(blocks) - train_blocks
        blocks[frozen:].requires_grad_(True)
    if freeze_patch_embed:
        model.trunk.conv1.requires_grad_(False)


# ------------------------------------------------------------------------------------ optimization
#
# The learning rate matters most. A large one soon overwrites the pretrained weights, and the model
# then learns from the new images alone, as from scratch. The recipe's 6e-4 is large, but only the
# new norm and head have it. With a layer decay of 0.6, the middle of ViT-B/16 has about 2e-5.
#
# A short schedule is enough because little has to be learned. In the paper, a run of 100 epochs is
# best at about half of its epochs and then overfits (Figure 2). Even the runs of 50 and 30 epochs
# are best before their end: in the published logs, the best EMA comes at 56 to 67 % of the run.


def layer_id(name: str, num_layers: int) -> int:
    """Layer of a parameter of CLIPClassifier, whose trunk has num_layers blocks.

    The embeddings are layer 0, block i is layer i + 1, norm and head are layer num_layers + 1. For
    another model write such a function for its names. In timm's ViTs, for example, the blocks are
    "blocks.<i>.", norm and head are "norm.", "fc_norm.", "attn_pool." and "head.", and the
    embeddings are "cls_token", "reg_token", "pos_embed", "patch_embed." and "norm_pre.". Inside a
    CLIPClassifier their names begin with "trunk.".

    Raises ValueError for an unknown name. Source: official optim_factory.py:22-39.
    """
    block = re.match(r"trunk\.transformer\.resblocks\.(\d+)\.", name)
    if block and int(block[1]) < num_layers:
        return int(block[1]) + 1
    if re.match(r"trunk\.(class_embedding|positional_embedding|conv1\.|ln_pre\.)", name):
        return 0
    if name.startswith(("norm.", "head.")):
        return num_layers + 1
    raise ValueError(f"layer_id knows no layer of {name} in a model of {num_layers} blocks")


def param_groups(
    model: nn.Module,
    num_layers: int,
    lr: float,
    layer_decay: float,
    weight_decay: float,
    layer_of: Callable[[str, int], int] = layer_id,
) -> list[dict]:
    """AdamW's parameter groups, with a learning rate that decays from the head to the embeddings.

    Low layers of CLIP see edges and textures, which hardly depend on the task. High layers see what
    the task is about. So layer i has the learning rate lr * layer_decay ** (num_layers + 1 - i).
    For ViT-B/16 with lr 6e-4, min_lr 1e-6 and layer_decay 0.6:

        layer                                        scale            peak lr  last lr
        13   norm, head                              0.6^0  = 1       6.0e-4   1.0e-6
        12   block 11                                0.6^1  = 0.6     3.6e-4   6.0e-7
        11   block 10                                0.6^2  = 0.36    2.2e-4   3.6e-7
        ...
         6   block 5                                 0.6^7  = 0.028   1.7e-5   2.8e-8
        ...
         1   block 0                                 0.6^12 = 0.0022  1.3e-6   2.2e-9
         0   class and positional embedding, ln_pre  0.6^13 = 0.0013  7.8e-7   1.3e-9
             (and conv1, where it is trained)

    A group's "lr" is its peak. The schedule must set it before each optimizer step, with the scale:
    `group["lr"] = lr_at(...) * group["lr_scale"]`.

    Biases, norms, and class and positional embeddings have no weight decay, as in the official
    code. These are parameters of one dimension, and those whose names end in _embedding, _token or
    pos_embed. Decay is meant for weight matrices. Biases, norms and embeddings only set offsets and
    scales. Frozen parameters are in no group.

    The model must not be wrapped in DDP or torch.compile, which change the names. `layer_of` is
    layer_id, or a function like it for your model. Returns at most two groups per layer, from the
    embeddings up, with the keys "params", "names", "layer", "lr", "lr_scale" and "weight_decay".
    Raises ValueError unless each layer from 0 to num_layers + 1 has a parameter. A mistake in
    layer_of or num_layers would otherwise go unnoticed.

    Source: official optim_factory.py:60, run_class_finetuning.py:441.
    """
    layer_by_name = {name: layer_of(name, num_layers) for name, _ in model.named_parameters()}
    found = sorted(set(layer_by_name.values()))
    if found != list(range(num_layers + 2)):
        raise ValueError(f"layer_of finds the layers {found}, not each of 0 to {num_layers + 1}")
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_by_name[name]
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
    of squared gradients, which is unreliable while it has seen few of them. And while the head has
    learned little, the gradients that reach the trunk say little. The cosine ends the run
    with small learning rates, so that the weights settle.

    Steps count from 0. Step 0 of a warm-up has 0: it only fills AdamW's averages, as in the
    official code. The peak comes twice: at the last step of a warm-up of at least two steps, and at
    the first step of the cosine. From total_steps on, the result is min_lr. Pass the head's lr and
    min_lr, and multiply the result by a group's "lr_scale".

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
    1.7 points above the best raw weights. (The 0.3 points of Figure 1 are from an earlier row, with
    one learning rate for all layers.)

    The average covers about 1 / (1 - decay) steps: 5,000 for the paper's 0.9998, which are eight
    epochs of ImageNet. It begins as a copy of the weights, and at first it still consists mostly of
    those. In a run that is not much longer than 5,000 steps, choose a smaller decay. With decay 0
    it is a copy of the weights.

    Move `model` to its device first, and pass it neither compiled nor wrapped in DDP. `module` is
    the averaged model, in evaluation mode. Source: official engine_for_finetuning.py:92.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is not at least 0 and less than 1")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call it after each optimizer step, not after each micro-batch."""
        for average, weight in zip(self.module.parameters(), model.parameters()):
            average.lerp_(weight, 1 - self.decay)
        for average, buffer in zip(self.module.buffers(), model.buffers()):
            average.copy_(buffer)  # CLIP has none; those of batch norm are averages already


# ------------------------------------------------------------------------------------ augmentation
#
# Augmentation shows each image differently in each epoch, which keeps a large model from learning
# the images by heart. RandAugment and random erasing distort an image, but it still shows one
# object with one label, and they stay in the recipe. MixUp and CutMix blend two images
# and their labels, and the final recipe leaves them out.
#
# The path of a training image:
#
#     in a loader worker, uint8:  read_image, crop and resize, flip, RandAugment
#     on the device, float32:     normalize, random_erasing, MixUp or CutMix if they are on

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels from 0 to 1: red, green, blue
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class RandAugment:
    """RandAugment (arXiv 1909.13719) as in the paper: timm's rand-m9-mstd0.5-inc1.

    "inc1" means that no operation becomes weaker as the magnitude grows. In timm without inc1,
    Posterize and Solarize become weaker. All constants below are timm's.

    Of fifteen operations, num_ops are drawn with replacement. Each is applied with the given
    probability, with a magnitude from N(magnitude, std) clipped to [0, 10]. Rotations, shears,
    shifts and enhancements go either way, equally often. torchvision's RandAugment(2, 9) is
    something else: 30 % of full strength where this has 90 %, always applied, nearest-neighbour and
    with black borders.

    Called with an RGB Pillow image, it returns one. All randomness comes from the module `random`.
    To add an operation, add its name to OPS and its case to `apply`.
    """

    OPS: ClassVar = (
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
        "Color", "Contrast", "Brightness", "Sharpness",
        "ShearX", "ShearY", "TranslateX", "TranslateY",
    )  # fmt: skip

    magnitude: float = 9.0
    std: float = 0.5
    num_ops: int = 2
    probability: float = 0.5
    fill: tuple[int, int, int] = (123, 117, 104)  # 255 * CLIP_MEAN: what lies outside the image

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
                zeroed = 4 + int(4 * strength)  # low bits set to 0; with all 8 the image is black
                return image.point([value & (255 << zeroed) for value in range(256)] * 3)
            case "Solarize":
                return ImageOps.solarize(image, 256 - int(256 * strength))
            case "SolarizeAdd":
                added = [value + int(110 * strength) for value in range(128)]
                return image.point([*added, *range(128, 256)] * 3)
            case "Color" | "Contrast" | "Brightness" | "Sharpness":
                enhancer = getattr(ImageEnhance, op)(image)
                return enhancer.enhance(max(0.1, 1 + 0.9 * signed))
            case "ShearX":
                return self.affine(image, (1, 0.3 * signed, 0, 0, 1, 0))
            case "ShearY":
                return self.affine(image, (1, 0, 0, 0.3 * signed, 1, 0))
            case "TranslateX":
                return self.affine(image, (1, 0, 0.45 * signed * image.width, 0, 1, 0))
            case "TranslateY":
                return self.affine(image, (1, 0, 0, 0, 1, 0.45 * signed * image.height))

    def affine(self, image: Image.Image, matrix: tuple) -> Image.Image:
        """With (a, b, c, d, e, f), pixel (x, y) becomes the one at (ax + by + c, dx + ey + f)."""
        mode = Image.Transform.AFFINE
        bicubic = Image.Resampling.BICUBIC
        return image.transform(image.size, mode, matrix, bicubic, fillcolor=self.fill)


def train_transform(
    image_size: int, crop_scale: float = 0.08, randaug: Callable | None = None
) -> Callable:
    """The transform of training images, from uint8 (3, H, W) to uint8 (3, image_size, image_size).

    A crop of 8 to 100 % of the area shows objects at many sizes, and often only a part of one.
    `randaug` is RandAugment() or another function from Pillow image to Pillow image. To add an
    augmentation, add it to the list. `normalize` and `random_erasing` must follow, on the batch.

    The crop is taken and resized on the tensor, which is faster than on a Pillow image. The result
    is uint8, because bytes are copied to the GPU in a quarter of the time of floats. All randomness
    comes from the global generators of `random` and torch.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [
        v2.RandomResizedCrop(image_size, scale=(crop_scale, 1.0), interpolation=bicubic),
        v2.RandomHorizontalFlip(),
    ]
    if randaug is not None:
        steps += [TF.to_pil_image, randaug, TF.pil_to_tensor]
    return v2.Compose(steps)


def normalize(images: Tensor) -> Tensor:
    """uint8 images (..., 3, H, W) to float32 with CLIP_MEAN and CLIP_STD, as CLIP was trained."""
    images = images.float() / 255
    for channel in range(3):  # with Python floats: a tensor of means would need a copy to the GPU
        images[..., channel, :, :].sub_(CLIP_MEAN[channel]).div_(CLIP_STD[channel])
    return images


def eval_transform(image: Tensor | Image.Image, image_size: int) -> Tensor:
    """Transform of an image for evaluation: resize its short side, take the middle, normalize.

    The crop has the full height or width (crop ratio 1.0). The usual ratio of 0.875 cuts away an
    eighth of the height and of the width, and objects with it.

    Takes uint8 (3, H, W) or a Pillow image, returns float32 (3, image_size, image_size). Raises
    ValueError for other tensors. Source: official datasets.py:76-84.
    """
    if isinstance(image, Image.Image):
        image = to_rgb(image)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image is uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}")
    image = TF.resize(image, [image_size], interpolation=v2.InterpolationMode.BICUBIC)
    return normalize(TF.center_crop(image, [image_size]))


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Random erasing (arXiv 1708.04896): a box of some images becomes noise, in place.

    Takes normalized images (N, C, H, W). The model must then recognize an object from the rest of
    it. The box covers 2 to 33 % of the image, with a height / width from 0.3 to 1 / 0.3,
    log-uniform. It is filled with N(0, 1) per pixel and channel, the mean and variance of a
    normalized image.

    Boxes are drawn from the module `random`, noise from torch's generator of the device.
    """
    height, width = images.shape[2:]
    for image in images:
        if random.random() >= probability:
            continue
        for _ in range(10):  # tries for a box that is smaller than the image
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            if h < height and w < width:
                top = random.randint(0, height - h)
                left = random.randint(0, width - w)
                image[:, top : top + h, left : left + w].normal_()
                break
    return images


# ------------------------------------------------------------------------------------ data
#
# A resumed run must equal one that was never stopped, and one device must give the same run as
# eight, up to rounding. So nothing is drawn from a generator whose state would have to be saved.
# The generators are seeded from a string, and then ordinary random functions are called:
#
#     "sample SEED EPOCH INDEX"   in a loader worker, before an image is cropped and recoloured
#     "device SEED STEP PLACE"    on a device, before a micro-batch is erased and mixed
#
# PLACE is the number of the micro-batch in the global batch. A data set takes the key (epoch,
# index) and gives (image, label), like FolderDataset in the program. `options` are the program's
# Options: micro_batch_size, device, workers and others.


def seed_generators(text: str) -> None:
    """Seed the global generators of `random` and torch, on the CPU and the GPU in use."""
    random.seed(text)
    seed = random.getrandbits(63)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits all backends: slow
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, and the number of processes. torchrun starts one for each device."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def micro_batch_keys(
    recipe: Recipe, micro_batch_size: int, first_step: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Keys (epoch, index) of one process's micro-batches, from step first_step to the run's end.

    In each epoch all images are shuffled by (seed, epoch) and cut into micro-batches. The process
    `rank` of `world` takes every world-th of them. So each micro-batch has the same images whatever
    the number of processes, and a run can begin in the middle of an epoch. PyTorch's
    DistributedSampler does neither.
    """
    first_epoch, step_of_epoch = divmod(first_step, recipe.steps_per_epoch)
    done = step_of_epoch * recipe.batch_size  # images already used in the first epoch
    used = recipe.steps_per_epoch * recipe.batch_size  # images used in an epoch
    for epoch in range(first_epoch, recipe.epochs):
        order = list(range(recipe.num_images))
        random.Random(f"shuffle {recipe.seed} {epoch}").shuffle(order)
        for i in range(done + rank * micro_batch_size, used, world * micro_batch_size):
            yield [(epoch, index) for index in order[i : i + micro_batch_size]]
        done = 0


def load_samples(recipe: Recipe, options: "Options", dataset: Dataset, first_step: int) -> Iterator:
    """Start the loader workers, which give this process's micro-batches from step first_step on.

    They give uint8 images (N, 3, S, S) and labels (N,). One DataLoader serves the whole run, since
    the epoch is a part of the key.
    """
    rank, world = rank_and_world()
    keys = micro_batch_keys(recipe, options.micro_batch_size, first_step, rank, world)
    pin = options.device == "cuda"
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=options.workers, pin_memory=pin)
    return iter(loader)


def device_batches(
    recipe: Recipe, options: "Options", samples: Iterator, first_step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of load_samples on the device: float32, normalized, erased, perhaps mixed.

    Mixed labels are probabilities (N, num_classes). Drop path draws from the generators in the
    forward pass that follows, so each micro-batch must be used before the next is taken. To add an
    augmentation of whole batches, add it here.
    """
    rank, world = rank_and_world()
    mixes = []
    if recipe.mixup > 0:
        mixes.append(v2.MixUp(alpha=recipe.mixup, num_classes=recipe.num_classes))
    if recipe.cutmix > 0:
        mixes.append(v2.CutMix(alpha=recipe.cutmix, num_classes=recipe.num_classes))
    for step in range(first_step, recipe.total_steps):
        for place in range(rank, recipe.batch_size // options.micro_batch_size, world):
            images, labels = next(samples)
            seed_generators(f"device {recipe.seed} {step} {place}")
            images = normalize(images.to(options.device, non_blocking=True))
            labels = labels.to(options.device, non_blocking=True)
            random_erasing(images, recipe.random_erasing)
            if mixes:
                images, labels = random.choice(mixes)(images, labels)
            yield images, labels


def eval_batches(dataset: Dataset, options: "Options") -> DataLoader:
    """Batches of this process's share of a data set. Each image is in exactly one share."""
    rank, world = rank_and_world()
    return DataLoader(
        dataset,
        batch_size=options.micro_batch_size,
        sampler=range(rank, len(dataset), world),  # any iterable of indices
        num_workers=options.workers,
        pin_memory=options.device == "cuda",
        persistent_workers=options.workers > 0,  # they need not start anew after each epoch
    )


# ------------------------------------------------------------------------------------ training
#
# Precision. Weights, gradients, AdamW's averages and the EMA are float32: a step of 1e-6 would
# vanish in a bf16 weight, which has eight significant bits. Autocast computes matrix products and
# convolutions in bf16 or fp16. Most of the time and memory goes there. Norms, the residual stream,
# the head and the loss stay in float32. bf16 has the range of float32. fp16 does not, and small
# gradients become 0. So the GradScaler multiplies the loss by a large factor before the backward
# pass and divides the gradients by it before the step. If they overflow, it skips the step and
# halves the factor: the weights stay, the EMA averages the same weights once more, and the schedule
# goes on by one step. This happens a few times at the start and occasionally later. It is not an
# error. A loss that is infinite or NaN is one, and stops the run at the next report.
#
# Batch and devices. A global batch of 2048 images does not fit into a GPU, so each device computes
# its part in micro-batches. The losses are means, so the gradient of the batch is the mean of the
# gradients of its micro-batches: backward() adds them up on a device, and DistributedDataParallel
# averages them over the devices, once per step. Unlike with batch norm, the output of an image does
# not depend on the others in its batch. So any split of a batch gives the same gradient, up to
# rounding. Erasing, MixUp, CutMix and drop path draw from one seed for each micro-batch. So another
# micro-batch size gives other noise. Another number of devices, with the same micro-batch size,
# does not.
#
# Memory. Each trained parameter needs 20 bytes: weight, gradient, AdamW's two averages and EMA.
# A frozen one needs 8. That is 1.7 GB for ViT-B/16 and 6.1 GB for ViT-L/14, whatever the batch. The
# rest are activations, which grow with the micro-batch. Gradient checkpointing keeps only the input
# of each block and computes the block a second time in the backward pass.


def train_step(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    accumulation: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
) -> Tensor:
    """One optimizer step on one global batch, in `accumulation` micro-batches of equal size.

    Each loss is divided by `accumulation`, so that the gradients add up to the gradient of the mean
    loss over this device's images. DDP then averages over the devices. So one GPU with accumulation
    8 makes the same step as eight GPUs.

    Label smoothing moves a share of the target probability from the label to all classes alike.
    Without it the loss rewards ever larger logits, for wrong labels too. Mixed labels are smoothed
    in the same way.

    `batches` is an iterator. It gives normalized images (N, 3, S, S), and labels (N,) or
    probabilities (N, num_classes), on the model's device. The optimizer has the learning rates of
    this step. The scaler is enabled for fp16 only: torch.amp.GradScaler(enabled=False) does
    nothing. `clip_grad` 0 is off. Returns the mean loss of this process's images, on the device:
    reading it waits for the GPU. Raises StopIteration, before the weights change, if there are too
    few micro-batches.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    mean_loss = 0.0
    for i in range(accumulation):
        images, labels = next(batches)
        context = contextlib.nullcontext()
        if i < accumulation - 1 and hasattr(model, "no_sync"):
            context = model.no_sync()  # DDP exchanges gradients once, with the last micro-batch
        with context:
            with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            loss = loss / accumulation
            scaler.scale(loss).backward()
        mean_loss = mean_loss + loss.detach()
    if clip_grad > 0:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)  # divides the gradients by its factor, or skips the step
    scaler.update()
    return mean_loss


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
    """Top-1 and top-5 accuracy in per cent of each named model, in one pass over the images.

    Accuracy is a ratio of counts. Each process counts its own share of the images, and the counts
    are summed, so each image counts once. A distributed sampler that repeats images until all
    shares are equal gives slightly wrong numbers, as in the official code
    (run_class_finetuning.py:275-281).

    Batches are normalized images (N, 3, S, S) and labels (N,). For {"a": model} the result has the
    keys "a_top1", "a_top5" and "images". With up to five classes, top-5 is 100. The models are left
    in evaluation mode.
    """
    device = next(next(iter(models.values())).parameters()).device
    counts = torch.zeros(len(models), 2, dtype=torch.long, device=device)  # top-1, top-5
    total = torch.zeros(1, dtype=torch.long, device=device)
    for images, labels in batches:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        total += len(labels)
        for i, model in enumerate(models.values()):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits = model.eval()(images)
            best = logits.topk(min(5, logits.shape[1])).indices  # (N, at most 5)
            hits = best == labels[:, None]
            counts[i, 0] += hits[:, 0].sum()
            counts[i, 1] += hits.sum()
    result = {"images": all_sum(total).item()}
    for name, (top1, top5) in zip(models, all_sum(counts).tolist()):
        result[f"{name}_top1"] = 100 * top1 / result["images"]
        result[f"{name}_top5"] = 100 * top5 / result["images"]
    return result


LOG_STEPS = 20  # between reports
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


def train(
    recipe: Recipe,
    options: "Options",
    classifier: CLIPClassifier,
    train_set: "FolderDataset",
    val_set: "FolderDataset",
    state: dict,
) -> None:
    """The whole method put together. `state` is last.pt, or {} for a new run.

    The paper chooses the epoch with the best EMA top-1 on the validation images, and reports it on
    the same images. So its number is slightly optimistic: the last epoch of ViT-B/16 has 84.7
    instead of 85.7 %. best.pt has the EMA weights of the best epoch, and of equal ones the last.
    last.pt has all that is needed to resume. `Progress`, in the program, saves both and prints.
    """
    num_layers = len(classifier.trunk.transformer["resblocks"])
    groups = param_groups(
        classifier, num_layers, recipe.lr, recipe.layer_decay, recipe.weight_decay
    )
    # betas and eps are PyTorch's defaults, as in the official code
    optimizer = torch.optim.AdamW(groups, fused=True)
    scaler = torch.amp.GradScaler(options.device, enabled=options.amp == "fp16")
    ema = EMA(classifier, recipe.ema_decay)
    models = {"raw": classifier, "ema": ema.module}
    parts = {"model": classifier, "ema": ema.module, "optimizer": optimizer, "scaler": scaler}
    progress = Progress(recipe, options, train_set.classes, parts, state)

    wrapped = torch.compile(classifier) if options.compile else classifier
    if dist.is_initialized():
        # As views into DDP's buckets, gradients are stored once and not twice.
        wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True)
    _, world = rank_and_world()
    accumulation = recipe.batch_size // (world * options.micro_batch_size)
    amp_dtype = AMP_DTYPES[options.amp]
    smoothing = recipe.label_smoothing
    clip_grad = recipe.clip_grad
    eval_every = options.eval_every or recipe.epochs
    # All loader workers start now: a fork beside busy threads may hang.
    samples = load_samples(recipe, options, train_set, progress.step)
    batches = device_batches(recipe, options, samples, progress.step)
    val_batches = eval_batches(val_set, options)
    iter(val_batches)

    for step in range(progress.step, recipe.total_steps):
        lr = lr_at(step, recipe.total_steps, recipe.warmup_steps, recipe.lr, recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss = train_step(
            wrapped, batches, accumulation, optimizer, scaler, amp_dtype, smoothing, clip_grad
        )
        ema.update(classifier)

        progress.step = step + 1
        progress.loss_sum = progress.loss_sum + loss
        epoch, rest = divmod(step + 1, recipe.steps_per_epoch)
        if step % LOG_STEPS > 0 and rest > 0:
            continue  # to read a loss, the CPU must wait for the GPU
        progress.report(lr)
        if rest == 0:
            due = epoch == recipe.epochs or epoch % eval_every == 0
            accuracy = evaluate(models, val_batches, amp_dtype) if due else {}
            progress.finish_epoch(accuracy, lr)
        progress.save_when_due()


# ------------------------------------------------------------------------------------ few images


def resolve(nearest: Recipe, given: dict, devices: int = 1) -> Recipe:
    """The recipe of a run: what is given, else that of the nearest run, adjusted for few images.

    Examples with one device and ViT-B/16 at 224 pixels: 1,500 images give batch size 32, 46 steps
    per epoch, lr 3e-4, 50 epochs with 10 of warm-up, and an EMA over 368 of 2,300 steps. 100 images
    give batch size 32, 3 steps per epoch, lr 3e-4, 167 epochs with 33.4 of warm-up, and an EMA over
    80 of 501 steps. benchmarks/README.md has the experiments behind the rules.
    """
    recipe = replace(nearest, **given)
    if not 0 <= recipe.ema_decay < 1:
        raise UserError(f"--ema-decay {recipe.ema_decay} is not at least 0 and less than 1")

    # Batch: the recipe's, or with fewer images the largest power of two that leaves 32 steps per
    # epoch, because with too few optimizer steps the model underfits. But at least 32 images: the
    # gradient of fewer is mostly noise, in which CLIP's features are lost. If the devices do not
    # divide it, each gets a multiple of eight images, which can be cut evenly into micro-batches.
    largest = 2 ** int(math.log2(max(32, recipe.num_images // 32)))
    default_batch = min(nearest.batch_size, largest, recipe.num_images)
    if "batch_size" not in given:
        per_device = max(1, default_batch // devices)
        if default_batch % devices and per_device > 8:
            per_device -= per_device % 8
        recipe.batch_size = devices * per_device
    possible = min(recipe.batch_size, recipe.num_images) // devices * devices
    if recipe.batch_size != possible or possible < 1:
        raise UserError(
            f"a batch of {recipe.batch_size} images must be a multiple of {devices} device(s) and "
            f"at most {recipe.num_images}, such as {possible}: change --batch-size or the devices"
        )

    # Learning rate: with few images, half the recipe's. On a model half as wide as ViT-B, ten pairs
    # of runs showed no difference between 3e-4 and 6e-4, but 2.4e-3 lost the pretrained features on
    # two of three sets. A wider model seems to want a lower lr, so half is the safer side.
    # If you choose a batch k times smaller than the default, lr is divided by sqrt(k). It makes k
    # times the steps, and since AdamW divides out the size of a gradient, noise moves the weights
    # by about lr * sqrt(steps) (arXiv 2205.10287). A larger batch keeps the lr.
    if "lr" not in given:
        if default_batch < nearest.batch_size:
            recipe.lr /= 2
        if "batch_size" in given:
            recipe.lr *= math.sqrt(min(1.0, recipe.batch_size / default_batch))
        # With train_blocks 0, a linear probe, there are no features to lose, and the head has far
        # to go from zero. With 32 times the lr it comes near logistic regression in our few runs.
        if recipe.train_blocks == 0:
            recipe.lr *= 32

    # Schedule: the recipe's epochs, but at least 500 steps, which the new head needs to learn.
    # Warm-up keeps its share of the epochs.
    if "epochs" not in given:
        recipe.epochs = max(nearest.epochs, math.ceil(500 / recipe.steps_per_epoch))
    if "warmup_epochs" not in given:
        recipe.warmup_epochs = nearest.warmup_epochs * recipe.epochs / nearest.epochs
    if recipe.warmup_epochs >= recipe.epochs:
        raise UserError(f"--warmup-epochs {recipe.warmup_epochs:g} leaves no epoch: lower it")

    # EMA: the recipe's decay averages over about 1 / (1 - decay) = 5,000 steps, 16 % of the run of
    # ViT-B/16 and 27 % of that of ViT-L/14. A shorter run keeps this share. After 500 steps, an
    # EMA over 5,000 steps would still consist of the starting weights to 90 %.
    if "ema_decay" not in given:
        share = min(1.0, recipe.total_steps / nearest.total_steps)
        recipe.ema_decay = max(0.0, 1 - (1 - nearest.ema_decay) / share)

    if "freeze_patch_embed" not in given and recipe.pretrained == "none":
        recipe.freeze_patch_embed = False  # random weights must be trained
    return recipe


# ------------------------------------------------------------------------------------ the program
#
# The method is complete above. Here flags become a run, and files are read and written.


class UserError(ValueError):
    """A mistake that the user can correct. The program prints it as one sentence."""


@contextlib.contextmanager
def explain(what: str) -> Iterator[None]:
    """Turn whatever a reader of files raises into a UserError that begins with `what`."""
    try:
        yield
    except Exception as error:  # JSON, zip, pickle, decoders, torch and the hub: each has its own
        reason = str(error).split(". ")[0]  # torch's next sentence suggests weights_only=False
        raise UserError(f"{what} ({reason})") from error


@dataclass
class Options:
    """Where and how a run is computed. These flags may change when it is resumed.

    Results then differ by rounding. Another micro_batch_size, device or compile also draws other
    noise for erasing, mixing and drop path, and eval_every decides which epochs best.pt is chosen
    from. data may move, if its images stay the same. Only their number and classes are compared.
    """

    data: str = "imagenet"  # folder with train/<class>/* and val/<class>/*
    output: str = ""  # folder of the run's files; default: runs/DATA-MODEL-SIZE
    micro_batch_size: int = 0  # most images that a device computes at once; default: the paper's
    grad_checkpointing: bool = False  # compute the blocks twice: slower, much less memory
    workers: int = min(8, os.cpu_count() or 1)  # loader processes per device
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto is cuda if there is a GPU
    amp: Literal["auto", "bf16", "fp16", "none"] = "auto"  # autocast; auto is none on a CPU
    compile: bool = False  # torch.compile: minutes to start, then faster steps
    save_minutes: float = 10.0  # minutes between saves of last.pt
    eval_every: int = 1  # epochs between evaluations, 0: only after the last epoch
    dry_run: bool = False  # print the plan and write nothing
    demo: bool = False  # train a tiny ViT on images that the script draws
    eval: str = ""  # best.pt or last.pt to evaluate on DIR/val; default: train instead


def model_config(model: str | dict) -> dict:
    """Configuration of a plain vision transformer: {"quick_gelu": bool, "vision_cfg": {...}}.

    `model` is an open_clip name, the path of a JSON file in the format of open_clip or of its files
    on the hub, or the contents of such a file. Raises UserError for all else.
    """
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12}
    vision |= {"head_width": 64, "mlp_ratio": 4.0, "no_ln_pre": False}
    without_effect = ("pool_type", "final_ln_after_pool", "output_tokens")  # about the output
    with explain(f"--model {model} is no plain ViT such as ViT-B-16, and no JSON file of one"):
        config = model
        if os.path.isfile(str(model)):
            config = json.loads(Path(model).read_text())
        elif isinstance(model, str):
            import open_clip  # not at the top: it takes seconds, and not each use needs it

            unknown = {"vision_cfg": {"name": "unknown to open_clip"}}
            config = open_clip.get_model_config(model) or unknown
        config = config.get("model_cfg", config)  # the hub's files have it one level down
        for key, value in config["vision_cfg"].items():
            if key in vision and not isinstance(value, list):  # a ResNet has a list of layers
                vision[key] = value
            elif value and key not in without_effect:
                raise ValueError(f"its {key} is {value}")
    return {"quick_gelu": config.get("quick_gelu", False), "vision_cfg": vision}


def read_weights(model: str | dict, pretrained: str) -> tuple[dict[str, Tensor], bool | None]:
    """Weights of a trunk from a tag or a file, and whether they need QuickGELU (None: unknown).

    A file may be from open_clip, safetensors, OpenAI's TorchScript archive, or a best.pt. It may
    hold an image encoder or a whole CLIP, with any prefix before the names. Nothing in a pickle is
    executed.
    """
    import open_clip

    quick_gelu = None
    path = pretrained
    # Training scripts often save their flags, an argparse.Namespace, beside the weights.
    trusted = torch.serialization.safe_globals([argparse.Namespace])
    need = "it takes an intact file, or a tag and a network"
    with explain(f"cannot load --pretrained {pretrained}: {need}"), trusted:
        if not os.path.isfile(pretrained):
            tag = open_clip.get_pretrained_cfg(str(model), pretrained)
            if not tag:
                tags = ["none", *open_clip.list_pretrained_tags_by_model(str(model))]
                raise ValueError(f"the tags are {tags}")
            path = open_clip.download_pretrained(tag)
            quick_gelu = tag.get("quick_gelu", False)  # open_clip 3 itself ignores it
        try:
            weights = open_clip.factory.load_state_dict(path)
        except RuntimeError:  # perhaps it is TorchScript, as OpenAI's own files are
            weights = torch.jit.load(path, map_location="cpu").state_dict()
    if "input_resolution" in weights:  # which only OpenAI's own files have
        quick_gelu = True
    if "model_config" in weights:  # a best.pt or last.pt of this program
        quick_gelu = weights["model_config"]["quick_gelu"]
    for key in ("ema", "model", "model_ema"):
        weights = weights.get(key, weights)

    # The trunk is where conv1 is: behind "visual." in a whole CLIP, "module.visual." after DDP,
    # "trunk." in a best.pt of this program. Other parts are left behind.
    prefixes = [name[: -len("conv1.weight")] for name in weights if name.endswith("conv1.weight")]
    if len(prefixes) != 1:
        raise UserError(
            f"--pretrained {pretrained} has {next(iter(weights))} instead of open_clip's names "
            "(perhaps transformers'): give open_clip's file of these weights, or its tag"
        )
    prefix = prefixes[0]
    trunk = {name[len(prefix) :]: weights[name] for name in weights if name.startswith(prefix)}
    for unused in ("proj", "ln_post.weight", "ln_post.bias"):
        trunk.pop(unused, None)
    return trunk, quick_gelu


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
    """A CLIP trunk with the FT-CLIP head, float32. Its `config`, as `model`, builds the same again.

    `model` is an open_clip name, a JSON file or a configuration. `pretrained` is an open_clip tag,
    a weights file, or "none" for random weights. None stands for the model's own image size, and
    for the activation that the tag, the file or the configuration says.
    """
    config = model_config(model)
    vision = config["vision_cfg"]
    vision["image_size"] = image_size or vision["image_size"]
    weights = {}
    if pretrained != "none":
        weights, needed = read_weights(model, pretrained)
        if needed is not None or not config["quick_gelu"]:  # None: only the name of the model tells
            config["quick_gelu"] = needed
    if quick_gelu is not None:
        config["quick_gelu"] = quick_gelu
    if config["quick_gelu"] is None:
        raise UserError(
            f"--pretrained {pretrained} does not say its activation: give --quick-gelu for weights "
            "of OpenAI, MetaCLIP, DFN or LAION-400M's ViT-B-32, else --no-quick-gelu"
        )
    # On the meta device no random weights are drawn, only to be replaced by load_trunk.
    with torch.device("meta") if weights else contextlib.nullcontext():
        trunk = VisionTransformer(**vision, quick_gelu=config["quick_gelu"], drop_path=drop_path)
    if weights:
        with explain(f"--pretrained {pretrained} does not fit {model}"):
            load_trunk(trunk, weights)
    classifier = CLIPClassifier(trunk, vision["width"], num_classes)
    classifier.config = config
    freeze(classifier, train_blocks, freeze_patch_embed)
    return classifier


FORMAT = "ftclip 4"  # of checkpoints; another number when they change


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write a file on the first process. It always is the complete old or the complete new one.

    `state` has tensors and plain values only, because load_checkpoint refuses all else.
    """
    if rank_and_world()[0] > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # renamed when it is complete
    try:
        with open(part, "wb") as file:
            torch.save(state | {"format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before the name points to it
        part.replace(path)
    except RuntimeError as error:  # torch hides the OSError behind it
        raise UserError(f"cannot write {path} ({error.__context__ or error})") from error
    finally:
        part.unlink(missing_ok=True)  # it is still there after a failure


def load_checkpoint(path: str | Path) -> dict:
    """Read what save_checkpoint wrote, to the CPU. Only tensors and plain values are accepted.

    Raises UserError for a file that is missing, damaged, or not of this format.
    """
    with explain(f"cannot read checkpoint {path}"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # checks the checksums, which torch.load does not
                raise zipfile.BadZipFile("it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state.get("format") != FORMAT:
            raise ValueError(
                f"its format is {state.get('format')}, and this version reads {FORMAT}"
            )
    return state


def load_classifier(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[CLIPClassifier, list[str], Callable]:
    """A trained model for use, with the EMA weights of a best.pt or last.pt.

    Such a file has "ema" (a state dict), "classes" (a list of names) and "model_config" (the
    model's `config`). Returns the model in evaluation mode, the class names in the order of its
    outputs, and the transform from an image, of read_image or a Pillow image, to the float32
    (3, S, S) that the model takes.
    """
    state = load_checkpoint(path)
    with torch.device("meta"):  # no random weights, only to be replaced
        model = build_model(state["model_config"], len(state["classes"]))
    model.load_state_dict(state["ema"], assign=True)
    image_size = model.config["vision_cfg"]["image_size"]
    transform = functools.partial(eval_transform, image_size=image_size)
    return model.eval().to(device), state["classes"], transform


def load_last(recipe: Recipe, options: Options, vision: dict, classes: list[str]) -> dict:
    """Contents of last.pt if this run was started before, else {}.

    Raises UserError if going on would mix two runs or overwrite weights.
    """
    last = Path(options.output, "last.pt")
    if not last.exists() and last.with_name("best.pt").exists():
        raise UserError(f"{options.output} has a best.pt, but no last.pt: give another --output")
    state = load_checkpoint(last) if last.exists() else {}
    if state:
        now = vision | asdict(recipe)
        before = state["model_config"]["vision_cfg"] | state["recipe"]
        del now["model"]  # a name or a path; its configuration is compared
        changes = [f"{key} {before[key]} → {now[key]}" for key in now if now[key] != before[key]]
        changes += [f"class {name}" for name in sorted(set(classes) ^ set(state["classes"]))]
        if changes:
            raise UserError(
                f"{last} is from another run ({', '.join(changes)[:300]}): "
                "give its flags, or another --output"
            )
    seen = torch.tensor([recipe.num_images, state.get("step", 0)])
    _, world = rank_and_world()
    if not torch.equal(world * seen, all_sum(seen.clone())):  # nodes without a common disk
        raise UserError(f"nodes see different images or another {last}: put both on a shared disk")
    return state


def lock(output: str) -> contextlib.AbstractContextManager:
    """Keep other runs out of a folder, as long as the first process is in this context."""
    if rank_and_world()[0] > 0:
        return contextlib.nullcontext()
    import fcntl  # not at the top: Windows does not have it, and can use best.pt all the same

    os.makedirs(output, exist_ok=True)
    file = open(f"{output}/.lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{output} is in use by another run: give another --output") from error
    except OSError:  # a file system without locks
        log(f"{output} cannot be locked: start no other run in it")
    return file


class Progress:
    """What a run has done so far: steps, losses, and a record of each epoch. Saves and prints it.

    last.pt has all that is needed to resume: `about` (recipe, classes, model_config), the states of
    `parts`, and the progress. It is saved at the first report, so that a full disk is noticed at
    once, then at the first report after save_minutes, and at the end. best.pt has `about`, the EMA
    weights and the record of the best epoch. On a tie the later epoch wins: it has learned more.
    """

    def __init__(
        self, recipe: Recipe, options: Options, classes: list[str], parts: dict, state: dict
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.parts = parts
        config = parts["model"].config
        self.about = {"recipe": asdict(recipe), "classes": classes, "model_config": config}
        self.step = state.get("step", 0)  # optimizer steps done
        self.loss_sum = state.get("loss_sum", 0.0)  # of the steps of this epoch
        self.history = state.get("history", [])  # a record of each epoch
        for name, part in parts.items():
            if state.get(name):  # the scaler of a run without fp16 is empty
                part.load_state_dict(state[name])
        self.first_step = self.step
        self.start = time.monotonic()
        self.saved = -math.inf

    def report(self, lr: float) -> None:
        """Print the mean loss of this epoch's steps so far, after a check in all processes.

        Raises UserError if a loss or a weight is not finite: a run that has diverged must stop
        before it is saved. The speed is the mean since the start, with evaluations.
        """
        # The mean over the processes. Each goes on from it, so the next report is right, too.
        self.loss_sum = all_sum(self.loss_sum / rank_and_world()[1])
        loss = self.loss_sum.item() / ((self.step - 1) % self.recipe.steps_per_epoch + 1)
        # A finite loss can have an infinite gradient, which shows in the weights.
        weight_norm = nn.utils.get_total_norm(self.parts["model"].parameters()).item()
        if not math.isfinite(loss + weight_norm):
            raise UserError(
                f"the loss ({loss:g}) or a weight is not finite at step {self.step}: resume "
                "from last.pt with --amp none, or start anew with a lower --lr"
            )
        speed = (self.step - self.first_step) / (time.monotonic() - self.start)  # steps per second
        left = timedelta(seconds=round((self.recipe.total_steps - self.step) / speed))
        text = f"step {self.step:,}  loss {loss:.4f}  lr {lr:.2e}"
        text += f"  {speed * self.recipe.batch_size:,.0f} images/s  {left} left"
        if self.options.device == "cuda":
            text += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        log(text, end="\r" if sys.stdout.isatty() else "\n")

    def finish_epoch(self, accuracy: dict, lr: float) -> None:
        """Add a record to the history and to metrics.jsonl. Save best.pt if it is the best."""
        mean_loss = self.loss_sum.item() / self.recipe.steps_per_epoch
        record = {"epoch": len(self.history) + 1, "train_loss": mean_loss, "lr": lr} | accuracy
        self.loss_sum = 0.0
        self.history.append(record)
        if accuracy:
            past = reversed(self.history)  # max takes the first of equals, here the latest
            best = max(past, key=lambda other: other.get("ema_top1", 0.0))
            record |= {"best_ema_top1": best["ema_top1"], "best_epoch": best["epoch"]}
            if best is record:
                weights = {"ema": self.parts["ema"].state_dict(), "record": record}
                save_checkpoint(f"{self.options.output}/best.pt", self.about | weights)
        text = "  ".join(f"{key} {value:.5g}" for key, value in record.items())
        log(text.ljust(100))  # covers the line of the last step
        if rank_and_world()[0] == 0:
            lines = [{"recipe": self.about["recipe"]}, *self.history]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            Path(self.options.output, "metrics.jsonl").write_text(text)

    def save_when_due(self) -> None:
        due = time.monotonic() - self.saved >= 60 * self.options.save_minutes
        if not due and self.step < self.recipe.total_steps:
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        numbers = {"step": self.step, "loss_sum": self.loss_sum, "history": self.history}
        save_checkpoint(f"{self.options.output}/last.pt", self.about | states | numbers)
        self.saved = time.monotonic()


def log(text: str, end: str = "\n") -> None:
    """Print on the first process only."""
    if rank_and_world()[0] == 0:
        print(text, end=end, flush=True)


def to_rgb(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as RGB, uint8 (3, H, W). Of 16 bits it keeps the upper eight.

    Raises ValueError for float pixels, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range")
    if image.mode.startswith("I"):
        grey = TF.pil_to_tensor(image.convert("I"))
        return (grey >> 8).to(torch.uint8).expand(3, -1, -1)
    return TF.pil_to_tensor(image.convert("RGB"))


def read_image(path: str | Path) -> Tensor:
    """Read an image file as RGB, uint8 (3, H, W), whatever its own mode and format are.

    torchvision decodes JPEGs faster than Pillow, but has announced that it will drop its decoder.
    Pillow then reads them too, as it reads all else. EXIF rotation is ignored, as in the
    official code. Raises UserError, which names the file, if it is damaged.
    """
    with explain(f"cannot read image {path}, replace it and run again"):
        if str(path).lower().endswith((".jpg", ".jpeg")):
            with contextlib.suppress(RuntimeError, AttributeError):  # no JPEG, or no decoder
                return torchvision.io.decode_jpeg(torchvision.io.read_file(str(path)), "RGB")
        with Image.open(path) as file:
            return to_rgb(file)


IMAGE_ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")


class FolderDataset(ImageFolder):
    """Images in ROOT/<class>/*, at any depth below the class, as torchvision's ImageFolder.

    The key (epoch, index) gives a training sample. Its randomness follows from (seed, epoch, index)
    alone, so it is the same in any process, worker and restart. The key index gives an image for
    evaluation. Both return (transform(image), label), where `transform` takes uint8 (3, H, W).

    Names that begin with a dot are ignored, such as .ipynb_checkpoints. `left_out` lists the files
    that are skipped because of their ending. For validation, `classes` are those of training, so
    that labels are the same, and a class may have no images. Raises ValueError or an OSError for
    folders that cannot be used in this way.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable | None = None,
        seed: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        self.seed = seed
        self.known_classes = classes
        self.left_out = []
        may_lack = classes is not None
        super().__init__(str(root), transform, is_valid_file=self.is_image, allow_empty=may_lack)
        self.loader = read_image
        if len(self.classes) < 2 or not self.samples:
            found = f"{len(self)} images of {self.classes}, left out: {self.left_out[:1]}"
            raise ValueError(f"{root} has {found}")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found, _ = super().find_classes(directory)
        found = [name for name in found if not name.startswith(".")]
        classes = self.known_classes or found
        new = sorted(set(found) - set(classes))
        if new:
            raise ValueError(f"{directory} has the class {new[0]}, which training does not have")
        return classes, {name: label for label, name in enumerate(classes)}

    def is_image(self, path: str) -> bool:
        if f"{os.sep}." in path[len(self.root) :]:  # hidden
            return False
        is_known = path.lower().endswith(IMAGE_ENDINGS)
        if not is_known:
            self.left_out.append(path)
        return is_known

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        index = key
        if isinstance(key, tuple):
            epoch, index = key
            seed_generators(f"sample {self.seed} {epoch} {index}")
        return super().__getitem__(index)


def open_folders(options: Options, seed: int) -> tuple[FolderDataset, FolderDataset]:
    """Training and validation images, without their transforms. Draws the demo's."""
    data = Path(options.data)
    if options.data == DEMO["data"]:
        if rank_and_world()[0] == 0 and not data.is_dir():
            draw_demo(data)
        all_sum(torch.zeros(1))  # the other processes wait here until the images are drawn
    with explain(
        "--data DIR needs images of two classes in DIR/train/<class>/ and DIR/val/<class>/"
    ):
        train_set = FolderDataset(data / "train", seed=seed)
        val_set = FolderDataset(data / "val", classes=train_set.classes)
    for dataset in (train_set, val_set):
        others = f"left out: {len(dataset.left_out):,} {dataset.left_out[:1]}"
        log(f"{len(dataset):,} images in {dataset.root}, {others}")
    log(f"{len(train_set.classes):,} classes: {', '.join(train_set.classes)[:60]}")
    return train_set, val_set


def parse_flags(argv: list[str] | None = None) -> tuple[dict, Options]:
    """The fields of Recipe that were given, and the Options."""
    parser = argparse.ArgumentParser(
        prog="ftclip",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # `given` has only the flags that were given
        allow_abbrev=False,
    )
    for cls in (Recipe, Options):
        group = parser.add_argument_group(cls.__name__, inspect.getdoc(cls))
        comments = dict(re.findall(r"    (\w+): .*  # (.*)", inspect.getsource(cls)))
        for field in fields(cls):
            if field.name.startswith("num_"):  # counted, not given
                continue
            text = comments[field.name]
            if "default:" not in text:
                text += f"; default: {field.default}"
            kinds = get_args(field.type) or (field.type,)  # of `int | None`, of a Literal
            how = {"type": kinds[0]}
            if bool in kinds:
                how = {"action": argparse.BooleanOptionalAction}
            elif "auto" in kinds:
                how = {"choices": kinds}
            elif str in kinds:
                how = {"type": os.path.expanduser}  # "~" of a path
            group.add_argument("--" + field.name.replace("_", "-"), help=text, **how)
    given = vars(parser.parse_args(argv))
    if given.get("demo"):
        given = DEMO | given
    names = {field.name for field in fields(Options)}
    options = Options(**{name: given.pop(name) for name in names & given.keys()})
    if options.eval and given:
        parser.error(f"--eval takes {', '.join(given)} from the checkpoint: leave that out")
    return given, options


def start_process(options: Options) -> None:
    """Decide device and precision, and under torchrun join the other processes."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if options.device == "auto":
        options.device = "cuda" if gpus else "cpu"
    default_amp = "none"
    if options.device == "cuda":
        need = "each process needs one of its own: lower --nproc_per_node, or give --device cpu"
        with explain(f"PyTorch sees {gpus} GPU(s), and {need}"):
            torch.cuda.set_device(local_rank)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        default_amp = "bf16" if bf16 else "fp16"
    if options.amp == "auto":
        options.amp = default_amp
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if options.device == "cpu" else "cpu:gloo,cuda:nccl")


def print_plan(nearest: Recipe, recipe: Recipe, options: Options, model: CLIPClassifier) -> None:
    """What differs from the nearest recipe, the batch, the schedule, and the lr of each layer."""
    log(f"Recipe: the paper's of {nearest.model} at {nearest.image_size} pixels")
    for name, usual in asdict(nearest).items():
        value = getattr(recipe, name)
        if value != usual:
            log(f"  {name} {value} instead of {usual}")
    _, world = rank_and_world()
    micro = options.micro_batch_size
    accumulation = recipe.batch_size // (world * micro)
    chain = f"{world} device(s) x {micro} image(s) x {accumulation} micro-batch(es)"
    log(f"Batch: {recipe.batch_size} images per step = {chain}")
    steps = f"{recipe.epochs} epochs x {recipe.steps_per_epoch:,} steps = {recipe.total_steps:,}"
    log(f"Schedule: {steps} steps, {recipe.warmup_steps:,} of them warm-up")
    log(f"EMA: over about {1 / (1 - recipe.ema_decay):,.0f} steps")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"Model: {trained:,} parameters are trained on {options.device}, amp {options.amp}")
    num_layers = model.config["vision_cfg"]["layers"]
    groups = param_groups(model, num_layers, recipe.lr, recipe.layer_decay, recipe.weight_decay)
    for layer, lr in sorted({(group["layer"], group["lr"]) for group in groups}, reverse=True):
        log(f"  layer {layer:>2}  peak lr {lr:.2e}")


def run_eval(options: Options) -> None:
    """Print the accuracy of a checkpoint on DIR/val."""
    model, classes, transform = load_classifier(options.eval, options.device)
    with explain("--eval needs images in DIR/val/<class>/ of --data DIR"):
        val_set = FolderDataset(f"{options.data}/val", transform, classes=classes)
    options.micro_batch_size = options.micro_batch_size or 64
    result = evaluate({"model": model}, eval_batches(val_set, options), AMP_DTYPES[options.amp])
    log(
        f"{options.eval} on {result['images']} images: "
        f"top-1 {result['model_top1']:.3f} %, top-5 {result['model_top5']:.3f} %"
    )


# A tiny ViT from scratch. Nothing is pretrained, so all layers have the same lr.
DEMO = {
    "model": {"vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4}},
    "pretrained": "none",
    "layer_decay": 1.0,
    "lr": 1e-3,
    "epochs": 12,
    "warmup_epochs": 1.0,
    "crop_scale": 0.5,
    "num_images": 3000,
    "num_classes": 4,
    "data": "runs/demo/data",
    "output": "runs/demo",
}


def draw_demo(root: Path) -> None:
    """Draw the demo's images, 32x32 pixels: four patterns in two colours, 750 + 150 of each."""
    classes = ("pillars", "stripes", "checkerboard", "rings")
    part = root.with_name(root.name + ".part")  # renamed when it is complete
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    torch.manual_seed(0)
    for i in range(3600):
        left, top = 32 * torch.rand(2)
        wave = 0.6 + 0.4 * torch.rand(1)  # radians per pixel
        x = (columns - left) * wave
        y = (rows - top) * wave
        pattern = [x.sin(), y.sin(), x.sin() * y.sin(), x.hypot(y).sin()][i % 4]
        colours = torch.randint(256, (2, 3), dtype=torch.uint8)
        pixels = colours[(pattern > 0).long()]  # (32, 32, 3)
        folder = part / ("train" if i < 3000 else "val") / classes[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:04d}.png")
    part.rename(root)


def main(argv: list[str] | None = None) -> None:
    """Do what the flags say. Nothing but the demo's images is written until all is checked."""
    given, options = parse_flags(argv)
    start_process(options)
    if options.eval:
        run_eval(options)
        return
    _, world = rank_and_world()
    model = given.get("model", B16.model)
    vision = model_config(model)["vision_cfg"]
    image_size = given.setdefault("image_size", vision["image_size"])
    if not options.output:
        options.output = f"runs/{Path(options.data).name}-{Path(model).stem}-{image_size}"

    # The nearest recipe: of the paper's runs with this depth, the one with the closest image size.
    paper_model = "ViT-L-14" if vision["layers"] > 12 else "ViT-B-16"
    runs = [run for run in RECIPES if run[0].model == paper_model]
    nearest, most_images = min(runs, key=lambda run: abs(run[0].image_size - image_size))
    if options.dry_run and options.data in (Options.data, DEMO["data"]):
        log("Dry run: the number of images is assumed. With --data DIR it is counted.")
    else:
        train_set, val_set = open_folders(options, given.get("seed", 0))
        given |= {"num_images": len(train_set), "num_classes": len(train_set.classes)}
    recipe = resolve(nearest, given, world)

    # Cut each device's share of a batch into as few equal micro-batches as possible. From here on,
    # micro_batch_size is their size.
    share = recipe.batch_size // world
    accumulation = math.ceil(share / (options.micro_batch_size or most_images))
    while share % accumulation:
        accumulation += 1
    options.micro_batch_size = share // accumulation

    state = {} if options.dry_run else load_last(recipe, options, vision, train_set.classes)
    pretrained = recipe.pretrained
    if state or (options.dry_run and not os.path.isfile(pretrained)):
        pretrained = "none"  # the state has the weights, and a dry run downloads none
    torch.manual_seed(recipe.seed)
    with torch.device("meta" if options.dry_run else "cpu"):  # meta: shapes without numbers
        classifier = build_model(
            state.get("model_config", model),  # which has the activation
            recipe.num_classes,
            pretrained,
            image_size,
            recipe.quick_gelu,
            recipe.drop_path,
            recipe.train_blocks,
            recipe.freeze_patch_embed,
        )
    print_plan(nearest, recipe, options, classifier)
    if options.dry_run:
        return

    log(f"Output: {options.output}, from step {state.get('step', 0):,}")
    classifier.trunk.grad_checkpointing = options.grad_checkpointing
    classifier.to(options.device)
    randaug = RandAugment(recipe.randaug) if recipe.randaug > 0 else None
    train_set.transform = train_transform(image_size, recipe.crop_scale, randaug)
    val_set.transform = functools.partial(eval_transform, image_size=image_size)
    with lock(options.output):
        train(recipe, options, classifier, train_set, val_set, state)
    log(f"Finished: {options.output}/best.pt has the EMA weights of the best epoch on val")


def cli() -> int:
    """main(), with a mistake as one sentence instead of a traceback. Returns the exit status."""
    try:
        main()
        return 0  # without destroy_process_group(), because gloo in torch 2.6 can hang there
    except (UserError, OSError) as error:
        text = str(error)
    except KeyboardInterrupt:
        text = "stopped: the same command goes on from the last save of last.pt"
    except torch.OutOfMemoryError:
        text = "the GPU has not enough memory: halve --micro-batch-size, the batch stays the same"
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # let rank 0 print first; torchrun then ends this process
    # After an error in a loader worker, the text is a traceback that ends with the sentence.
    text = " ".join(text.split("UserError: ")[-1].split())
    print(f"ftclip: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(cli())
