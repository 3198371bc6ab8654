"""The few-step sampler: fresh noise or none, which noise levels, how many steps, and what that does to diversity.

    python -m experiments.sampler                                          (12 minutes with --clips 32, one busy core)
    python -m experiments.sampler --sigma-max 40,80,200 --clips 96

Arms of rCM's sampler: SDE (fresh noise after each step) against ODE; the middle noise levels of TurboDiffusion's code
(angles 1.5, 1.4, 1.0), of the rCM paper (1.3, 1.0, 0.6), two others and the model's own; where it starts (sigma_max).
UniPC and Euler at the same few steps stand beside them. Diversity is the spread over seeds of place, size, speed and
background inside a motion, relative to that of drawn clips.

What came out (the shipped student, `--clips 32`): fresh noise pays. In four steps SDE is 1.5 dB [0.6, 2.4] better than
ODE, which keeps the flaws of its first guess (seen in notebooks/3_steps_and_samplers), and two steps of SDE are as good
as four of ODE. With SDE the model's own middle times beat the others by 0.6 to 1.5 dB; they had been chosen on other
clips of the same kind. The "late" times get all 32 clips right and are 1.3 dB worse: shapes are decided at high noise,
edges lower down. A start at less noise than the student was trained with costs 0.8 dB at sigma 40 and 2.3 at 20; a
start at more costs nothing but diversity (0.88 at 80, 0.79 at 200), and less noise looks more diverse (1.06) for being
wrong more often. UniPC and Euler, which nobody distilled the student for, are 1.4 to 1.5 dB short and no less right.
With 32 clips the intervals of shares are up to 32 points wide: read the changes of fit, which compare clip by clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.clips import Clips, describe, diversity, right
from experiments.command import Command, run
from experiments.records import Row
from experiments.report import COLOURS, bootstrap, figure, save, with_bootstrap, write_table
from turbojax.pipeline_config import PipelineConfig
from turbojax.train.evaluate import wilson

MID_TIMES = {"code": (1.5, 1.4, 1.0), "paper": (1.3, 1.0, 0.6), "even": (1.17, 0.78, 0.39), "late": (1.54, 1.52, 1.4)}


@dataclass(frozen=True)
class Arm:
    """A sampler; mid_times and sigma_max are rCM's alone."""

    sampler: str
    steps: int
    mid_times: tuple[float, ...]
    sigma_max: float

    @property
    def name(self) -> str:
        rcm_only = f", {times_name(self.mid_times)}, sigma {self.sigma_max:g}" if self.sampler.startswith("rcm") else ""
        return f"{self.sampler}, {self.steps} step{'s' * (self.steps > 1)}{rcm_only}"


def times_name(times: tuple[float, ...]) -> str:
    return next((name for name, known in MID_TIMES.items() if known == times), "/".join(f"{t:g}" for t in times))


def arms(steps: Sequence[int], sigmas: Sequence[float], own: PipelineConfig) -> list[Arm]:
    """Mode x steps, then middle times and sigma_max at the most steps, then the many-step samplers at as few."""
    most, modes = max(steps), ("rcm-sde", "rcm-ode")
    base = own.mid_times, own.sigma_max
    out = [Arm(mode, n, *base) for mode in modes for n in steps]
    for mode in modes:
        out += [Arm(mode, most, times, own.sigma_max) for times in MID_TIMES.values() if most > 1]
        out += [Arm(mode, most, own.mid_times, sigma) for sigma in sigmas]
    out += [Arm(name, most, *base) for name in ("unipc", "euler")]
    return list(dict.fromkeys(out))


def maker(clips: Clips, arm: Arm) -> Any:
    if not arm.sampler.startswith("rcm"):
        return clips.generate(sampler=arm.sampler, steps=arm.steps, guidance=1.0)
    return clips.generate(sampler=arm.sampler, steps=arm.steps, sigma_max=arm.sigma_max, mid_times=arm.mid_times)


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "sampler")
    command.option("steps", (1, 2, 3, 4), (2,), "numbers of steps")
    command.option("sigma_max", (20.0, 40.0, 200.0), (200.0,), "starts besides the model's own")
    command.option("clips", 48, 2, "clips of each arm")
    command.option("batch_size", 8, 2, "clips made at once")
    args = command.parse(argv)
    clips = Clips(args.out, args.model, clips=args.clips, batch_size=args.batch_size)
    planned = arms(args.steps, args.sigma_max, clips.spec.config)
    if args.quick:
        planned = planned[:4] + planned[-1:]
    print(f"{len(planned)} arms of {args.clips} clips")
    measured = {arm: clips.measure(key(arm), lambda arm=arm: maker(clips, arm)) for arm in planned}
    report(clips, measured)


def key(arm: Arm) -> dict[str, Any]:
    fields = asdict(arm)
    return {**fields, "mid_times": times_name(arm.mid_times)}


def report(clips: Clips, measured: dict[Arm, list[Row]]) -> None:
    own = clips.spec.config
    reference = Arm(own.sampler, own.steps, own.mid_times, own.sigma_max)
    table: list[dict[str, Any]] = [{"arm": arm.name, **describe(rows)} for arm, rows in measured.items()]
    if clips.readable and reference in measured:
        for row, rows in zip(table, measured.values(), strict=True):
            changes = [r["fit"] - other["fit"] for r, other in zip(rows, measured[reference], strict=True)]
            row["change of fit"] = with_bootstrap(changes)
    write_table(
        clips.out / "table.md",
        table,
        f"{clips.model}, {len(clips.wanted)} clips an arm, the same prompts and seeds; 95% intervals. Change of fit: "
        f"against {reference.name}, clip by clip. Middle times: "
        + "; ".join(f"{name} {times}" for name, times in MID_TIMES.items()),
    )
    clips.sheet({(arm.name, ""): key(arm) for arm in measured})
    if not clips.readable:
        return
    fig, (axes,) = figure(1, 3, 4.0, 0.9 + 0.22 * len(measured))
    places = -np.arange(len(measured))
    columns = {
        "fit, dB": [_interval([r["fit"] for r in rows]) for rows in measured.values()],
        "all right, %": [_share(rows) for rows in measured.values()],
        "diversity": [(diversity(rows),) * 3 for rows in measured.values()],
    }
    kinds = list(dict.fromkeys(arm.sampler for arm in measured))
    colours = [COLOURS[kinds.index(arm.sampler)] for arm in measured]
    for axis, (title, values) in zip(axes, columns.items(), strict=True):
        middle, low, high = np.array(values).T
        axis.hlines(places, low, high, color=colours)
        axis.scatter(middle, places, color=colours, s=14, zorder=3)
        axis.set(title=title)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(places, [arm.name for arm in measured] if axis is axes[0] else [""] * len(measured))
    save(fig, clips.out / "samplers.png")


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    return float(np.mean(values)), *bootstrap(values)


def _share(rows: Sequence[Row]) -> tuple[float, float, float]:
    hits = sum(map(right, rows))
    low, high = wilson(hits, len(rows))
    return 100 * hits / len(rows), 100 * low, 100 * high


if __name__ == "__main__":
    run(main)
