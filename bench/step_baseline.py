"""The published JEPA step in plain PyTorch, written from the papers: what `bench/step.py` measures us against.

I-JEPA (arXiv 2301.08243, section 3) and Audio-JEPA (arXiv 2507.02915), with the usual pieces of a ViT: a strided
convolution embeds every patch and those of the context are gathered afterwards; masks are cut to the shortest of
their batch in a loop; the target encoder is a deep copy; AdamW and the moving average take what PyTorch does by
default. The encoder runs once, and the groups of targets go through the predictor side by side, as one batch.
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
    """`fused`: `F.scaled_dot_product_attention`; else as ViTs had it before: scores, softmax, dropout, product."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.scale, self.fused = heads, (width // heads) ** -0.5, fused
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
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
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = PlainAttention(width, heads, fused)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.act = nn.Linear(width, 4 * width), nn.GELU()
        self.fc2, self.dropout = nn.Linear(4 * width, width), nn.Dropout(0.0)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.dropout(self.fc2(self.dropout(self.act(self.fc1(self.norm2(x_BND))))))


class PlainEncoder(nn.Module):
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
            x = gathered(x, [tokens_BK])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PlainPredictor(nn.Module):
    def __init__(
        self, grid: PatchGrid, encoder_width: int, width: int, depth: int, heads: int, fused: bool
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.embed = nn.Linear(encoder_width, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, fused) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, encoder_width)
        self.register_buffer("positions_1PD", sincos_positions(grid, width)[None])

    def forward(self, context_BKD: Tensor, context_BK: Tensor, groups: list[Tensor]) -> Tensor:
        """Predictions `NQD`: all clips of the first group, then of the second, and so on."""
        positions_BPD = self.positions_1PD.repeat(len(context_BKD), 1, 1)
        x = self.embed(context_BKD) + gathered(positions_BPD, [context_BK])
        asked = gathered(positions_BPD, groups) + self.mask_token
        x = torch.cat([x.repeat(len(groups), 1, 1), asked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)[:, context_BK.shape[1] :])


def gathered(x_BPD: Tensor, groups: list[Tensor]) -> Tensor:
    """The tokens of each group of each clip, the groups one after the other as one larger batch."""
    width = x_BPD.shape[-1]
    return torch.cat([torch.gather(x_BPD, 1, one[..., None].repeat(1, 1, width)) for one in groups], dim=0)


def collated(masks: Masks, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One clip after the other, all cut to the shortest of the batch."""
    contexts = [torch.from_numpy(tokens_K) for tokens_K in masks.context_BK]
    shortest = min(len(context) for context in contexts)
    context_BK = torch.stack([context[:shortest] for context in contexts])
    groups = []
    for group in range(masks.targets_BGQ.shape[1]):
        targets = [torch.from_numpy(tokens_GQ[group]) for tokens_GQ in masks.targets_BGQ]
        shortest = min(len(target) for target in targets)
        groups.append(torch.stack([target[:shortest] for target in targets]).to(device))
    return context_BK.to(device), groups


class PublishedStep:
    """Model, optimiser and one update; weights as those of `ours`, so that both sides do the same sum."""

    def __init__(
        self, recipe: Pretrain, ours: Jepa, device: torch.device, *, bf16: bool, fused: bool
    ) -> None:
        self.recipe, self.device, self.bf16 = recipe, device, bf16
        encoder, predictor = recipe.model.encoder, recipe.model.predictor
        if {encoder.positions, predictor.positions} != {"sincos"} or recipe.mask_sets > 1:
            raise ValueError("the published step knows sin-cos positions and one mask set of a clip")
        self.encoder = PlainEncoder(encoder.grid, encoder.width, encoder.depth, encoder.heads, fused)
        self.predictor = PlainPredictor(
            encoder.grid, encoder.width, predictor.width, predictor.depth, predictor.heads, fused
        )
        self.encoder.to(device), self.predictor.to(device)
        copy_weights(ours.encoder.parameters(), self.encoder.parameters())
        copy_weights(ours.predictor.parameters(), self.predictor.parameters())
        self.target = copy.deepcopy(self.encoder)
        for parameter in self.target.parameters():
            parameter.requires_grad = False
        weights = [*self.encoder.parameters(), *self.predictor.parameters()]
        told = recipe.optimiser
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [weight for weight in weights if weight.ndim > 1]},
                {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(told.beta1, told.beta2),
            weight_decay=told.weight_decay,
        )

    def loss(self, mel_BTF: Tensor, context_BK: Tensor, groups: list[Tensor]) -> Tensor:
        with torch.no_grad():
            described = self.target(mel_BTF)
            described = F.layer_norm(described.float(), (described.shape[-1],))
            wanted_NQD = gathered(described, groups)
        guess_NQD = self.predictor(self.encoder(mel_BTF, context_BK), context_BK, groups)
        return token_loss(guess_NQD.float(), wanted_NQD, self.recipe.model.loss).mean()

    def step(self, mel_BTF: Tensor, masks: Masks, *, lr: float, momentum: float) -> float:
        """One update; the loss before it."""
        context_BK, groups = collated(masks, self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(mel_BTF.to(self.device), context_BK, groups)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                theirs.data.mul_(momentum).add_((1.0 - momentum) * ours.detach().data)
        return loss.item()


def copy_weights(given: Iterable[nn.Parameter], taken: Iterable[nn.Parameter]) -> None:
    """From one model to another whose weights come in the same order; a convolution takes a matrix."""
    with torch.no_grad():
        for ours, theirs in zip(given, taken, strict=True):
            theirs.copy_(ours.view_as(theirs))
