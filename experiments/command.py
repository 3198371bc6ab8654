"""The command line that the experiments share: a model, a folder for the results, grids as comma lists, --quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turbojax.compilation_cache import use_compilation_cache
from turbojax.errors import UserError
from turbojax.host_memory import keep_freed_memory


class Command:
    """Options with two defaults each: of the full run, and of the smoke run that `--quick` asks for."""

    def __init__(self, doc: str, name: str, model: str = "tiny"):
        """doc: the script's docstring, shown by --help. name: of the script; results go to runs/NAME."""
        self.name = name
        self._defaults: dict[str, tuple[Any, Any]] = {}
        shape = argparse.RawDescriptionHelpFormatter
        self._parser = argparse.ArgumentParser(f"python -m experiments.{name}", description=doc, formatter_class=shape)
        self._parser.add_argument("--model", default=model, metavar="NAME|DIR", help="a shipped model or a folder")
        self._parser.add_argument("--out", type=Path, metavar="DIR", help=f"results (default: runs/{name}[-quick])")
        self._parser.add_argument("--quick", action="store_true", help="a smoke run: few clips, a coarse grid")

    def option(self, name: str, full: Any, quick: Any, help: str) -> None:
        """Add --NAME; a tuple as default makes it a comma list of that type."""
        kind = _list_of(type(full[0])) if isinstance(full, tuple) else type(full)
        shown, small = (",".join(map(str, v)) if isinstance(v, tuple) else v for v in (full, quick))
        text = f"{help} (default: {shown}; --quick: {small})".replace("%", "%%")
        self._parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X", help=text)
        self._defaults[name] = full, quick

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options with the defaults filled in; makes `out` and readies JAX. A mistake ends the program."""
        args = self._parser.parse_args(argv)
        for name, (full, quick) in self._defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, quick if args.quick else full)
        if args.out is None:
            args.out = Path("runs") / (self.name + ("-quick" if args.quick else ""))
        args.out.mkdir(parents=True, exist_ok=True)
        keep_freed_memory()
        use_compilation_cache()
        return args


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake of the user's is one line."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"comma list of {kind.__name__}"  # what argparse calls it in a complaint
    return parse
