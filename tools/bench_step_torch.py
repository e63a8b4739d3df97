"""transformers' rows of bench_step.py, one JSON object a line: a Llama of the same shape on this GPU."""

import json
import statistics
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def time_step(model: Any, optimizer: Any, ids: Any, steps: int) -> float:
    """Median seconds of forward, backward, clipping and update."""
    seconds = []
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def main() -> None:
    """One line for eager and one for compiled; fewer rows at a time where memory is short."""
    asked = json.loads(sys.argv[1])
    rows, steps = asked.pop("rows"), asked.pop("steps")
    torch.set_float32_matmul_precision("high")
    config = transformers.LlamaConfig(**asked, attn_implementation="sdpa")
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config)
    model.train()
    length = config.max_position_embeddings
    for name, run in (("eager", model), ("compiled", torch.compile(model))):
        for at_once in (rows, rows // 2, rows // 4):
            torch.cuda.reset_peak_memory_stats()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            ids = torch.randint(4, config.vocab_size, (at_once, length), device="cuda")
            try:
                seconds = time_step(run, optimizer, ids, steps)
            except torch.cuda.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                del optimizer
                torch.cuda.empty_cache()
                continue
            told = f"transformers {transformers.__version__}, torch {torch.__version__}, {name}, {at_once} rows"
            gib = torch.cuda.max_memory_allocated() / 2**30
            row = {"name": told, "seconds": seconds, "tokens": at_once * length, "gib": gib}
            print(json.dumps(row), flush=True)
            break


if __name__ == "__main__":
    main()
