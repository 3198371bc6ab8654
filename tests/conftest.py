"""Being here puts this folder on the import path: tests share `golden.seeded` with the fixtures' scripts."""
