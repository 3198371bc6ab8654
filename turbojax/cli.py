"""The command line: `turbojax COMMAND`. Each command's module is imported only when it is the one asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn

from turbojax.errors import UserError

# command -> (module with add_arguments(subparsers) and run(args), what it does)
COMMANDS: Mapping[str, tuple[str, str]] = {
    "generate": ("turbojax.cli_generate", "turn a prompt into a video"),
    "train": ("turbojax.train.cli", "train a part of the small model"),
    "evaluate": ("turbojax.cli_evaluate", "measure what a small model's clips show"),
    "convert": ("convert.cli", "convert PyTorch checkpoints"),
    "inspect": ("convert.cli", "say what a checkpoint is and what it would become"),
    "export": ("convert.cli", "write a converted component for PyTorch"),
    "merge": ("convert.cli", "base + weight * (target - target_base)"),
    "plan": ("turbojax.cli_plan", "say whether a clip fits on a card, without the card"),
    "bench": ("turbojax.bench", "time the kernels"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after what the user can put right, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="turbojax", description="Wan video diffusion in JAX.")
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    module = None
    if chosen is not None:
        module = importlib.import_module(COMMANDS[chosen][0])
        module.add_arguments(subparsers)
    else:
        for name, (_, help_text) in COMMANDS.items():
            subparsers.add_parser(name, help=help_text)
    args = parser.parse_args(argv)
    assert module is not None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return module.run(args) or 0
    except UserError as error:
        print(f"turbojax {chosen}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a missing permission: the system says it best
        print(f"turbojax {chosen}: {UserError(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"turbojax {chosen}: interrupted", file=sys.stderr)
        return 130


def _show_warning(message: Warning | str, *_: object) -> None:
    """A line for the user, without the place in the code that Python adds."""
    print(f"turbojax: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage text."""

    def __init__(self, **options: object):
        super().__init__(**{"allow_abbrev": False, **options})  # pyright: ignore[reportArgumentType]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str):
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import turbojax

        print(f"turbojax {turbojax.__version__}")
        parser.exit()
