"""One script a question: `python -m experiments.NAME --help`. Each writes results.jsonl, table.md and pictures."""
