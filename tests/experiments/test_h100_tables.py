"""The tables of docs/h100.md: what is measured against what, and nothing said of what was not measured."""

from experiments.h100_tables import attention_table, ends_table, linear_table, queries_table, rows_table, text_table

ATTENTION = [{"name": "cudnn bf16", "ms": 10.0}, {"name": "sage", "ms": 5.0}]
TEXT = [{"name": "text attention 120 keys", "ms": 0.1}, {"name": "text cudnn bf16 512 keys", "ms": 0.4}]


def test_text_attention_stands_apart_beside_its_own_rival():
    both = {"rows": TEXT + ATTENTION}
    assert attention_table(both) == attention_table({"rows": ATTENTION})
    assert "| sage | 5.00 | 2.0x |" in attention_table(both)
    assert "| text attention 120 keys | 0.100 | 4.0x |" in text_table(both)
    assert text_table({"rows": ATTENTION}) == ""
    assert "| text attention 120 keys | 0.100 | - |" in text_table({"rows": TEXT[:1]})


def test_queries_stand_apart_too():
    both = {"rows": [{"name": "queries sums", "ms": 0.041}, *ATTENTION]}
    assert attention_table(both) == attention_table({"rows": ATTENTION})
    assert "| sums | 0.041 |" in queries_table(both)
    assert queries_table({"rows": ATTENTION}) == ""


def test_a_baseline_of_another_time_is_marked():
    rung = {"median": 1.0, "argument_bytes": 1, "temporary_bytes": 1}
    baseline = {"scaled_to_50_steps": 100.0, "note": "of an earlier session"}
    table = rows_table({"rows": [{"row": "small", "baseline": baseline, "sla": rung}]})
    assert "| 100 \\* | 1.00 | 100x |" in table
    assert "\\* of an earlier session." in table


def test_folded_prompts_are_told_where_they_were_measured():
    rung = {"median": 1.0, "argument_bytes": 1, "temporary_bytes": 1}
    row = {"row": "small", "baseline": {"scaled_to_50_steps": 100.0}, "sla": rung}
    assert "up to 119 tokens" in rows_table({"rows": [row | {"text_rows": 120}]})
    for unfolded in (row, row | {"text_rows": 512}):
        assert "tokens" not in rows_table({"rows": [unfolded]})


def test_products_stand_beside_xla_in_bf16():
    """A way of rounding that a shape does not have is not made up."""
    case = {"xla_bf16": {"tops": 500.0}, "xla_int8": {"tops": 600.0}, "channels": {"tops": 1000.0}}
    table = linear_table({"cases": {"bench product (32760, 128, 256)": case, "quantize rows": {}}})
    assert table.endswith("| 128 -> 256 | 500 | 600 | 1000, 2.00x | - | - | - |\n")


def test_ends_of_another_time_are_marked():
    rows = [
        {"name": "VAE", "seconds": 1.0},
        {"name": "VAE, diffusers", "seconds": 2.0, "note": "of an earlier session"},
    ]
    table = ends_table({"versions": {}, "rows": rows})
    assert "| VAE | 1.000 | - | - |" in table
    assert "| VAE, diffusers | 2.000 \\* | - | - |" in table
    assert table.endswith("\\* of an earlier session.\n")
