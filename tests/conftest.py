"""Settings of every test. Being here also puts this folder on the import path: tests share `golden.seeded`."""

import os

# The Mosaic interpreter's callbacks block threads of XLA's pool, which is as large as the machine: on few cores it
# would wait for itself.
os.environ.setdefault("NPROC", "16")

from turbojax.host_memory import keep_freed_memory

keep_freed_memory()
