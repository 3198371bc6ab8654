"""What the kernels cost on each target, recorded, so that a change that costs more is seen.

budgets.json: {target: {case: {kernel: [registers a thread, bytes of shared memory]}}}, from `aot.compile_cases`.
Recorded with the `aot` extra and a few minutes a target:

    python -m pallas_kernels.budgets [TARGET ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pallas_kernels.aot import TARGETS, Report, compile_cases

SOURCES = ("pallas_kernels.cases_linear:compile_cases", "pallas_kernels.cases_attention:compile_cases")
FILE = Path(__file__).parent / "budgets.json"
# Registers are handed out in eights: another release of ptxas may take one unit more.
REGISTER_UNIT = 8

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


def main(targets: list[str]) -> int:
    budgets = table() if FILE.exists() else {}
    wrong = []
    for target in targets or TARGETS:
        reports = [report for source in SOURCES for report in compile_cases(target, source)]
        wrong += [fault for report in reports for fault in faults(report)]
        budgets[target] = costs(reports)
        _write(budgets)
    print("\n".join(wrong) or f"wrote {FILE}: no faults")
    return int(bool(wrong))


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
