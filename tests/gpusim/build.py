"""Build the simulated GPU for the CUDA build of torch in an environment: needs g++ and nm; seconds.

    python tests/gpusim/build.py VENV
    VENV/gpusim/run VENV/bin/python -m pytest tests/gpusim

The environment itself is not changed: `run` puts the simulated libraries before those that torch brings.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = {  # name: where the real one is, under site-packages/nvidia; the driver is nowhere
    "libcudart.so.13": "cu13/lib",
    "libcublasLt.so.13": "cu13/lib",
    "libcublas.so.13": "cu13/lib",
    "libcudnn.so.9": "cudnn/lib",
    "libnccl.so.2": "nccl/lib",
    "libcuda.so.1": None,
}


def exported(library: Path) -> set[str]:
    text = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = (line.split() for line in text.splitlines())
    return {s[2].split("@")[0] for s in symbols if len(s) == 3 and s[1] in "TW"} - {"_init", "_fini"}


def build(venv: Path) -> Path:
    """The folder with the simulated libraries and the script `run`."""
    (nvidia,) = venv.glob("lib/python3*/site-packages/nvidia")
    include, out = nvidia / "cu13/include", venv / "gpusim"
    more = nvidia.parent / "triton/backends/nvidia/include"  # headers that torch's packages leave out
    out.mkdir(exist_ok=True)
    own, flags = out / "libgpusim.so", ["-O1", "-fPIC", "-shared", "-w"]
    compiler = ["g++", "-std=c++17", *flags, "-fvisibility=hidden", "-I", include, "-I", more]
    subprocess.run([*compiler, HERE / "gpusim.cpp", "-o", own, "-Wl,-soname,libgpusim.so"], check=True)
    mine = exported(own)
    for name, folder in LIBRARIES.items():
        if folder is None:
            names = set(re.findall(r"\bcu[A-Z]\w+", (include / "cuda.h").read_text()))
        else:
            names = exported(nvidia / folder / name)
        source = "long gpusim_stub(const char*);\n"
        source += "".join(f'long {n}(void) {{ return gpusim_stub("{n}"); }}\n' for n in sorted(names - mine))
        version = out / "versions"  # torch asks for the symbols of the real library by its name
        version.write_text(f"{name if folder == 'cu13/lib' or 'cudnn' in name else ''} {{ global: *; }};\n")
        link = [f"-Wl,-soname,{name}", f"-Wl,--version-script={version}", "-L", out, "-l:libgpusim.so", f"-Wl,-rpath,{out}"]
        command = ["gcc", *flags, "-Wl,--no-as-needed", "-x", "c", "-", "-x", "none", "-o", out / name, *link]
        subprocess.run(command, input=source, text=True, check=True)
    (out / "libcuda.so").unlink(missing_ok=True)
    (out / "libcuda.so").symlink_to("libcuda.so.1")
    preload = " ".join(str(out / name) for name in ("libgpusim.so", *LIBRARIES))
    run = out / "run"
    run.write_text(
        f"#!/bin/sh\n# run COMMAND...: with the simulated GPU\nexport LD_PRELOAD='{preload}'\n"
        f'export LD_LIBRARY_PATH={out} TRITON_LIBCUDA_PATH={out} GPUSIM_DEVICES=${{GPUSIM_DEVICES:-2}}\nexec "$@"\n'
    )
    run.chmod(0o755)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1]).resolve()))
