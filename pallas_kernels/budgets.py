"""What the kernels cost on each target, recorded, so that a change that costs more is seen.

budgets.json: {target: {case: {kernel: [registers a thread, bytes of shared memory]}}}, from `aot.compile_cases`.
Recorded with the `aot` extra, a few minutes a target; what is done is kept as it goes, and --missing goes on from it:

    python -m pallas_kernels.budgets [TARGET ...] [--missing]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import batched
from pathlib import Path

from pallas_kernels.aot import TARGETS, Report, compile_cases, load_cases

SOURCES = tuple(f"pallas_kernels.cases_{part}:compile_cases" for part in ("linear", "attention", "backward"))
FILE = Path(__file__).parent / "budgets.json"
# Registers are handed out in eights: another release of ptxas may take one unit more.
REGISTER_UNIT = 8
CASES_A_PROCESS = 12

Costs = dict[str, dict[str, list[int]]]


def table() -> dict[str, Costs]:
    """budgets.json as it stands."""
    return json.loads(FILE.read_text())


def costs(reports: list[Report]) -> Costs:
    """The costs of each case's kernels; of several of one name (a ragged end compiles a second) the larger."""
    found: Costs = {}
    for report in reports:
        kernels = found.setdefault(report.case, {})
        for kernel in report.kernels:
            registers, smem = kernels.get(kernel.kernel, [0, 0])
            kernels[kernel.kernel] = [max(registers, kernel.registers), max(smem, kernel.smem_bytes)]
    return found


def faults(report: Report) -> list[str]:
    """What no budget allows: an error, spills to memory, wgmma that waits for itself."""
    found = [report.error] if report.error else []
    for kernel in report.kernels:
        if kernel.spill_bytes:
            found.append(f"{kernel.kernel} spills {kernel.spill_bytes} bytes")
        if kernel.serialized:
            found.append(f"{kernel.kernel} has its wgmma serialized")
    return [f"{report.case} [{report.target}]: {fault}" for fault in found]


def overruns(found: Costs, budget: Costs) -> list[str]:
    """Where costs differ from their budget: more registers (by over a unit), other shared memory, unlisted kernels."""
    wrong = []
    for case, kernels in found.items():
        allowed = budget.get(case, {})
        if kernels.keys() != allowed.keys():
            wrong.append(f"{case}: kernels {sorted(kernels)} are not those of budgets.json, {sorted(allowed)}")
            continue
        for kernel, (registers, smem) in kernels.items():
            if registers > allowed[kernel][0] + REGISTER_UNIT or smem != allowed[kernel][1]:
                wrong.append(f"{case}: {kernel} takes {[registers, smem]}, its budget is {allowed[kernel]}")
    return wrong


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.budgets", description=(__doc__ or "").split(",")[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all of them, unless named")
    parser.add_argument("--missing", action="store_true", help="only the cases that have no budget yet")
    options = parser.parse_args(argv)
    wrong = []
    for target in options.targets or TARGETS:
        wanted = {source: cases_of(source, target) for source in SOURCES}
        known = _record(target, {}, [name for names in wanted.values() for name in names])
        for source, names in wanted.items():
            left = [name for name in names if not (options.missing and name in known)]
            for part in batched(left, CASES_A_PROCESS):
                reports = compile_cases(target, source, part)
                wrong += [fault for report in reports for fault in faults(report)]
                _record(target, costs(reports), [name for names in wanted.values() for name in names])
                print(f"{target}: {len(part)} cases, {sum(report.seconds for report in reports):.0f} s", flush=True)
    print("\n".join(wrong) or f"wrote {FILE}: no faults")
    return int(bool(wrong))


def _record(target: str, found: Costs, cases: Sequence[str]) -> Costs:
    """Puts `found` into the table, which another target's run may have changed meanwhile; what is left of the target,
    in the order of `cases`, without those that are gone."""
    budgets = table() if FILE.exists() else {}
    known = budgets.get(target, {}) | found
    budgets[target] = {name: known[name] for name in cases if name in known}
    _write({name: budgets[name] for name in TARGETS if name in budgets})
    return budgets[target]


def cases_of(source: str, target: str) -> list[str]:
    """Names of the cases that `source` has for the target."""
    return [case.name for case in load_cases(source) if target in case.targets]


def _write(budgets: dict[str, Costs]) -> None:
    """One line a case, under a temporary name first."""
    rows = (
        f"{json.dumps(target)}: {{\n"
        + ",\n".join(f"  {json.dumps(case)}: {json.dumps(kernels)}" for case, kernels in cases.items())
        + "\n}"
        for target, cases in budgets.items()
    )
    temporary = FILE.with_suffix(".part")
    temporary.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    temporary.rename(FILE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
