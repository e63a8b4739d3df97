"""A config's training step on the devices that are here: tokens a second, MFU, and where the time goes.

    python tools/bench_step.py configs/pretrain_1b.py --step.batch-size 16 --step.micro-batches 1
    python tools/bench_step.py configs/pretrain_125m.py --documents 8 --kernels 20 --against-torch

The step is that of `llm-jax pretrain`, on random tokens that lie on the device already, in rows of
`--documents` of equal length. The plan's estimate is printed beside it. On a GPU the profiler tells what
kernels the time goes to, by kind. `--against-torch` times the same model, batch and optimizer in
transformers (`bench_step_torch.py`): eager and compiled, SDPA attention, bfloat16 autocast over float32
parameters, fused AdamW; one document a row, which it cannot do otherwise.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs the memory too

import jax
import numpy as np

from llm_jax import config as config_files
from llm_jax.data.batch import Batch
from llm_jax.errors import ConfigError
from llm_jax.model import flops_per_token
from llm_jax.plan import estimate, parse_topology, step_of
from llm_jax.plan.request import Request
from llm_jax.run.plan import request_of
from llm_jax.run.pretrain import PretrainConfig
from llm_jax.sharding import batch_sharding, make_mesh
from llm_jax.train import init_state
from llm_jax.train.metrics import peak_flops

TORCH = Path(__file__).with_name("bench_step_torch.py")
KINDS = {  # kind -> what the names of its kernels hold
    "attention": ("llm_jax_attention", "mosaic", "fmha", "flash"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "between devices": ("nccl", "all_reduce", "all_gather", "reduce_scatter"),
    "copies": ("memcpy", "memset", "copy"),
}
CHIPS = {"H100": "h100", "H200": "h200"}


def random_batch(request: Request, documents: int) -> Batch:
    """Rows of documents of equal length."""
    rows, length = request.step.batch_size, request.seq_len // documents
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, request.model.vocab_size, (rows, request.seq_len), np.int32)
    where = np.arange(request.seq_len)
    over = lambda row: np.broadcast_to(row.astype(np.int32), tokens.shape)  # noqa: E731
    mask = np.ones(tokens.shape, np.float32)
    targets = np.roll(tokens, -1, axis=1)
    return Batch(tokens, targets, over(where % length), over(where // length + 1), mask)


def time_step(
    request: Request, documents: int, steps: int, kernels: int
) -> tuple[float, float, Counter[str]]:
    """Median seconds of a step, GiB at most in use, and seconds of a step by kernel."""
    mesh = make_mesh(request.mesh, jax.devices())
    step, optimizer = step_of(request, mesh)
    state = init_state(request.model, optimizer, mesh, seed=0)
    sharding = batch_sharding(mesh, request.step.batch_size, request.seq_len)
    batch = jax.device_put(random_batch(request, documents), sharding)
    seconds = []
    with jax.set_mesh(mesh):
        for _ in range(steps + 2):
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begin)
        spent: Counter[str] = Counter()
        if kernels:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder, create_perfetto_trace=True):
                    for _ in range(3):
                        state, _ = step(state, batch)
                    jax.block_until_ready(state)
                spent = kernel_seconds(Path(folder), 3)
    stats = jax.devices()[0].memory_stats() or {}
    return statistics.median(seconds[2:]), stats.get("peak_bytes_in_use", 0) / 2**30, spent


def kernel_seconds(folder: Path, steps: int) -> Counter[str]:
    """Seconds a step of every kernel on the first device, from the profiler's trace."""
    (file,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {
        (e["pid"], e.get("tid"), e["name"]): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name")
    }
    device = min(
        (
            pid
            for (pid, _, kind), name in names.items()
            if kind == "process_name" and "GPU:" in name
        ),
        default=None,
    )
    spent: Counter[str] = Counter()
    for e in events:
        thread = names.get((e.get("pid"), e.get("tid"), "thread_name"), "")
        if e.get("ph") == "X" and e["pid"] == device and "Stream" in thread:
            spent[e["name"]] += e["dur"] / 1e6 / steps
    return spent


def kind_of(kernel: str) -> str:
    """The first kind whose words the name holds."""
    name = kernel.lower()
    found = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(found, "all else, element by element")


def torch_rows(request: Request, steps: int) -> list[dict[str, Any]]:
    """transformers on the same GPU, in a process of its own."""
    model = request.model
    asked = {
        "vocab_size": model.vocab_size, "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim, "max_position_embeddings": request.seq_len,
        "tie_word_embeddings": model.tied_embeddings, "rows": request.step.batch_size // request.step.micro_batches,
        "steps": steps,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(TORCH), json.dumps(asked)], stdout=subprocess.PIPE, text=True, check=False
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--documents", type=int, default=1, help="in every row (default: 1)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=0, help="name the slowest; 0: no profile")
    parser.add_argument("--against-torch", action="store_true")
    known, overrides = parser.parse_known_args()
    request = request_of(config_files.load(known.config, PretrainConfig, overrides))
    if known.documents < 1 or request.seq_len % known.documents:
        raise ConfigError(f"--documents {known.documents} must divide seq_len={request.seq_len}")
    # before jax takes memory, which it keeps
    theirs = torch_rows(request, known.steps) if known.against_torch else []
    kind, count = jax.devices()[0].device_kind, len(jax.devices())
    print(f"{count} x {kind}, jax {jax.__version__}, {request.tokens:,} tokens a step\n")
    seconds, gib, spent = time_step(request, known.documents, known.steps, known.kernels)
    work = flops_per_token(request.model, request.seq_len // known.documents) * request.tokens
    peak = peak_flops(kind) * count
    print("| | seconds a step | tokens/s | MFU | GiB |\n|---|---|---|---|---|")

    def row(name: str, seconds: float, tokens: int, work: float, gib: float) -> None:
        mfu = f"{work / seconds / peak:.1%}" if peak else ""
        print(
            f"| {name} | {seconds:.4f} | {tokens / seconds:,.0f} | {mfu} | {gib:.1f} |", flush=True
        )

    row("llm_jax", seconds, request.tokens, work, gib)
    chip = next((short for name, short in CHIPS.items() if name in kind), "")
    if chip:
        counted = estimate(request, parse_topology(f"{chip}:1x{count}"))
        row("the plan's estimate", counted.time.seconds, request.tokens, counted.time.flops, counted.memory.total / 2**30)  # fmt: skip
    for found in theirs:
        share = found["tokens"] / request.tokens
        row(found["name"], found["seconds"], found["tokens"], work * share, found["gib"])
    if spent:
        kinds: Counter[str] = Counter()
        for name, one in spent.items():
            kinds[kind_of(name)] += one
        print("\n| kernels | seconds a step | share |\n|---|---|---|")
        for name, one in kinds.most_common() + spent.most_common(known.kernels):
            print(f"| {name[:90]} | {one:.4f} | {one / sum(kinds.values()):.1%} |", flush=True)


if __name__ == "__main__":
    main()
