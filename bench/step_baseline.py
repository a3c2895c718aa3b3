"""The published JEPA step in plain PyTorch, written from the papers: the other side of `bench/step.py`.

I-JEPA (arXiv 2301.08243, section 3) and Audio-JEPA (arXiv 2507.02915), with the usual pieces of a ViT: a strided
convolution embeds every patch and the patches of the context are gathered afterwards; masks are cut to the shortest of
their batch in a loop; the target encoder is a deep copy; AdamW and the moving average are PyTorch's defaults. The
encoder runs once, and the groups of targets go through the predictor side by side, as one batch.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ajepa.model.jepa import Jepa, token_loss
from ajepa.model.masking import Masks
from ajepa.model.patches import PatchGrid, sincos_positions
from ajepa.recipes.pretrain import Pretrain


class PlainAttention(nn.Module):
    """Self-attention: `fused` by `F.scaled_dot_product_attention`, else by scores, softmax, dropout and product."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.fused = fused
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x_BND: Tensor) -> Tensor:
        clips, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).reshape(clips, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            shares = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
            mixed = self.dropout(shares) @ v
        return self.dropout(self.projection(mixed.transpose(1, 2).reshape(clips, tokens, width)))


class PlainBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = PlainAttention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        hidden_BND = self.dropout(self.act(self.fc1(self.norm2(x_BND))))
        return x_BND + self.dropout(self.fc2(hidden_BND))


class PlainEncoder(nn.Module):
    """A vision transformer that embeds every patch and then picks those of the context."""

    def __init__(self, grid: PatchGrid, width: int, depth: int, heads: int, fused: bool) -> None:
        super().__init__()
        side = (grid.patch_frames, grid.patch_bands)
        self.patches = nn.Conv2d(1, width, kernel_size=side, stride=side)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions_1PD", sincos_positions(grid, width)[None])

    def forward(self, mel_BTF: Tensor, tokens_BK: Tensor | None = None) -> Tensor:
        x = self.patches(mel_BTF[:, None]).flatten(2).transpose(1, 2) + self.positions_1PD
        if tokens_BK is not None:
            x = gather_groups(x, [tokens_BK])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainPredictor(nn.Module):
    """A narrow transformer from the context to the tokens of each group."""

    def __init__(
        self, grid: PatchGrid, encoder_width: int, width: int, depth: int, heads: int, fused: bool
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.embed = nn.Linear(encoder_width, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, encoder_width)
        self.register_buffer("positions_1PD", sincos_positions(grid, width)[None])

    def forward(self, context_BKD: Tensor, context_BK: Tensor, groups: list[Tensor]) -> Tensor:
        """Return predictions `NQD`: all clips of the first group, then of the second, and so on."""
        positions_BPD = self.positions_1PD.repeat(len(context_BKD), 1, 1)
        x = self.embed(context_BKD) + gather_groups(positions_BPD, [context_BK])
        mask_tokens = gather_groups(positions_BPD, groups) + self.mask_token
        x = torch.cat([x.repeat(len(groups), 1, 1), mask_tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)[:, context_BK.shape[1] :])


def gather_groups(x_BPD: Tensor, groups: list[Tensor]) -> Tensor:
    """Return the tokens of each group of each clip, the groups one after the other as one larger batch."""
    width = x_BPD.shape[-1]
    return torch.cat(
        [torch.gather(x_BPD, 1, group[..., None].repeat(1, 1, width)) for group in groups], dim=0
    )


def collate_masks(masks: Masks, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return context and groups of targets, clip by clip, all cut to the shortest of the batch."""
    # The context.
    contexts = [torch.from_numpy(tokens_K) for tokens_K in masks.context_BK]
    shortest = min(len(context) for context in contexts)
    context_BK = torch.stack([context[:shortest] for context in contexts])

    # Each group of targets.
    groups = []
    for group in range(masks.targets_BGQ.shape[1]):
        targets = [torch.from_numpy(tokens_GQ[group]) for tokens_GQ in masks.targets_BGQ]
        shortest = min(len(target) for target in targets)
        groups.append(torch.stack([target[:shortest] for target in targets]).to(device))
    return context_BK.to(device), groups


class PublishedStep:
    """Model, optimiser and one update; its weights are copies of `ours`, so that both sides make the same update."""

    def __init__(
        self, recipe: Pretrain, ours: Jepa, device: torch.device, *, bf16: bool, fused: bool
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.bf16 = bf16
        encoder = recipe.model.encoder
        predictor = recipe.model.predictor
        if {encoder.positions, predictor.positions} != {"sincos"} or recipe.mask_sets > 1:
            raise ValueError("the published step has sin-cos positions and one mask set of a clip")

        # The model, with our weights.
        grid = recipe.sound_grid  # the columns that a clip fills, as ours
        self.encoder = PlainEncoder(grid, encoder.width, encoder.depth, encoder.heads, fused)
        self.predictor = PlainPredictor(
            grid, encoder.width, predictor.width, predictor.depth, predictor.heads, fused
        )
        self.encoder.to(device)
        self.predictor.to(device)
        copy_weights(ours.encoder.parameters(), self.encoder.parameters())
        copy_weights(ours.predictor.parameters(), self.predictor.parameters())

        # The teacher.
        self.target = copy.deepcopy(self.encoder)
        for parameter in self.target.parameters():
            parameter.requires_grad = False

        # The optimiser: only matrices are decayed.
        weights = [*self.encoder.parameters(), *self.predictor.parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [weight for weight in weights if weight.ndim > 1]},
                {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(recipe.optimiser.beta1, recipe.optimiser.beta2),
            weight_decay=recipe.optimiser.weight_decay,
        )

    def loss(self, mel_BTF: Tensor, context_BK: Tensor, groups: list[Tensor]) -> Tensor:
        """Return the mean distance between predictions and targets."""
        with torch.no_grad():
            feature_BPD = self.target(mel_BTF)
            feature_BPD = F.layer_norm(feature_BPD.float(), (feature_BPD.shape[-1],))
            target_NQD = gather_groups(feature_BPD, groups)
        prediction_NQD = self.predictor(self.encoder(mel_BTF, context_BK), context_BK, groups)
        return token_loss(prediction_NQD.float(), target_NQD, self.recipe.model.loss).mean()

    def step(self, mel_BTF: Tensor, masks: Masks, *, lr: float, momentum: float) -> float:
        """Make one update and return the loss before it."""
        context_BK, groups = collate_masks(masks, self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = lr

        # Forward, backward, optimiser.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(mel_BTF.to(self.device), context_BK, groups)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

        # The teacher follows.
        with torch.no_grad():
            for weight, target in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                target.data.mul_(momentum).add_((1.0 - momentum) * weight.detach().data)
        return loss.item()


def copy_weights(source: Iterable[nn.Parameter], destination: Iterable[nn.Parameter]) -> None:
    """Copy weights to a model whose weights come in the same order; a matrix becomes a convolution's filters."""
    with torch.no_grad():
        for weight, target in zip(source, destination, strict=True):
            target.copy_(weight.view_as(target))
