"""Attention here against what a user would call instead: correctness, then time and memory.

    python tools/bench_attention.py                     all cases that this device is for
    python tools/bench_attention.py --only "causal 16k" --output table.md

On a GPU: our Hopper kernel, cuDNN through `jax.nn.dot_product_attention` (ALiBi as the bias array that
it would have to be given), and, where torch is installed, PyTorch's SDPA and FlexAttention in a process
of its own (`bench_attention_torch.py`). On a TPU: our kernel and jax's splash attention. On a CPU:
dense scores and tiles, and decoding, the numbers behind `choose` in kernels/attention.

Errors are of out, dq, dk, dv, relative in the Frobenius norm to dense float32 at T=1024. Times are
medians of rounds in which all take their turn; backward is what gradients take longer than forward.
TFLOP/s count visible pairs only. Memory is what XLA allocates for gradients beside arguments and
results.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs the memory too

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention_cases import ACCELERATOR, CPU, Case

from llm_jax.errors import ConfigError
from llm_jax.kernels.attention import flash_attention, make_plan
from llm_jax.model.positions import alibi_slopes

DECODING = ((8, 1, 512), (8, 1, 4096), (8, 4, 1024), (8, 8, 1024), (8, 16, 1024))  # B, T, S
MOST_DENSE = 2**33  # bytes of float32 scores above which dense attention is left out
TORCH = Path(__file__).with_name("bench_attention_torch.py")
UNSKIPPED = "mosaic_gpu, no skipping"
CONTENDERS = {
    "gpu": ("mosaic_gpu", "cudnn", "cudnn with a bias", UNSKIPPED, "xla_chunked"),
    "tpu": ("pallas_tpu", "splash in jax", "xla_chunked"),
    "cpu": ("reference", "xla_chunked"),
}
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    case: str
    name: str
    forward_ms: float
    backward_ms: float
    temporary_mib: float
    error: float


def documents(case: Case) -> jax.Array | None:
    """Segments of every row, [B, T]; None without packing."""
    if case.documents == 1:
        return None
    ids = jnp.repeat(jnp.arange(1, case.documents + 1), case.T // case.documents)
    return jnp.broadcast_to(ids, (case.B, case.T))


def ours(case: Case, name: str) -> Attend:
    """One of `llm_jax.kernels.attention`."""
    segments = documents(case)
    return partial(
        flash_attention,
        causal=case.causal,
        window=case.window,
        soft_cap=case.soft_cap,
        alibi_slopes_N=jnp.asarray(alibi_slopes(case.N)) if case.alibi else None,
        q_segments_BT=segments,
        kv_segments_BS=segments,
        implementation=name,
    )


def unskipped(case: Case) -> Attend | None:
    """Our kernel, made to visit and mask every tile that one long document would have."""
    segments = documents(case)
    if segments is None or case.alibi or case.window:
        return None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        make = partial(make_plan, q, k, causal=case.causal, implementation="mosaic_gpu")
        all_masked = [r.at[..., 1:3].set(r[..., 3:]) for r in make().ranges]
        plan = make(q_segments_BT=segments, kv_segments_BS=segments)
        plan = dataclasses.replace(plan, ranges=tuple(all_masked))
        return flash_attention(q, k, v, causal=case.causal, plan=plan)

    return attend


def cudnn_with_bias(case: Case) -> Attend | None:
    """ALiBi for cuDNN: a bias of [1, N, T, T]."""
    if not case._replace(alibi=False).plain or not case.alibi:
        return None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        rows = jnp.arange(case.T)
        ahead = (rows[None, :] - rows[:, None]).astype(jnp.float32)
        slopes = jnp.asarray(alibi_slopes(case.N))
        bias = (slopes[None, :, None, None] * ahead[None, None]).astype(q.dtype)
        return jax.nn.dot_product_attention(
            q, k, v, bias, is_causal=case.causal, implementation="cudnn"
        )

    return attend


def splash(case: Case) -> Attend | None:
    """The TPU kernel that comes with jax; it knows no ALiBi."""
    if case.alibi:
        return None
    from jax.experimental.pallas.ops.tpu import splash_attention as module

    shape = (case.T, case.T)
    mask: Any = module.CausalMask(shape) if case.causal else module.FullMask(shape)
    if case.window:
        mask = module.LocalMask(shape, (case.window - 1, 0), offset=0)
    size = min(case.T, 1024)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")
    sizes: dict[str, Any] = {f"block_{n}": size for n in names}
    blocks = module.BlockSizes(**sizes, use_fused_bwd_kernel=True)
    kernel: Any = module.make_splash_mha(
        module.MultiHeadMask([mask] * case.N),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=case.soft_cap or None,
    )
    segments = documents(case)
    ids = None if segments is None else module.SegmentIds(segments, segments)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        turned = [x.swapaxes(1, 2) for x in (q * case.H**-0.5, k, v)]
        return jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(
            *turned, ids
        ).swapaxes(1, 2)

    return attend


def contender(case: Case, name: str) -> Attend | None:
    """The function called `name`; None where it cannot do the case."""
    if name == "cudnn with a bias":
        return cudnn_with_bias(case)
    if name == UNSKIPPED:
        return unskipped(case)
    if name == "splash in jax":
        return splash(case)
    if name == "reference" and 4 * case.B * case.N * case.T**2 > MOST_DENSE:
        return None
    attend, shapes = ours(case, name), arrays(case, jnp.bfloat16, abstract=True)
    if jax.default_backend() == "cpu":
        return attend
    try:
        jax.eval_shape(attend, *shapes[:3])
    except ConfigError:
        return None
    return attend


def arrays(case: Case, dtype: Any, *, abstract: bool = False) -> list[Any]:
    """q, k, v and the gradient of the result: random, normal."""
    shapes = [(case.B, case.T, heads, case.H) for heads in (case.N, case.K, case.K, case.N)]
    if abstract:
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def gradients(attend: Attend) -> Callable[..., Any]:
    """(q, k, v, gradient of out) -> out, (dq, dk, dv)."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(grad)

    return run


def programs(case: Case, attend: Attend, dtype: Any) -> tuple[Any, Any]:
    """Forward and gradients, compiled."""
    shapes = arrays(case, dtype, abstract=True)
    forward = jax.jit(attend).lower(*shapes[:3]).compile()
    return forward, jax.jit(gradients(attend)).lower(*shapes).compile()


def error_of(case: Case, name: str, dtype: Any) -> float:
    """The largest relative error of out, dq, dk and dv at a small size."""
    small = case.cut()
    attend = contender(small, name)
    if attend is None:
        raise LookupError(f"{name} can do {case.name!r} but not at T={small.T}")
    given = arrays(small, dtype)
    found = jax.tree.leaves(jax.jit(gradients(attend))(*given))
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in given]
        exact = jax.tree.leaves(jax.jit(gradients(ours(small, "reference")))(*wide))
    pairs = [
        (np.asarray(x, np.float64), np.asarray(y, np.float64))
        for x, y in zip(found, exact, strict=True)
    ]
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def seconds(program: Any, given: list[Any], calls: int) -> float:
    """Of one call, when `calls` are queued."""
    begin = time.perf_counter()
    results = [program(*given) for _ in range(calls)]
    jax.block_until_ready(results)
    return (time.perf_counter() - begin) / calls


def measure(case: Case, dtype: Any, rounds: int, names: list[str]) -> Iterator[Row]:
    """A row for each of those named that can do the case."""
    found = {name: contender(case, name) for name in names}
    can = {name: attend for name, attend in found.items() if attend is not None}
    with ThreadPoolExecutor() as pool:
        checks = {name: pool.submit(error_of, case, name, dtype) for name in can}
        made = {name: pool.submit(programs, case, attend, dtype) for name, attend in can.items()}
    given, calls = arrays(case, dtype), 1 if jax.default_backend() == "cpu" else 3
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in can}
    for turn in range(rounds + 1):
        for name in can:
            forward, both = made[name].result()
            spent = (seconds(forward, given[:3], calls), seconds(both, given, calls))
            if turn:
                times[name].append(spent)
    for name, pairs in times.items():
        forward, both = (statistics.median(spent) for spent in zip(*pairs, strict=True))
        analysis = made[name].result()[1].memory_analysis()
        mib = analysis.temp_size_in_bytes / 2**20 if analysis else float("nan")
        error = checks[name].result()
        yield Row(
            case=case.name, name=name, forward_ms=1e3 * forward,
            backward_ms=1e3 * (both - forward), temporary_mib=mib, error=error,
        )  # fmt: skip


def with_torch(cases: list[Case], rounds: int) -> list[Row]:
    """PyTorch's rows, from a process of its own; none where torch is not installed or has no GPU."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return []
    words = [
        sys.executable,
        str(TORCH),
        "--rounds",
        str(rounds),
        "--only",
        *(c.name for c in cases),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"PyTorch: {done.stderr[-2000:]}", file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [Row(**json.loads(line)) for line in lines]


def line(case: Case, row: Row) -> str:
    """A row of the Markdown table."""
    rates = (case.forward_flops / row.forward_ms / 1e9, case.backward_flops / row.backward_ms / 1e9)
    return (
        f"| {row.case} | {row.name} | {row.forward_ms:.3f} | {rates[0]:.4g} | {row.backward_ms:.3f} | "
        f"{rates[1]:.4g} | {row.temporary_mib:.0f} | {row.error:.1e} |"
    )


def decoding(rounds: int) -> Iterator[str]:
    """Few queries against a cache, float32, forward only: dense scores beside tiles."""
    for B, T, S in DECODING:
        shapes = ((B, T, 6, 64), (B, S, 2, 64), (B, S, 2, 64))
        random = np.random.default_rng(0)
        given = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
        times = []
        for name in CONTENDERS["cpu"]:
            program = jax.jit(partial(flash_attention, implementation=name))
            jax.block_until_ready(program(*given))
            times.append(statistics.median(seconds(program, given, 1) for _ in range(rounds)))
        yield f"| {B} | {T} | {S} | {1e3 * times[0]:.2f} | {1e3 * times[1]:.2f} |"


def main() -> None:
    """Prints the tables, and writes them to a file."""
    parser = argparse.ArgumentParser(description="attention against what a user would call instead")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--names", nargs="+", help="of our and jax's implementations")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write the table here")
    options = parser.parse_args()
    device, on_cpu = jax.devices()[0], jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    cases = [
        c for c in (CPU if on_cpu else ACCELERATOR) if not options.only or c.name in options.only
    ]
    names = options.names or list(CONTENDERS[jax.default_backend()])
    lines = [
        f"{device.device_kind}, jax {jax.__version__}, {dtype.__name__}, {time.strftime('%d %B %Y')}",
        "",
        "| case | | forward, ms | TFLOP/s | backward, ms | TFLOP/s | temporaries, MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    theirs = with_torch(cases, options.rounds)
    for case in cases:
        for row in [*measure(case, dtype, options.rounds, names), *theirs]:
            if row.case == case.name:
                lines.append(line(case, row))
                print(lines[-1], flush=True)
    if on_cpu and not options.only:
        lines += ["", "| B | T | S | reference, ms | xla_chunked, ms |", "|---|---|---|---|---|"]
        lines += list(decoding(options.rounds))
        print(*lines[-len(DECODING) - 3 :], sep="\n")
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
