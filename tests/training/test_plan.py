"""The report of --dry-run: with and without data, for every device, within its time."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

from efx_jax.config import Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, PruneConfig, TrainConfig
from efx_jax.config_io import config_folder, resolve
from efx_jax.errors import InputError
from efx_jax.training.devices import USABLE_SHARE, find_device, memory_settings
from efx_jax.training.feed import rows_per_pass
from efx_jax.training.plan import plan_text
from efx_jax.training.survey import plan_layout
from efx_jax.weights.shapes import find_spec


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "fever cough", "response": "lung"}] * 19 + [{"prompt": "rash", "response": "skin skin blood"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        model=ModelConfig(path=str(tiny_folder)),
        data=DataConfig(train=str(path), max_length=32, holdout=0),
        eval=EvalConfig(window=32),
        prune=PruneConfig(schedule="fractions", fractions=(0.5,)),
        train=TrainConfig(batch_size=4, epochs=2),
    )


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes seconds and is not looked at."""

    def refuse(*arguments: object) -> None:
        raise InputError("left out by this test")

    monkeypatch.setattr("efx_jax.training.plan.compile_step", refuse)


def test_a_plan_with_data_counts_rows_tokens_and_steps(config: Config) -> None:
    text = " ".join(plan_text(config).split())
    # Prompt, response and EOS, which is no input: 19 rows of 3 and one of 4.
    assert "20 sequences, 61 tokens, the longest 4; 0 test rows scored, 0 perplexity windows" in text
    assert "10 steps of 4 sequences" in text and "step 5 to 50%" in text


def test_without_a_tokenizer_the_rows_are_counted_all_the_same(config: Config, uncompiled: None) -> None:
    elsewhere = dataclasses.replace(config, model=ModelConfig(path="meta-llama/Llama-2-7b-hf"))
    text = " ".join(plan_text(elsewhere).split())
    assert "20 training rows, 0 test rows scored; tokens not counted" in text
    assert "the tokenizer of meta-llama/Llama-2-7b-hf is not on this disk" in text
    assert "10 steps of 4 sequences" in text
    data = dataclasses.replace(config.data, train="nowhere.jsonl")
    assert "nowhere.jsonl: no such file" in plan_text(dataclasses.replace(elsewhere, data=data))


def test_a_plan_names_what_it_cannot_read_and_goes_on(config: Config, uncompiled: None) -> None:
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, train="nowhere.jsonl"))
    text = plan_text(missing)
    assert re.search(r"data +not counted: nowhere.jsonl: no such file", text)
    assert "2 epochs in steps of 4 sequences" in text and "only the data can tell" in text
    assert "at 50% of the steps to 50%" in text
    stepped = dataclasses.replace(missing, train=dataclasses.replace(config.train, steps=8))
    assert "8 steps of 4 sequences" in plan_text(stepped) and "step 4 to 50%" in plan_text(stepped)


def test_a_plan_refuses_malformed_data(config: Config, tmp_path: Path, uncompiled: None) -> None:
    (tmp_path / "cut.jsonl").write_text('{"prompt": "old", "response": " rash"}\n{"prompt": "old", "resp')
    cut = dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(tmp_path / "cut.jsonl")))
    with pytest.raises(InputError, match=r"cut.jsonl line 2: not JSON"):
        plan_text(cut)


def test_a_plan_refuses_a_root_that_is_no_folder_even_without_the_tokenizer(config: Config, uncompiled: None) -> None:
    data = dataclasses.replace(config.data, train="health", root="/no/such/place")
    for path in (config.model.path, "meta-llama/Llama-3.2-1B"):
        with pytest.raises(InputError, match="^data.root: no folder /no/such/place"):
            plan_text(dataclasses.replace(config, data=data, model=ModelConfig(path=path)))


def test_every_line_fits_a_terminal(config: Config) -> None:
    assert max(len(line) for line in plan_text(config).splitlines()) <= 80


def test_a_plan_compiles_the_step_on_the_mesh(config: Config) -> None:
    text = plan_text(dataclasses.replace(config, mesh=MeshConfig(data=4)))
    assert "on each of 4 devices (data 4 x fsdp 1 x tensor 1)" in text
    assert re.search(r"compiled +the step for cpu in \d+ s: ", text)


def test_a_mesh_beyond_the_devices_is_planned_and_said_not_to_be_compiled(config: Config) -> None:
    wide = dataclasses.replace(config, train=TrainConfig(batch_size=16), mesh=MeshConfig(data=16))
    text = " ".join(plan_text(wide).split())
    assert "on each of 16 devices" in text
    assert "compiled no: mesh: data 16 x fsdp 1 x tensor 1 needs 16 devices, found 8" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mesh": MeshConfig(tensor=3)}, "num_attention_heads 4 does not divide into 3"),
        ({"mesh": MeshConfig(device="h9000")}, "mesh.device: 'h9000' is not known; expected one of .*h200"),
        ({"data": DataConfig(max_length=65)}, "data.max_length: expected at most the model's context of 64"),
        ({"prune": PruneConfig(group="5:7", sparsity=2 / 7)}, "7"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Config, change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_text(dataclasses.replace(config, **change))


def test_without_sparsity_nothing_is_said_of_masks_and_events(config: Config, uncompiled: None) -> None:
    text = plan_text(dataclasses.replace(config, prune=PruneConfig(sparsity=0)))
    assert re.search(r"prune events +none", text)
    assert "in an event" not in text and "under masks" not in text


def test_a_plan_of_atp_tells_its_search_and_the_work_of_two_updates(config: Config, uncompiled: None) -> None:
    prune = dataclasses.replace(config.prune, score="atp", mask_forward="frozen")
    text = " ".join(plan_text(dataclasses.replace(config, prune=prune)).split())
    assert "search ends step 5; 50% of the weights of the linears are gone then" in text
    found = re.search(r"([\d.,e-]+) GFLOP a token .* while units are searched; ([\d.,e-]+) GFLOP a token", text)
    assert found and 1.9 < float(found[1]) / float(found[2]) < 2.3
    with pytest.raises(InputError, match="^prune.sparsity is too high for prune.score atp: .* leaves no layer one key"):
        plan_text(dataclasses.replace(config, prune=dataclasses.replace(prune, sparsity=0.99)))


def seven_billion(device: str, rows: int = 16) -> str:
    return plan_text(
        Config(
            model=ModelConfig(path="meta-llama/Llama-2-7b-hf"),
            data=DataConfig(max_length=2048),
            train=TrainConfig(batch_size=rows, steps=100),
            mesh=MeshConfig(device=device),
        )
    )


@pytest.mark.slow
def test_7b_fits_an_h200_and_not_a_gaming_card(uncompiled: None) -> None:
    assert "fits: h200 has 128 to use" in seven_billion("h200")
    assert "DOES NOT FIT: rtx4090 has 22 to use" in seven_billion("rtx4090")
    assert "DOES NOT FIT: 10 GiB" in seven_billion("10")
    assert "not even the smallest fits" in seven_billion("10")


@pytest.mark.slow
def test_the_largest_micro_batch_fits_and_the_next_does_not(uncompiled: None) -> None:
    found = re.search(r"micro-batch +([\d,]+) sequences of 2,048", seven_billion("h200"))
    assert found
    most = int(found[1].replace(",", ""))
    assert " fits: " in seven_billion("h200", most) and "DOES NOT FIT" in seven_billion("h200", most + 1)


@pytest.mark.slow
def test_the_time_of_a_step_is_its_flops_at_45_percent_of_the_peak(uncompiled: None) -> None:
    text = " ".join(seven_billion("h200").split())
    assert "38.8 GFLOP a token and 1,271 TFLOP a step before the first event" in text
    # 1,271 / (0.45 x 989) and 1,691 / (0.45 x 989).
    assert "2.86 s and 3.8 s a step at 45% of h200's 989 TFLOP/s" in text
    assert "TFLOP/s" not in seven_billion("80")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ["--config", str(config_folder() / "llama2_7b_health.yaml")], id="7b", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            ["--preset", "efx", "--model.path", "meta-llama/Llama-3.1-70B", "--mesh.tensor", "8"], id="70b-tensor"
        ),
        pytest.param(
            ["--preset", "paper", "--model.path", "meta-llama/Llama-3.1-70B", "--mesh.fsdp", "8"],
            id="70b-fsdp",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_plan_of_a_large_model_takes_less_than_a_minute(flags: list[str]) -> None:
    start = time.perf_counter()
    text = plan_text(resolve([*flags, "--mesh.device", "h200"]).config)
    assert time.perf_counter() - start < 60
    assert " fits: h200" in text and "compiled      the step for cpu" in text


def test_a_device_is_a_name_or_a_number_of_gib() -> None:
    assert find_device("H200", 1).memory == pytest.approx(149e9 * USABLE_SHARE, rel=0.01)
    assert find_device("80", 1).memory == int(80 * 2**30 * USABLE_SHARE)
    assert find_device("h100", 1).peak == 989e12 and find_device("80", 1).peak is None


def test_a_run_asks_for_the_memory_that_a_plan_counts_on_unless_the_environment_says_otherwise() -> None:
    share, host = "XLA_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    asked = memory_settings({})
    assert float(asked[share]) == USABLE_SHARE and int(asked[host]) * 10**9 <= find_device("", 1).memory + 10**9
    assert memory_settings({share: "0.5", host: "3"}) == {}
    # jax refuses both names together.
    assert memory_settings({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}).keys() == {host}


def test_the_cpu_at_hand_shares_its_memory_among_simulated_devices() -> None:
    one, four = find_device("", 1), find_device("", 4)
    assert (one.name, one.gpu, one.memory // 4) == ("cpu", False, four.memory)


@pytest.mark.parametrize("text", ["gpu", "-3", "0", "inf", "nan"])
def test_a_device_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="mesh.device"):
        find_device(text, 1)


@pytest.mark.parametrize(("micro", "tokens", "rows"), [(0, 0, 16), (8, 0, 8), (0, 512, 8), (8, 10_000, 8), (0, 1, 2)])
def test_micro_batches_obey_rows_and_tokens(micro: int, tokens: int, rows: int) -> None:
    train = TrainConfig(batch_size=16, micro_batch=micro, micro_tokens=tokens)
    assert rows_per_pass(Config(train=train, mesh=MeshConfig(data=2)), 64) == rows


def test_fused_attention_is_planned_where_a_gpu_has_it() -> None:
    found, gpu, cpu = find_spec("llama-2-7b"), find_device("h200", 1), find_device("", 1)
    assert plan_layout(Config(), found, gpu, "not counted").fused_attention
    assert not plan_layout(Config(), found, cpu, "not counted").fused_attention
    packed = Config(data=DataConfig(batching="packing"))
    assert not plan_layout(packed, found, gpu, "not counted").fused_attention
