"""What a training script may pass as its tensors, and how each mistake is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mpd.client.tensors import register
from mpd.errors import LocalError
from mpd.layout import TensorSpec


def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def tied() -> dict[str, torch.Tensor]:
    first = torch.nn.Linear(2, 2)
    second = torch.nn.Linear(2, 2)
    second.weight = first.weight
    return torch.nn.ModuleDict({"embed": first, "head": second}).state_dict()


@pytest.mark.parametrize(
    ("tensors", "specs"),
    [
        ([np.ones(2)], [TensorSpec("tensors[0]", "float64", (2,))]),
        ((np.ones(2), torch.ones(3)), [
            TensorSpec("tensors[0]", "float64", (2,)),
            TensorSpec("tensors[1]", "float32", (3,)),
        ]),
        ({"a": np.ones((2, 1), np.float32)}, [TensorSpec("a", "float32", (2, 1))]),
        (model().parameters(), [
            TensorSpec("tensors[0]", "float32", (2, 3)),
            TensorSpec("tensors[1]", "float32", (2,)),
        ]),
        (model().named_parameters(), [
            TensorSpec("weight", "float32", (2, 3)),
            TensorSpec("bias", "float32", (2,)),
        ]),
        (model().state_dict(), [TensorSpec("weight", "float32", (2, 3)), TensorSpec("bias", "float32", (2,))]),
        ([np.array(1.0), torch.ones(0, dtype=torch.bfloat16)], [
            TensorSpec("tensors[0]", "float64", ()),
            TensorSpec("tensors[1]", "bfloat16", (0,)),
        ]),
    ],
    ids=["list", "tuple of both kinds", "mapping", "parameters", "named parameters", "state dict", "scalar and empty"],
)  # fmt: skip
def test_tensors_come_in_many_forms(tensors: Any, specs: list[TensorSpec]) -> None:
    assert [tensor.spec for tensor in register(tensors)] == specs


ARRAY = np.ones((4, 4), np.float32)
PARAMETER = torch.nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ARRAY, "a single tensor was passed: pass a list"),
        (lambda: PARAMETER, "a single tensor was passed: pass a list"),
        (lambda: 7, "a int was passed: an iterable of tensors"),
        (lambda: "weights", "a str was passed: an iterable of tensors"),
        (list, "there are no tensors to average"),
        (lambda: [[1.0, 2.0]], r"tensor 'tensors\[0\]' is a list: a torch tensor or numpy array expected"),
        (lambda: torch.nn.Sequential(model()), r"tensor 'tensors\[0\]' is a Linear"),
        (lambda: {3: ARRAY}, "3 is no tensor name"),
        (lambda: {"steps": np.ones(3, np.int64)}, "tensor 'steps' is int64: one of float64"),
        (lambda: {"steps": torch.ones(3, dtype=torch.int32)}, "tensor 'steps' is int32: one of float64"),
        (lambda: {"mask": np.ones(3, bool)}, "tensor 'mask' is bool"),
        (lambda: [PARAMETER, PARAMETER], r"'tensors\[0\]' and 'tensors\[1\]' share memory"),
        (lambda: tied(), "'embed.weight' and 'head.weight' share memory"),
        (lambda: {"all": ARRAY, "part": ARRAY[2:]}, "'all' and 'part' share memory"),
        (lambda: {"row": ARRAY[1], "all": ARRAY}, "'all' and 'row' share memory"),
        (lambda: {"a": ARRAY[:, 1], "b": ARRAY[:, 1]}, "'a' and 'b' share memory"),
    ],
)
def test_each_mistake_is_named(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        register(make())


def test_interleaved_columns_do_not_share_memory() -> None:
    assert len(register([ARRAY[:, 0], ARRAY[:, 1]])) == 2


def test_empty_tensors_share_nothing() -> None:
    empty = np.ones(0)
    assert len(register([empty, empty, np.ones(1)])) == 3
