"""The command line does what it says, tells mistakes in one line, and starts without loading what it does not need."""

import re
import subprocess
import sys
import warnings

import jax
import pytest
import small_pipeline
from jax.experimental.compilation_cache import compilation_cache

from turbojax import read_video
from turbojax.cli import COMMANDS, main
from turbojax.compilation_cache import use_compilation_cache
from turbojax.pipeline import Pipeline

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline.save(small_pipeline.pipeline(), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, which only a process without another choice takes."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys, turbojax, turbojax.cli\n"
        "try: turbojax.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', sorted({'jax', 'flax', 'numpy', 'imageio', 'tokenizers'} & set(sys.modules)))"
    )
    out = python("-c", code).stdout
    assert "heavy: []" in out
    for name, (_, what) in COMMANDS.items():
        assert name in out
        assert what in out


def test_a_pipeline_on_a_cpu_does_without_the_kernels_compiler():
    code = "import sys, turbojax.pipeline; print('mosaic:', 'jax.experimental.mosaic.gpu' in sys.modules)"
    assert "mosaic: False" in python("-c", code).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"turbojax {command}" in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    done = python("-m", "turbojax", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("turbojax ")


def test_generate_writes_a_clip_with_its_settings_inside(folder, tmp_path, cache, capsys):
    out = tmp_path / "clip.gif"
    assert main(["generate", PROMPT, "--model", str(folder), "--seed", "7", "--out", str(out)]) == 0
    clip = read_video(out)
    assert clip.frames.shape == (5, 48, 32, 3)
    assert clip.metadata["prompt"] == PROMPT
    assert clip.metadata["seed"] == 7
    report = capsys.readouterr().out
    for stage in ("clip.gif", "load", "compile", "text", "DiT", "VAE", "file", "end to end"):
        assert stage in report
    assert list(cache.rglob("*-cache"))  # the next process finds the compiled programs


def test_generate_numbers_several_clips_and_passes_every_option_on(folder, tmp_path, cache, monkeypatch):
    asked = {}

    def record(self, prompts, **options):
        asked.update(options, prompts=prompts)
        return iter(())

    monkeypatch.setattr(Pipeline, "generate_each", record)
    words = "a b --seed 1,2 --steps 2 --sampler rcm-ode --attention sla --topk 0.5 --quant w8a8 --guidance 2.5 "
    words += "--negative-prompt no --size 64x32 --frames 9 --shift 2 --sigma-max 90 --batch-size 2 --no-progress "
    words += "--mid-times 1.4,1"
    with pytest.raises(ValueError, match="shorter"):  # no clips came, so there is nothing to write
        main(["generate", *words.split(), "--model", str(folder), "--out", str(tmp_path / "x.gif")])
    expected = {
        "prompts": ["a", "b"], "seed": [1, 2], "steps": 2, "sampler": "rcm-ode", "attention": "sla", "topk": 0.5,
        "quant": "w8a8", "guidance": (2.5, 2.5), "negative_prompt": "no", "size": (64, 32), "frames": 9,
        "shift": 2.0, "sigma_max": 90.0, "mid_times": (1.4, 1.0), "batch_size": 2, "progress": False, "image": None,
    }  # fmt: skip
    assert asked == expected


def test_a_warning_is_one_line_of_its_own(folder, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "generate_each", lambda *_, **__: warnings.warn("odd word", stacklevel=1) or iter(()))
    with warnings.catch_warnings(action="default"), pytest.raises(ValueError, match="shorter"):  # no clips came
        main(["generate", PROMPT, "--model", str(folder), "--out", str(tmp_path / "x.gif")])
    assert capsys.readouterr().err == "turbojax: odd word\n"


def test_several_clips_are_numbered(folder, tmp_path, cache):
    arguments = ["--model", str(folder), "--seed", "0,1", "--frames", "1", "--out", str(tmp_path / "x.png")]
    assert main(["generate", PROMPT, *arguments]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["x-000.png", "x-001.png"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "empty prompt"),
        ([PROMPT, " "], "empty prompt"),
        (["caf\udce9"], "is not Unicode text"),
        ([PROMPT, "--guidance", "2", "--negative-prompt", "\udce9"], "is not Unicode text"),
        ([PROMPT, "--model", "nowhere"], "unknown model 'nowhere'"),
        ([PROMPT, "--model", ""], "unknown model ''"),
        ([PROMPT, "--sampler", "ddim"], "unknown sampler 'ddim'"),
        ([PROMPT, "--size", "100x64"], "multiples of 16"),
        ([PROMPT, "--size", "big"], "expected WIDTHxHEIGHT"),
        ([PROMPT, "--frames", "16"], r"frames must be 4n \+ 1"),
        ([PROMPT, "--steps", "0"], "takes 1 to 1000 steps"),
        ([PROMPT, "--steps", "5", "--sampler", "rcm-sde"], "takes 1 to 4 steps"),
        ([PROMPT, "--steps", "many"], "invalid int value"),
        ([PROMPT, "--attention", "flash"], "unknown attention 'flash'"),
        ([PROMPT, "--quant", "int4"], "unknown quant 'int4'"),
        ([PROMPT, "--guidance", "a,b"], "expected a number"),
        ([PROMPT, "--mid-times", "1.4,x"], "expected numbers such as 1.5,1.4,1.0"),
        ([PROMPT, "--seed", "x"], "expected whole numbers"),
        ([PROMPT, "--seed", "-1"], "seed must be a whole number from 0"),
        ([PROMPT, "--image", "x.png"], "takes text alone"),
        ([PROMPT, "--out", "missing/x.mp4"], "there is no folder missing"),
        ([PROMPT, "--out", "/proc/x.mp4"], "cannot write /proc/x.mp4"),
        ([PROMPT, "--out", "x.avi"], "must end in"),
        ([PROMPT, "--out", f"{'x' * 240}.gif"], "File name too long"),
        ([PROMPT, "--model", "x" * 300], "File name too long"),
        ([PROMPT, "--stepz", "3"], "unrecognized arguments: --stepz"),
    ],
)
def test_mistakes_take_one_line_exit_code_2_and_leave_nothing(
    arguments, message, folder, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(Pipeline, "load", fail)
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", str(folder)]
    try:
        code = main(["generate", *arguments, *model])
    except SystemExit as left:
        code = left.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("turbojax")
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == []


def test_missing_ffmpeg_is_told_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    assert main(["generate", PROMPT, "--model", str(folder), "--out", str(tmp_path / "x.mp4")]) == 2
    assert "no ffmpeg" in capsys.readouterr().err


def test_a_clip_too_large_for_the_memory_is_told(folder, tmp_path, cache, monkeypatch, capsys):
    def exhausted(*_, **__):
        raise MemoryError
        yield

    monkeypatch.setattr(Pipeline, "generate_each", exhausted)
    assert main(["generate", PROMPT, "--model", str(folder), "--out", str(tmp_path / "x.gif")]) == 2
    assert "not enough memory for this clip" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(folder, tmp_path, cache, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "load", interrupted)
    assert main(["generate", PROMPT, "--model", str(folder), "--out", str(tmp_path / "x.gif")]) == 130
    assert capsys.readouterr().err == "turbojax generate: interrupted\n"


def test_the_compilation_cache_leaves_the_users_choice_alone(cache, tmp_path):
    chosen = use_compilation_cache()
    assert chosen is not None
    assert chosen.is_relative_to(cache)
    assert jax.config.jax_compilation_cache_dir == str(chosen)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_an_unwritable_cache_is_no_obstacle(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
