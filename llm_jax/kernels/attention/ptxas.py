"""Which ptxas compiles our kernels: some releases make wrong code of them.

12.8.0 to 12.9.0 miscompile causal attention. Before 13.3, ptxas may reuse the registers of a WGMMA's
left operand while it still reads them, which is how attention multiplies shares with values
(triton-lang/triton #9433, #11781).
"""

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
VERSION = r"release \d+\.\d+, V(\d+)\.(\d+)\.(\d+)"


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


@cache
def ptxas_objection() -> str | None:
    """Why the ptxas that jax uses must not compile our kernels; None: it may, or is not known.

    One that is only suspect is logged, once.
    """
    path = find_ptxas()
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return judge(done.stdout)


def judge(version_text: str) -> str | None:
    """`ptxas_objection` of what `ptxas --version` prints."""
    found = re.search(VERSION, version_text)
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
