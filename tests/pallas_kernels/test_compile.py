"""Every kernel, compiled for each GPU that it is meant for at the shapes of the real models, without that GPU.

The slow tests need the `aot` extra (`uv run --extra aot pytest -m slow tests/pallas_kernels/test_compile.py`) and fail
without it: a proof that is skipped is none.
"""

import dataclasses
from itertools import batched

import pytest

from pallas_kernels import aot, budgets

KERNEL = aot.KernelReport("gemm", registers=168, spill_bytes=0, smem_bytes=1024, serialized=False)
REPORT = aot.Report("case", "h100", (KERNEL,), seconds=1.0)
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for gemm_mosaic_gpu_kernel
    0 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
{warning}"""


# In parts, so that no process is left with the longest alone.
COMPILED = [
    pytest.param(target, source, names, id=f"{target}-{source.partition(':')[0].rpartition('_')[2]}-{i}")
    for target in aot.TARGETS
    for source in budgets.SOURCES
    for i, names in enumerate(batched(budgets.cases_of(source, target), budgets.CASES_A_PROCESS))
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "source", "names"), COMPILED)
def test_compiles_within_its_budget(target, source, names):
    reports = aot.compile_cases(target, source, names)
    assert tuple(report.case for report in reports) == names
    assert not [fault for report in reports for fault in budgets.faults(report)]
    assert not budgets.overruns(budgets.costs(reports), budgets.table()[target])


@pytest.mark.slow
def test_the_xla_path_holds_no_whole_product():
    """A chunk of INT32 sums, 64 MiB, or in tiles the weights in tile order, 13 MiB, and small change: not 1.2 GB."""
    for report in aot.compile_cases("h100", "pallas_kernels.cases_linear:memory_cases"):
        assert report.error is None
        assert 0 < report.temp_bytes <= 96 * 2**20, report


@pytest.mark.slow
def test_a_kernel_that_spills_is_caught():
    """The harness must be able to see what it looks for: a sum of 256 x 256 cannot fit a warpgroup's registers."""
    (report,) = aot.compile_cases("h100", "tests.pallas_kernels.test_compile:spilling_case")
    assert any("spills" in fault for fault in budgets.faults(report))


def spilling_case():
    import jax
    import jax.numpy as jnp

    from pallas_kernels.int8_gemm_hopper import HopperTiles, hopper_gemm

    def product(x, weight, x_scale, weight_scale):
        options = {"activation": None, "dtype": jnp.dtype(jnp.bfloat16), "interpret": False}
        tiles = HopperTiles(tile_n=256, stages=2)
        return hopper_gemm(x, weight, x_scale, weight_scale, None, None, None, tiles=tiles, **options)

    matrix, scales = jax.ShapeDtypeStruct((512, 512), jnp.int8), jax.ShapeDtypeStruct((4, 4), jnp.float32)
    return [aot.Case("spills", product, [matrix, matrix, scales, scales], ("h100",))]


@pytest.mark.parametrize(
    ("spills", "warning", "expected"),
    [
        (0, "", KERNEL),
        (16, "", dataclasses.replace(KERNEL, spill_bytes=32)),
        (
            0,
            "ptxas warning: Potential Performance Loss: wgmma.mma_async instructions are serialized",
            dataclasses.replace(KERNEL, serialized=True),
        ),
    ],
)
def test_what_ptxas_says_is_read(tmp_path, spills, warning, expected):
    path = tmp_path / "gemm_3.ptxas"
    path.write_text(PTXAS.format(spills=spills, warning=warning))
    path.with_suffix(".resources.txt").write_text("Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)")
    assert aot._read_dump(path) == expected


def test_faults_and_overruns_are_named():
    assert budgets.faults(REPORT) == []
    worse = dataclasses.replace(KERNEL, spill_bytes=8, serialized=True)
    assert len(budgets.faults(dataclasses.replace(REPORT, kernels=(worse,), error="boom"))) == 3
    budget = {"case": {"gemm": [160, 1024]}}
    assert budgets.overruns(budgets.costs([REPORT]), budget) == []
    for cost in ([159, 1024], [168, 2048]):
        assert budgets.overruns(budgets.costs([REPORT]), {"case": {"gemm": cost}})
    assert budgets.overruns(budgets.costs([REPORT]), {}), "a case without a budget"


@pytest.mark.slow
def test_the_table_covers_every_case():
    """No case without a recorded cost, no cost of a case that is gone."""
    for target in aot.TARGETS:
        cases = {case.name for source in budgets.SOURCES for case in aot.load_cases(source) if target in case.targets}
        assert budgets.table()[target].keys() == cases, "run python -m pallas_kernels.budgets"


def test_targets_tell_their_figures():
    for target in aot.TARGETS.values():
        major, minor = target.arch
        assert f"major: {major} minor: {minor}" in target.config
        assert target.figure("memory_bandwidth") > 1e12
    with pytest.raises(KeyError, match="no_such_figure"):
        aot.TARGETS["h100"].figure("no_such_figure")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(aot, "_found", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match="--extra aot"):
        aot.compile_cases("h100", budgets.SOURCES[0])
