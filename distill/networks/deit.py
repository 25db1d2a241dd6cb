"""DeiT: Touvron et al., ICML 2021. A vision transformer with a second, distillation token and a head for it."""

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from distill.errors import UserError
from distill.networks.stem import SMALL
from distill.schema.ranges import Count
from distill.types import ImageSize, square


class DeiT(VisionTransformer):
    """Images (N, 3, S, S) to logits (N, K): in training the class head's, in eval the mean of both heads'.

    So `ce` teaches the class head and the loss `deit` the distillation head (`dist_head`), as published.
    """

    def __init__(self, num_classes: int, **options):
        super().__init__(num_classes=num_classes, **options)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.hidden_dim))
        # class token, distillation token, patches
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, self.seq_length + 1, self.hidden_dim))
        self.seq_length += 1
        self.heads = nn.Linear(self.hidden_dim, num_classes)
        self.dist_head = nn.Linear(self.hidden_dim, num_classes)
        for drawn in (self.class_token, self.dist_token, self.encoder.pos_embedding):
            nn.init.trunc_normal_(drawn, std=0.02)
        for head in (self.heads, self.dist_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches = self._process_input(images)  # (N, T, D)
        tokens = torch.cat([self.class_token, self.dist_token], 1).expand(
            patches.shape[0], -1, -1
        )  # traced, unlike len
        encoded = self.encoder(torch.cat([tokens, patches], 1))  # (N, 2 + T, D)
        by_class, by_distillation = self.heads(encoded[:, 0]), self.dist_head(encoded[:, 1])
        return by_class if self.training else (by_class + by_distillation) / 2


def deit(
    num_classes: Count,
    image_size: ImageSize,
    width: Count = 192,
    depth: Count = 12,
    heads: Count = 3,
    patch_size: Count | None = None,
) -> DeiT:
    """A DeiT of `depth` blocks; the defaults are DeiT-Ti (5.9 million weights at 224 px).

    Args:
        num_classes: K.
        image_size: px.
        width, heads: of the tokens and of the attention; the MLPs are four times as wide.
        patch_size: px; None: 16, and 4 up to 32 px, 8 up to 64 px.

    Raises:
        UserError: images that are not square, patches that don't fill the image, heads that don't divide the width.
    """
    image_size = square(image_size, "deit")
    if patch_size is None:
        patch_size = 4 if image_size <= 32 else 8 if image_size <= SMALL else 16
    if image_size % patch_size:
        raise UserError(f"deit cuts images into patches of {patch_size} px, and {image_size} is not a multiple of it")
    if width % heads:
        raise UserError(f"deit divides its width among its heads, and {width} is not a multiple of {heads}")
    return DeiT(
        num_classes,
        image_size=image_size,
        patch_size=patch_size,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
    )
