"""`python -m turbojax` is the `turbojax` command."""

from turbojax.cli import main

raise SystemExit(main())
