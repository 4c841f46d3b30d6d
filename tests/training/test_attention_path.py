"""Which attention a run computes with."""

import dataclasses
from typing import Any

import pytest

import efx_jax.training.loop as loop_module
from efx_jax.config import Config
from efx_jax.model.spec import ModelSpec
from efx_jax.training.prepare import Prepared
from efx_jax.training.step import Teacher
from tests.tiny import LLAMA


@pytest.mark.parametrize(("head_dim", "expected"), [(8, "cudnn"), (100, "xla")])
def test_a_teacher_with_heads_that_cudnn_refuses_is_computed_otherwise(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, expected: str
) -> None:
    """Teacher and student go through one program: neither may meet an attention that was not tried on its heads."""

    def choose(spec: ModelSpec, dtype: Any, packed: Any) -> str:
        return "cudnn" if spec.head_dim % 8 == 0 else "xla"

    monkeypatch.setattr(loop_module, "choose_attention", choose)
    student = dataclasses.replace(LLAMA, head_dim=8)
    teacher = Teacher({}, dataclasses.replace(student, head_dim=head_dim))
    prepared: Any = Prepared({}, student, None, None, [], [], (), teacher=teacher)  # type: ignore[arg-type]
    assert loop_module._attention_path(Config(), prepared) == expected
