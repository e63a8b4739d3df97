"""Import of a random 1.1B-parameter bfloat16 Llama made on the spot: peak memory, and time against reading.

    python tools/bench_import.py            # 2.2 GB in a temporary folder, some minutes
    python tools/bench_import.py --layers 2 # a quick try

Memory: the peak of the process beyond the parameters and the idle process; bound: 1.3 x the largest tensor
plus 500 MB. Time, each against the least that any program needs for the same end:

    weights   files to parameters, against reading the files: into one small buffer, and into memory that
              holds them all, as parameters must be held (the system takes its time to give it: on a
              busy machine whose memory is in pieces, longer than everything else together). Both are
              measured in turn, so that what else the machine does falls on both
    command   all of `llm-jax import --no-logits`: reads the files twice (once to compare), writes as many
              bytes, reads them back; against reading the files, writing the bytes and fsync
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from llm_jax.checkpoint import names
from llm_jax.checkpoint.safetensors_files import ShardWriter
from llm_jax.model import count_params, families

CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
MB = 1e6

MEASURE = """
import json, os, sys, time
import jax, jax.numpy as jnp
from pathlib import Path
from llm_jax.checkpoint.hf_import import differences, open_source, read_params
from llm_jax.run import gate, hf_files
import llm_jax.api, orbax.checkpoint
jnp.zeros(8).block_until_ready()

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(name))

folder, out, what = sys.argv[1:]
idle = status("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
if what == "weights":
    params = read_params(open_source(folder))
else:
    from llm_jax.run.import_model import import_model
    import_model(Path(folder), Path(out), skip="bench")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "idle": idle, "peak": status("VmHWM")}))
"""


def main() -> None:
    """Makes the folder, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3, help="medians are of so many")
    parser.add_argument("--folder", default="", help="where to work (default: a temporary folder)")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.folder or None) as work:
        source, out = Path(work) / "hf", Path(work) / "ours"
        config = CONFIG | {"num_hidden_layers": words.layers}
        size, largest, count = make(source, config)
        bound = 1.3 * largest + 500 * MB
        print(f"{count / 1e9:.2f} B parameters, {size / MB:.0f} MB, largest {largest / MB:.0f} MB")
        rounds(source, out, size, words.rounds, bound)
        print(f"reading, writing the same bytes, fsync: {copy(source, Path(work) / 'copy'):.2f} s")
        tell("command", [measure(source, out, "command")], size, bound)


def rounds(source: Path, out: Path, size: int, count: int, bound: float) -> None:
    """Weights and what they are compared with, one after the other in every round; medians and ratios."""
    reading: dict[str, list[float]] = {}
    found: dict[str, list[dict]] = {}
    for _ in range(count):
        for cold in (True, False):
            where = "from the disk" if cold else "from the page cache"
            for name, reader in (("one small buffer", read), ("memory of their own", None)):
                if cold:
                    forget(source)
                seconds = reader(source) if reader else read_whole(source, size)
                reading.setdefault(f"{where} into {name}", []).append(seconds)
            if cold:
                forget(source)
            found.setdefault(f"weights {where}", []).append(measure(source, out, "weights"))
    for what, runs in found.items():
        tell(what, runs, size, bound)
        mine = statistics.median(run["seconds"] for run in runs)
        for name, times in reading.items():
            if name.startswith(what.removeprefix("weights ")):
                theirs = statistics.median(times)
                print(f"    {mine / theirs:.2f}x reading {name} ({theirs:.2f} s)")


def tell(what: str, runs: list[dict], size: int, bound: float) -> None:
    """Medians of time, the worst of memory."""
    seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu"))
    beyond = max(run["peak"] - run["idle"] for run in runs) - size
    print(
        f"{what}: {seconds:.2f} s ({cpu:.2f} s of CPU), "
        f"{beyond / MB:.0f} MB beyond the parameters (bound {bound / MB:.0f})"
    )


def make(folder: Path, config: dict) -> tuple[int, int, int]:
    """Writes the model; bytes of the tensors, of the largest, and the number of parameters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, ours = families.read(config)
    tensors = names.tensors(family, ours)
    writer = ShardWriter(folder, {t.name: ("BF16", t.shape) for t in tensors}, 10**9)
    draw = np.random.default_rng(0)
    sizes = []
    for tensor in tensors:
        value = draw.standard_normal(tensor.shape, np.float32) * 0.02
        writer.write(tensor.name, value.astype(ml_dtypes.bfloat16))
        sizes.append(value.size * 2)
    writer.close()
    return sum(sizes), max(sizes), count_params(ours)


def forget(folder: Path) -> None:
    """Drops the files from the page cache, so that they are read from the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    """Seconds to read every weight file into one buffer, piece by piece."""
    buffer = bytearray(64 << 20)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_whole(folder: Path, size: int) -> float:
    """Seconds to read every weight file into new memory that holds them all, in a process of its own."""
    program = (
        "import sys, time, pathlib, numpy as np\n"
        "start = time.perf_counter()\n"
        "whole, done = memoryview(np.empty(int(sys.argv[2]) + (1 << 20), np.uint8).data), 0\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.safetensors')):\n"
        "    with open(path, 'rb', buffering=0) as file:\n"
        "        while count := file.readinto(whole[done:]):\n"
        "            done += count\n"
        "print(time.perf_counter() - start)"
    )
    words = [sys.executable, "-c", program, str(folder), str(size)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def copy(folder: Path, to: Path) -> float:
    """Seconds to read every weight file, write its bytes again and make them durable."""
    buffer = memoryview(bytearray(64 << 20))
    start = time.perf_counter()
    with open(to, "wb", buffering=0) as out:
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    out.write(buffer[:count])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    to.unlink()
    return seconds


def measure(source: Path, out: Path, what: str) -> dict:
    """Seconds and memory of one import in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(out), what],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
