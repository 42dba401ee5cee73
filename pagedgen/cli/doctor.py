"""``pagedgen doctor``: what is here, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pagedgen.cli import console
from pagedgen.errors import PagedgenError

OK, MISSING, OPTIONAL = "ok", "missing", "not here"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked for, what was found, and what to do where that is not enough."""

    name: str
    state: str
    found: str
    fix: str = ""


def run(*, as_json: bool) -> int:
    """Print the table; 1 when something that every use needs is missing."""
    checks = [check() for check in CHECKS] + [_package(*row) for row in PACKAGES] + _devices()
    if as_json:
        console.emit([{"name": c.name, "state": c.state, "found": c.found, "fix": c.fix} for c in checks])
    else:
        console.table(
            "pagedgen doctor",
            ("what", "state", "found", "to do"),
            ((c.name, c.state, c.found, c.fix) for c in checks),
        )
    return int(any(check.state == MISSING for check in checks))


def _python() -> Check:
    return Check("Python", OK, f"{platform.python_version()} ({sys.executable})")


def _compiler() -> Check:
    from pagedgen.compiler.link import host_compiler

    try:
        command = host_compiler()
    except PagedgenError as error:
        return Check("C++ compiler", MISSING, str(error), "apt install g++, or pip install ziglang")
    except ImportError as error:  # jinja2: reported on its own line too
        return Check("C++ compiler", MISSING, str(error), "pip install 'pagedgen[tune]'")
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=60)
    if answer.returncode:
        return Check("C++ compiler", MISSING, f"{' '.join(command)} --version fails", "apt install g++")
    return Check("C++ compiler", OK, f"{' '.join(command)}: {answer.stdout.splitlines()[0]}")


def _cache() -> Check:
    try:
        from pagedgen.autotune.paths import user_cache

        folder = user_cache()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = os.statvfs(folder)
    except (PagedgenError, ImportError, OSError) as error:
        return Check("user cache", MISSING, str(error), "set PAGEDGEN_CACHE_DIR to a folder you can write")
    return Check("user cache", OK, f"{folder} ({free.f_bavail * free.f_frsize / 1e9:.1f} GB free)")


CHECKS: tuple[Callable[[], Check], ...] = (_python, _compiler, _cache)

# package, what it is for, the extra that brings it, whether every use needs it
PACKAGES = (
    ("torch", "tensors", "", True),
    ("numpy", "arrays", "", True),
    ("apache-tvm-ffi", "calling packs", "", True),
    ("triton", "kernels for GPUs", "tune", False),
    ("apache-tvm", "kernels for CPUs", "cpu", False),
    ("optuna", "search", "tune", False),
    ("sympy", "cost model", "tune", False),
    ("jinja2", "templates", "tune", False),
)


def _package(name: str, purpose: str, extra: str, needed: bool) -> Check:
    try:
        return Check(name, OK, f"{version(name)}, for {purpose}")
    except PackageNotFoundError:
        state = MISSING if needed else OPTIONAL
        return Check(
            name,
            state,
            f"for {purpose}",
            f"pip install 'pagedgen[{extra}]'" if extra else f"pip install {name}",
        )


def _devices() -> list[Check]:
    from pagedgen.values.target_table import cpu_target

    try:
        cpu = cpu_target()
        checks = [Check("CPU", OK, f"{cpu.arch}, {cpu.num_sms} cores for this process")]
    except PagedgenError as error:
        checks = [Check("CPU", OPTIONAL, str(error), "kernels for GPUs can be made here all the same")]
    module = Path("/sys/module/nvidia/version")
    driver = module.read_text(encoding="ascii").strip() if module.is_file() else ""
    if not driver:
        return [*checks, Check("CUDA driver", OPTIONAL, "none", "tune --gpu NAME predicts without one")]
    checks.append(Check("CUDA driver", OK, driver))
    try:
        import torch
    except ImportError as error:
        return [*checks, Check("GPU", MISSING, str(error), "pip install torch")]
    if not torch.cuda.is_available():
        fix = (
            "install a CUDA build of torch"
            if torch.version.cuda is None
            else "check CUDA_VISIBLE_DEVICES and nvidia-smi"
        )
        return [*checks, Check("GPU", MISSING, f"torch {torch.__version__} sees none", fix)]
    from pagedgen.values.target_table import gpu_target

    for index in range(torch.cuda.device_count()):
        try:
            target = gpu_target(index)
            found = f"{torch.cuda.get_device_name(index)}: target {target.name} ({target.arch})"
            checks.append(Check(f"GPU {index}", OK, found))
        except PagedgenError as error:
            checks.append(Check(f"GPU {index}", OPTIONAL, str(error)))
    return checks
