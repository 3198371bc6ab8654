"""Compiling for a named GPU on a machine that has none: registers, spills, shared memory, and memory analysis.

jaxlib's compile-only topology takes a program down to machine code (SASS) with no driver and no device. It needs the
`aot` extra. ptxas keeps the first architecture it meets, so one process compiles for one target: `compile_cases`
starts a fresh one.

    python -m pallas_kernels.aot h100 pallas_kernels.cases_linear:compile_cases
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.dispatch import compiling_for

EXTRA = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13")


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for; its figures are in targets/NAME.txtpb (XLA's GpuTargetConfigProto)."""

    name: str
    arch: tuple[int, int]

    @property
    def config(self) -> str:
        return (Path(__file__).parent / "targets" / f"{self.name}.txtpb").read_text()

    def figure(self, field: str) -> float:
        """A number of the target's description, e.g. "memory_bandwidth" in bytes/s."""
        match = re.search(rf"^\s*{field}: ([\d.]+)$", self.config, re.MULTILINE)
        if match is None:
            raise KeyError(f"targets/{self.name}.txtpb says nothing of {field}")
        return float(match[1])


TARGETS = {
    target.name: target
    for target in (
        Target("h100", (9, 0)),
        Target("rtx4090", (8, 9)),
        Target("rtx5090", (12, 0)),
        Target("a100", (8, 0)),
    )
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile: `fn(*args)`, args being shapes (`jax.ShapeDtypeStruct`) or arrays.

    targets: names of the GPUs that it is meant for. kernels: how many Mosaic GPU kernels it must hold
    at least (a ragged end may need a second).
    """

    name: str
    fn: Callable[..., Any]
    args: Sequence[Any]
    targets: tuple[str, ...] = tuple(TARGETS)
    kernels: int = 1


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What ptxas said of one kernel. serialized: wgmma instructions made to wait for each other."""

    kernel: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    serialized: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """One case on one target. Bytes are XLA's memory analysis; error is None or the first line of what failed."""

    case: str
    target: str
    kernels: tuple[KernelReport, ...]
    seconds: float
    argument_bytes: int = 0
    output_bytes: int = 0
    temp_bytes: int = 0
    error: str | None = None


def compile_cases(target: str, source: str, names: Sequence[str] = ()) -> list[Report]:
    """Compiles what `source` ("module:function", returning Cases) lists for the target, in a process of its own.

    names: only these cases. Raises ModuleNotFoundError without the `aot` extra, RuntimeError if the process dies.
    """
    require_extra()
    with tempfile.TemporaryDirectory(prefix="mosaic-") as folder:
        out = Path(folder) / "reports.json"
        dumps = Path(folder) / "dumps"
        dumps.mkdir()
        command = [sys.executable, "-m", "pallas_kernels.aot", target, source, *names, "--json", str(out)]
        environment = os.environ | _dumping(dumps)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not out.exists():
            raise RuntimeError(f"compiling {source} for {target} died ({done.returncode}): {done.stderr[-2000:]}")
        return [_report(entry) for entry in json.loads(out.read_text())]


def compile_for(target: Target, fn: Callable[..., Any], args: Sequence[Any]) -> jax.stages.Compiled:
    """Compiles jit(fn)(*args) for the target. In a process that compiles for no other and has `environment` set."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target.config)
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tuple(args))
    with compiling_for(target.arch, int(target.figure("core_count"))):
        return jax.jit(fn).lower(*shapes).compile()


def _run_case(case: Case, target: Target, dumps: Path) -> Report:
    before = set(dumps.iterdir())
    start = time.perf_counter()
    try:
        compiled = compile_for(target, case.fn, case.args)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return Report(case.name, target.name, (), time.perf_counter() - start, error=message)
    seconds = time.perf_counter() - start
    kernels = tuple(_read_dump(path) for path in sorted(set(dumps.iterdir()) - before) if path.suffix == ".ptxas")
    error = None
    limit = int(target.figure("shared_memory_per_block_optin"))
    if len(kernels) < case.kernels:
        error = f"{len(kernels)} kernels instead of at least {case.kernels}"
    for kernel in kernels:
        if kernel.smem_bytes > limit:
            error = f"{kernel.kernel} wants {kernel.smem_bytes} bytes of shared memory; {target.name} has {limit}"
    memory: Any = compiled.memory_analysis()
    return Report(
        case.name,
        target.name,
        kernels,
        seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        error=error,
    )


def _read_dump(path: Path) -> KernelReport:
    text = path.read_text()
    resources = path.with_suffix(".resources.txt").read_text()
    registers = re.search(r"Used (\d+) registers", text)
    scratch = re.search(r"smem_scratch_bytes=(\d+)", resources)
    if registers is None or scratch is None:
        raise RuntimeError(f"cannot read what ptxas wrote to {path}: {text[:500]}")
    return KernelReport(
        kernel=re.sub(r"_\d+$", "", path.stem),
        registers=int(registers[1]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)),
        smem_bytes=int(scratch[1]),
        serialized="serialized" in text,
    )


def _report(entry: dict[str, Any]) -> Report:
    fields: dict[str, Any] = entry | {"kernels": tuple(KernelReport(**kernel) for kernel in entry["kernels"])}
    return Report(**fields)


def environment() -> dict[str, str]:
    """What a process needs before it imports JAX to compile for a card: no driver is asked for, no cache answers."""
    return {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def _dumping(dumps: Path) -> dict[str, str]:
    """`environment`, and what ptxas says is kept."""
    return environment() | {
        "MOSAIC_GPU_DUMP_TO": str(dumps),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
    }


def require_extra() -> None:
    missing = [name for name in EXTRA if not _found(name)]
    if missing:
        raise ModuleNotFoundError(
            f"compiling for a GPU that is not here needs the 'aot' extra ({', '.join(missing)} not found): "
            "`uv sync --extra aot` or `pip install turbojax[aot]`"
        )


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def load_cases(source: str) -> list[Case]:
    """The Cases that "module:function" returns."""
    module, _, function = source.partition(":")
    return getattr(importlib.import_module(module), function)()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("source", help="module:function that returns the Cases")
    parser.add_argument("names", nargs="*", help="only these cases")
    parser.add_argument("--json", type=Path, help="write the reports here")
    options = parser.parse_args(argv)
    target = TARGETS[options.target]
    if "MOSAIC_GPU_DUMP_TO" not in os.environ:  # called by hand: JAX reads these when it starts, so start again
        reports = compile_cases(options.target, options.source, options.names)
    else:
        cases = [case for case in load_cases(options.source) if target.name in case.targets]
        if options.names:
            cases = [case for case in cases if case.name in options.names]
        dumps = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
        reports = [_run_case(case, target, dumps) for case in cases]
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    for report in reports:
        kernels = "; ".join(
            f"{k.kernel} {k.registers} registers, {k.spill_bytes} B spilled, {k.smem_bytes} B shared"
            + (", wgmma SERIALIZED" if k.serialized else "")
            for k in report.kernels
        )
        print(f"{report.case} [{report.target}] {report.seconds:.1f} s: {report.error or kernels}")
    return int(any(report.error for report in reports))


if __name__ == "__main__":
    sys.exit(main())
