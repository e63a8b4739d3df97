"""PyTorch's rows of bench_attention.py, one JSON object a line: SDPA and FlexAttention on this GPU.

SDPA is timed by each of its fused backends that can do the case; FlexAttention is compiled, with the
mask as a block mask, so that it skips what it can. Errors and times are as there.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from bench_attention_cases import ACCELERATOR, Case
from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
    create_block_mask,
    flex_attention,
)

Attend = Callable[..., Any]
COMPILED: Any = torch.compile(flex_attention)
BACKENDS = {
    "PyTorch SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "PyTorch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def slopes(N: int) -> Any:
    """ALiBi's, for powers of two."""
    return torch.tensor([2.0 ** (-8 * i / N) for i in range(1, N + 1)], device="cuda")


def flex(case: Case) -> Attend:
    """FlexAttention with the case's mask and scores."""
    length, slope = case.T // case.documents, slopes(case.N)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = i >= j if case.causal else i >= 0
        if case.window:
            seen = seen & (i - j < case.window)
        if case.documents > 1:
            seen = seen & (i // length == j // length)
        return seen

    def score(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if case.soft_cap:
            x = case.soft_cap * torch.tanh(x / case.soft_cap)
        return x + slope[h] * (j - i) if case.alibi else x

    bent = score if case.soft_cap or case.alibi else None
    masked = case.causal or case.documents > 1
    blocks = create_block_mask(mask, None, None, case.T, case.T, device="cuda") if masked else None
    grouped = case.N != case.K
    return lambda q, k, v: COMPILED(q, k, v, score_mod=bent, block_mask=blocks, enable_gqa=grouped)


def sdpa(case: Case, backend: Any) -> Attend:
    """Scaled dot-product attention by one backend."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal, enable_gqa=case.N != case.K
            )

    return attend


def dense(case: Case, q: Any, k: Any, v: Any) -> Any:
    """The definition, in float32."""
    k, v = (x.repeat_interleave(case.N // case.K, dim=1) for x in (k, v))
    score = (q @ k.transpose(-1, -2)) * case.H**-0.5
    if case.soft_cap:
        score = case.soft_cap * torch.tanh(score / case.soft_cap)
    rows = torch.arange(case.T, device="cuda")
    ahead = rows[None, :] - rows[:, None]
    if case.alibi:
        score = score + slopes(case.N)[:, None, None] * ahead
    hidden = ahead > 0 if case.causal else ahead > case.T
    if case.window:
        hidden = hidden | (ahead <= -case.window)
    document = rows // (case.T // case.documents)
    hidden = hidden | (document[:, None] != document[None, :])
    return torch.softmax(score.masked_fill(hidden, float("-inf")), dim=-1) @ v


def arrays(case: Case) -> list[Any]:
    """q, k, v that want gradients, and the gradient of the result: [B, heads, T, H]."""
    torch.manual_seed(0)
    shapes = [(case.B, heads, case.T, case.H) for heads in (case.N, case.K, case.K, case.N)]
    made = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def error_of(case: Case, attend: Attend) -> float:
    """The largest relative error of out, dq, dk and dv."""
    q, k, v, grad = arrays(case)
    out = attend(q, k, v)
    found = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    torch.backends.cuda.matmul.allow_tf32 = False
    exact_out = dense(case, *wide)
    exact = [exact_out, *torch.autograd.grad(exact_out, wide, grad.float())]
    return max(float((x.float() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of `rounds`, of three calls each, after two that warm up."""
    for _ in range(2):
        call()
    spent = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) / 3)
    return statistics.median(spent)


def measure(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each that can do the case."""
    made: dict[str, Callable[[Case], Attend]] = {"PyTorch FlexAttention": flex}
    if case.plain:
        made |= {n: lambda c, backend=backend: sdpa(c, backend) for n, backend in BACKENDS.items()}
    for name, make in made.items():
        try:
            error = error_of(case.cut(), make(case.cut()))
            attend = make(case)
            q, k, v, grad = arrays(case)

            def both(
                attend: Attend = attend, q: Any = q, k: Any = k, v: Any = v, g: Any = grad
            ) -> Any:
                return torch.autograd.grad(attend(q, k, v), (q, k, v), g)

            def forward(attend: Attend = attend, q: Any = q, k: Any = k, v: Any = v) -> Any:
                with torch.no_grad():
                    return attend(q, k, v)

            whole = milliseconds(both, rounds)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = sum(2 * x.numel() for x in (q, k, v))
            both()
            extra = torch.cuda.max_memory_allocated() - before - results
            once = milliseconds(forward, rounds)
        except Exception as reason:
            print(f"{case.name}, {name}: {str(reason).splitlines()[:1]}", file=sys.stderr)
            continue
        yield {
            "case": case.name, "name": name, "forward_ms": once, "backward_ms": whole - once,
            "temporary_mib": extra / 2**20, "error": error,
        }  # fmt: skip


def main() -> None:
    """Prints a line for each row."""
    parser = argparse.ArgumentParser(description="PyTorch's rows of bench_attention.py")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for case in ACCELERATOR:
        if not options.only or case.name in options.only:
            torch.compiler.reset()
            for row in measure(case, options.rounds):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
