"""Where the zeros are, and tables that say what the numbers say."""

import jax.numpy as jnp

from efx_jax.training.measure import matrix_sparsity, result_table, rows_table, sparsity_table


def test_sparsity_counts_exact_zeros_of_every_linear_by_layer() -> None:
    weight = jnp.asarray([[[0.0, -0.0, 1e-30, 1.0]], [[0.0, 2.0, 3.0, 4.0]]], jnp.bfloat16)
    layers = {"q_proj": weight, "q_proj_bias": jnp.zeros((2, 1)), "input_layernorm": jnp.zeros((2, 4))}
    assert matrix_sparsity({"layers": layers, "norm": jnp.zeros(4)}, {"q_proj": (1, 4)}) == {"q_proj": [0.5, 0.25]}


def test_entries_that_were_cut_out_count_as_those_that_are_zero() -> None:
    layers = {"up_proj": jnp.asarray([[[0.0, 1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0, 4.0]]])}
    assert matrix_sparsity({"layers": layers}, {"up_proj": (2, 4)}) == {"up_proj": [0.625, 0.5]}


def test_the_table_shows_values_with_intervals_and_dashes_for_what_was_not_measured() -> None:
    text = {"value": 19.004, "interval": [18.5, 19.756], "tokens": 7}
    task = {"accuracy": 0.5, "accuracy_interval": [0.25, 0.75], "macro_f1": 1 / 3, "macro_f1_interval": [0, 1]}
    table = result_table({"base": {"perplexity": text}, "sparse expert": {"perplexity": text, "tasks": {"mine": task}}})
    assert table.splitlines()[2:] == [
        "| base | 19.00 [18.50, 19.76] | - | - |",
        "| sparse expert | 19.00 [18.50, 19.76] | 50.00 [25.00, 75.00] | 33.33 [0.00, 100.00] |",
    ]


def test_the_table_shows_no_interval_where_there_is_none() -> None:
    results = {
        "perplexity": {"value": 19.0, "interval": None},
        "tasks": {"mine": {"rougeL": 1, "rougeL_interval": None}},
    }
    assert result_table({"base": results}).splitlines()[2:] == ["| base | 19.00 | 100.00 |"]


def test_a_perplexity_that_json_holds_as_null_is_told_as_not_finite() -> None:
    results = {"perplexity": {"value": None, "interval": None}}
    assert result_table({"base": results}).splitlines()[2:] == ["| base | not finite |"]


def test_the_sparsity_table_has_mean_and_range_over_layers() -> None:
    lines = sparsity_table({"q_proj": [0.5, 0.25], "up_proj": [0.0, 0.0]}).splitlines()
    assert lines[2:] == ["| q_proj | 37.50 | 25.00 | 50.00 |", "| up_proj | 0.00 | 0.00 | 0.00 |"]


def test_the_rows_of_a_mix_are_counted_by_task_and_label() -> None:
    pubmedqa = {"asked": 4, "found": 9, "shared": 1, "drawn": 4, "repeated": 2, "labels": {"yes": {"drawn": 1}}}
    pubmedqa["labels"]["no"] = {"drawn": 3}
    train = {"rows": 4, "shortened": 3, "tasks": {"pubmedqa": pubmedqa}}
    test = {"pubmedqa": {"rows": 500, "scored": 5, "shortened": 2}, "other": {"rows": 6, "scored": 6, "shortened": 0}}
    assert rows_table({"train": train, "test": test}).splitlines()[2:] == [
        "| pubmedqa | 4 | 9 | 1 | 4 | 2 | yes 1, no 3 | 500 | 5 | 2 |",
        "| other |  |  |  |  |  |  | 6 | 6 | 0 |",
        "",
        "3 of 4 training rows are shortened to fit.",
    ]
