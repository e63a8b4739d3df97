"""What the attention benches time: shapes, features, and how much work that is. Imports no framework."""

from typing import NamedTuple


class Case(NamedTuple):
    """One call of attention for training, with T = S."""

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False
    documents: int = 1  # packed in every row, of equal length

    @property
    def plain(self) -> bool:
        """Whether it is only causal or full, as every library can."""
        return not (self.window or self.soft_cap or self.alibi or self.documents > 1)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of a row and head."""
        T = self.T // self.documents
        if not self.causal:
            one = T * T
        elif self.window:
            hidden = max(T - self.window, 0)
            one = T * (T + 1) // 2 - hidden * (hidden + 1) // 2
        else:
            one = T * (T + 1) // 2
        return self.documents * one

    @property
    def forward_flops(self) -> float:
        """Two products of 2 H operations a visible pair; what is masked does not count."""
        return 4.0 * self.B * self.N * self.H * self.pairs

    @property
    def backward_flops(self) -> float:
        """Five products. That some implementations compute seven does not count."""
        return 2.5 * self.forward_flops

    def cut(self) -> "Case":
        """The same features at a size whose dense scores are cheap, to compare results."""
        group = self.N // self.K
        return self._replace(B=1, T=1024, N=2 * group, K=2, window=min(self.window, 200))


# 16k tokens of 2048 numbers each: where published figures for Hopper are (kernels.md, section 2).
ACCELERATOR = (
    Case("causal 16k", 1, 16384, 16, 16, 128),
    Case("causal 4k", 4, 4096, 16, 16, 128),
    Case("full 16k", 1, 16384, 16, 16, 128, causal=False),
    Case("grouped 16/4", 1, 16384, 16, 4, 128),
    Case("multi-query 16/1", 1, 16384, 16, 1, 128),
    Case("ALiBi 16k", 1, 16384, 16, 16, 128, alibi=True),
    Case("packed 8 x 2k", 1, 16384, 16, 16, 128, documents=8),
    Case("packed, ALiBi", 1, 16384, 16, 16, 128, alibi=True, documents=8),
    Case("window 1k", 1, 16384, 16, 16, 128, window=1024),
    Case("soft-cap", 1, 16384, 16, 16, 128, soft_cap=30.0),
    Case("head 64", 1, 16384, 32, 32, 64),
    Case("head 256", 1, 16384, 8, 8, 256),
)
CPU = (
    *(Case(f"causal {T}", B, T, 6, 2, 64) for B, T in ((8, 128), (8, 256), (4, 512), (1, 2048))),
    Case("ALiBi 1k", 2, 1024, 6, 2, 64, alibi=True),
    Case("packed 8 x 256", 1, 2048, 6, 2, 64, documents=8),
)
