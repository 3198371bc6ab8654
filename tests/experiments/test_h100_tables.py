"""The tables of docs/h100.md: what is measured against what, and nothing said of what was not measured."""

from experiments.h100_tables import attention_table, rows_table, text_table

ATTENTION = [{"name": "cudnn bf16", "ms": 10.0}, {"name": "sage", "ms": 5.0}]
TEXT = [{"name": "text attention 120 keys", "ms": 0.1}, {"name": "text cudnn bf16 512 keys", "ms": 0.4}]


def test_text_attention_stands_apart_beside_its_own_rival():
    both = {"rows": TEXT + ATTENTION}
    assert attention_table(both) == attention_table({"rows": ATTENTION})
    assert "| sage | 5.00 | 2.0x |" in attention_table(both)
    assert "| text attention 120 keys | 0.100 | 4.0x |" in text_table(both)
    assert text_table({"rows": ATTENTION}) == ""
    assert "| text attention 120 keys | 0.100 | - |" in text_table({"rows": TEXT[:1]})


def test_folded_prompts_are_told_where_they_were_measured():
    rung = {"median": 1.0, "argument_bytes": 1, "temporary_bytes": 1}
    row = {"row": "small", "baseline": {"scaled_to_50_steps": 100.0}, "sla": rung}
    assert "up to 119 tokens" in rows_table({"rows": [row | {"text_rows": 120}]})
    for unfolded in (row, row | {"text_rows": 512}):
        assert "tokens" not in rows_table({"rows": [unfolded]})
