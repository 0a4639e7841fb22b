"""A transformer's decoder layer between proposals and a map."""

from torch import Tensor, nn
from torch.nn import functional as F


class Decoder(nn.Module):
    """Proposals attend to each other, then to cells near them, then each alone; normalised after each step.

    Args:
        width: D.
        heads: of the attention.
        hidden: width of the feed-forward layer.
        dropout: after each step and in the attention.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}")
        self.among = _Attention(width, heads, dropout)
        self.across = _Attention(width, heads, dropout)
        self.alone = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Tensor, query_places: Tensor, keys: Tensor, key_places: Tensor, near: Tensor
    ) -> Tensor:
        """Refined proposals ``(B, P, D)``.

        Args:
            queries: ``(B, P, D)``.
            query_places: ``(B, P, D)``, embeddings of their places.
            keys: ``(B, N, D)``.
            key_places: ``(B or 1, N, D)``.
            near: booleans ``(B, P, N)``: which cells a proposal looks at.
        """
        placed = queries + query_places
        queries = self.norms[0](queries + self.dropout(self.among(placed, placed)))
        seen = self.across(queries + query_places, keys + key_places, near[:, None])
        queries = self.norms[1](queries + self.dropout(seen))
        out: Tensor = self.norms[2](queries + self.dropout(self.alone(queries)))
        return out


class PlaceEmbedding(nn.Module):
    """A learned embedding of places ``(B, N, 2)`` in cells: ``(B, N, D)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(2, width), nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)

    def forward(self, places: Tensor) -> Tensor:
        """The embedding."""
        hidden = self.norm(self.first(places).flatten(0, 1)).view(*places.shape[:2], -1)
        out: Tensor = self.second(F.relu(hidden))
        return out


class Reader(nn.Module):
    """What one kind of output is of proposals ``(B, P, D)``: ``(B, P, size)``."""

    def __init__(self, width: int, size: int, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden)
        self.second = nn.Linear(hidden, size)

    def forward(self, queries: Tensor) -> Tensor:
        """The output."""
        hidden = self.norm(self.first(queries).flatten(0, 1)).view(*queries.shape[:2], -1)
        out: Tensor = self.second(F.relu(hidden))
        return out


class _Attention(nn.Module):
    """Attention of queries ``(B, P, D)`` to keys ``(B, N, D)``, which are the values too."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, queries: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

        key, value = self.key_value(keys).chunk(2, 2)
        seen = F.scaled_dot_product_attention(
            split(self.query(queries)),
            split(key),
            split(value),
            allowed,
            self.dropout if self.training else 0.0,
        )
        out: Tensor = self.output(seen.transpose(1, 2).flatten(2))
        return out
