"""The discriminator of the adversarial warm-up (AdaptSegNet): is this map of class probabilities from a source or a target image?"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Five 4x4 convolutions of stride 2, K-64-128-256-512-1, LeakyReLU 0.2: probabilities [B, K, H, W] -> logits [B, 1, H/32, W/32].

    Parameter names are those of the released `FCDiscriminator`, so its weights load. Source: Tsai et al., arXiv 1802.10349.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_classes, width, 4, 2, 1)
        self.conv2 = nn.Conv2d(width, width * 2, 4, 2, 1)
        self.conv3 = nn.Conv2d(width * 2, width * 4, 4, 2, 1)
        self.conv4 = nn.Conv2d(width * 4, width * 8, 4, 2, 1)
        self.classifier = nn.Conv2d(width * 8, 1, 4, 2, 1)

    def forward(self, probabilities: Tensor) -> Tensor:
        if min(probabilities.shape[-2:]) < 32:
            raise ValueError(
                f"discriminator: the map must be at least 32 x 32, got {list(probabilities.shape)}; give it up-sampled probabilities"
            )
        x = probabilities
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.leaky_relu(conv(x), 0.2, inplace=True)
        return self.classifier(x)
