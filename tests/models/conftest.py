"""Small runs for the tests of models: sizes are distinct and mostly prime, so that no swapped axis fits by luck."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mha_jax.specs import DataSpec, DecodingSpec, MeshSpec, ModelSpec, OptimizerSpec, RunSpec, TrainingSpec

DATA = {
    "lm": DataSpec(source="embedded", length=7, batch_size=2),
    "masked_lm": DataSpec(source="embedded", length=7, batch_size=2),
    "translation": DataSpec(source="parallel", length=7, batch_size=2, files={"train": ("a", "b")}),
    "classification": DataSpec(source="text", length=7, batch_size=2, files={"train": "a"}, num_classes=5),
}
MODEL = ModelSpec(num_layers=2, d_model=11, num_heads=3, qk_dim=4, v_dim=5, d_ff=13, max_length=17)


@pytest.fixture
def make_run() -> Callable[..., RunSpec]:
    """A run of a task with fields of the model, and of the data under `data`, changed."""

    def make(task: str, *, data: dict[str, Any] | None = None, **model: Any) -> RunSpec:
        return RunSpec(
            name="test",
            task=task,
            seeds=(0,),
            parallel="jit",
            mesh=MeshSpec(),
            model=dataclasses.replace(MODEL, **model),
            data=dataclasses.replace(DATA[task], **(data or {})),
            optimizer=OptimizerSpec(),
            training=TrainingSpec(steps=1, eval_every=1, checkpoint_every=1),
            decoding=DecodingSpec(),
        )

    return make
