"""Which assembler compiles our kernels: some releases make wrong code of them, one way slow code.

12.8.0 to 12.9.0 miscompile causal attention. Before 13.3, ptxas may reuse the registers of a WGMMA's
left operand while it still reads them, which is how attention multiplies shares with values
(triton-lang/triton #9433, #11781). From jax 0.12 on, Mosaic GPU assembles with libnvJitLink where it
is installed; that ignores `setmaxnreg`, so that a warpgroup has 168 registers instead of 240.
"""

import importlib.metadata
import importlib.util
import logging
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import jax

log = logging.getLogger(__name__)

BROKEN = ((12, 8, 0), (12, 9, 86))  # up to, not including, that of CUDA 12.9.1
SOUND = (13, 3, 0)
VERSION = re.compile(r"V?(\d+)\.(\d+)\.(\d+)")


@cache
def ptxas_objection() -> str | None:
    """Why what assembles our kernels here must not; None: it may, or is not known.

    What is only suspect, or slow, is logged, once.
    """
    if jax.__version_info__ >= (0, 12):
        try:
            version = importlib.metadata.version("nvidia-nvjitlink")
        except importlib.metadata.PackageNotFoundError:
            pass
        else:
            log.warning(
                "jax %s assembles Mosaic GPU kernels with libnvJitLink, which ignores setmaxnreg: "
                "attention's backward pass spills registers and is slow; with jax 0.11 it is not",
                jax.__version__,
            )
            return judge(version)
    path = find_ptxas()
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return judge(done.stdout.rpartition(", V")[2])


def find_ptxas() -> str | None:
    """The ptxas that jax uses: up to 0.10 that on PATH goes before that of the pip wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    wheels = [shutil.which("ptxas", path=str(Path(f) / "cu13" / "bin")) for f in folders]
    found = [path for path in wheels if path]
    on_path = shutil.which("ptxas")
    if on_path:
        found.insert(0 if jax.__version_info__ < (0, 11) else len(found), on_path)
    return found[0] if found else None


def judge(version_text: str) -> str | None:
    """`ptxas_objection` of a version such as 13.0.88."""
    found = VERSION.match(version_text.strip())
    if found is None:
        return None
    version = tuple(int(part) for part in found.groups())
    spelt = ".".join(found.groups())
    if BROKEN[0] <= version < BROKEN[1]:
        return f"is miscompiled by ptxas {spelt}; install nvidia-cuda-nvcc 13.3 or newer"
    if version < SOUND:
        log.warning(
            "ptxas %s may reuse registers that a running WGMMA still reads; 13.3 does not, "
            "so install nvidia-cuda-nvcc 13.3 or newer",
            spelt,
        )
    return None
