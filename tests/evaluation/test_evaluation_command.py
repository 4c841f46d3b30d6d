"""The command prints a table, writes whole files, and answers bad input with one line and exit code 2."""

import json
import pathlib

import jax
import pytest

from efx_jax.evaluation.__main__ import main
from efx_jax.model.rope import RopeSpec
from efx_jax.model.spec import ModelSpec, init_params
from efx_jax.weights.hf import save_pretrained

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SPEC = ModelSpec(
    model_type="llama",
    vocab_size=16,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    rope=RopeSpec(),
)
WORDS = ["<s>", "</s>", "<unk>", "is", "it", "so", "yes", "no", "really", "?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_pretrained(path, init_params(jax.random.key(0), SPEC), SPEC)
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    return str(path)


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[str, str]:
    test = [{"q": "is it so", "a": "yes"}, {"q": "is it really so", "a": "no"}, {"q": "really", "a": "yes"}]
    return write(tmp_path / "text.jsonl", [{"text": "is it so ? yes"}] * 9), write(tmp_path / "test.jsonl", test)


def test_the_table_and_the_files_agree(folder, files, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    text, test = files
    output = tmp_path / "out"
    flags = ["--text", text, "--test", test, "--template", "{q} ? => {a}", "--window", "8", "--output", str(output)]
    # The template has no column of the text's, so text and test are read in two calls.
    assert main([folder, *flags[2:]]) == 0
    table = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    assert f"| accuracy | {summary['task']['accuracy']:.4f} |" in table
    assert f"({summary['task']['constant_answer']})" in table
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [record["reference"] for record in records] == ["yes", "no", "yes"]
    assert all(record["prediction"] == max(record["scores"], key=record["scores"].get) for record in records)
    right = sum(record["prediction"] == record["reference"] for record in records)
    assert summary["task"]["accuracy"] == pytest.approx(right / 3)

    assert main([folder, "--text", text, "--window", "8", "--text-tokens", "20", "--output", str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["perplexity"]["tokens"], summary["perplexity"]["windows"], summary["task"]) == (17, 3, None)
    assert f"| perplexity | {summary['perplexity']['value']:.3f} |" in capsys.readouterr().out


def test_rows_limits_the_test_rows(folder, files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([folder, "--test", files[1], "--template", "{q} => {a}", "--rows", "2"]) == 0
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--text", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--test", "TEST"], "no column 'text'"),
        (["--text", "TEXT", "--window", "1"], "eval.window"),
    ],
)
def test_bad_input_is_one_line_and_code_2(folder, files, flags, part, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"TEXT": files[0], "TEST": files[1]}
    assert main([folder, *(named.get(flag, flag) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert part in captured.err


def test_a_missing_checkpoint_is_one_line_and_code_2(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing" / "here")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["model", "--rowz", "3"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1 and "--rowz" in said
