"""A vision transformer for the benchmark: ViT-Tiny on patches of 4 × 4 pixels.

[Dos21] Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021; its Tiny is that of
Touvron et al.: Training data-efficient image transformers, ICML 2021.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_HEADS = 3


class Attention(nn.Module):
    """Multi-head self-attention; not torch's, whose inner layer does not run as a module."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """What each token takes from the others."""
        # (batch, tokens, 3·dim) → three of (batch, heads, tokens, dim / heads)
        query, key, value = self.qkv(x).unflatten(2, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two linear layers, each after a layer norm and beside a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The block applied to x."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """192 wide, 12 deep, 3 heads; the mean of all tokens is classified. Images of 32 pixels."""

    def __init__(self, classes: int = 10, *, depth: int = 12, width: float = 1.0) -> None:
        super().__init__()
        dim = _HEADS * max(1, round(64 * width))
        self.patches = nn.Conv2d(3, dim, 4, stride=4)
        self.position = nn.Parameter(nn.init.trunc_normal_(self.patches.weight.new_empty(64, dim)))
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch classes"]:
        """Scores of the classes."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))
