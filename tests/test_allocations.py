"""Models are built, traced and inspected without one of their large tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, config
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moecc.checkpoint.schema import Compression, StoredExperts
from moecc.commands.inspect import inspect_model
from moecc.frontend.build import fake_parameters
from moecc.frontend.config import text_config
from moecc.frontend.skeleton import EXPERT_COUNTS, bare
from moecc.frontend.trace import trace
from moecc.ir import ops

torch.set_num_threads(1)
MOST = 64 << 20  # bytes
EXPERTS, WORDS = 40960, 1 << 20  # make tensors of 80 to 480 MiB of the families' tiny models


class NoLargeTensor(TorchDispatchMode):
    """Inside, a tensor of more than MOST bytes fails the test."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                if value.device.type != "meta" and value.untyped_storage().nbytes() > MOST:
                    pytest.fail(f"{func} allocated {tuple(value.shape)} of {value.dtype}")
        return result


def large(name: str) -> Any:
    """A family's tiny configuration with many experts and words."""
    found = config(name)
    for part in (found, text_config(found), getattr(found, "ffn_config", found)):
        for key, value in vars(part).items():
            if key in EXPERT_COUNTS and value == 4:
                setattr(part, key, EXPERTS)
            elif "vocab_size" in key and value == 64:
                setattr(part, key, WORDS)
    return found


@pytest.mark.parametrize(
    "make",
    {
        "empty": lambda: torch.empty(MOST + 1, dtype=torch.uint8),
        "zeros": lambda: torch.zeros(MOST // 4 + 1),
        "ones": lambda: torch.ones(MOST // 4 + 1),
        "rand": lambda: torch.rand(MOST // 4 + 1),
        "a module": lambda: nn.Linear(MOST // 4 + 1, 1),
        "to": lambda: torch.zeros(MOST // 8 + 1).to(torch.float64),
        "a product": lambda: torch.ones(MOST // 4096, 1) @ torch.ones(1, 1025),
        "init": lambda: nn.init.normal_(torch.empty(MOST // 4 + 1)),
        "numpy": lambda: torch.from_numpy(np.ones(MOST + 1, np.int8)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_the_hook_notices_each_way_to_allocate(make: tuple[str, Callable[[], object]]) -> None:
    with pytest.raises(pytest.fail.Exception, match="allocated"), NoLargeTensor():
        make[1]()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_family_allocates_a_parameter_when_it_is_built(name: str) -> None:
    with NoLargeTensor():
        found = bare(large(name))
    sizes = [p.nbytes for module in found.experts.values() for p in module.parameters()]
    assert sum(size > MOST for size in sizes) >= len(found.experts) > 0
    for buffer in found.model.buffers():
        assert not isinstance(buffer, FakeTensor)
        assert buffer.untyped_storage().nbytes() >= buffer.nbytes


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_no_parameter_is_allocated_to_inspect_a_model(name: str, tmp_path: Path) -> None:
    """gpt_oss has its weights reordered, and llama4 makes them of zeros."""
    large(name).save_pretrained(tmp_path)
    with NoLargeTensor():
        found = inspect_model(str(tmp_path), passes="kbvq")
    assert [layer["experts"] for layer in found["moe_layers"]] == [EXPERTS, EXPERTS]


def test_no_code_is_allocated_to_trace_an_artifact() -> None:
    many = 4 * EXPERTS  # codebooks of 160 MiB
    made = large("mixtral")
    made.num_local_experts, made.dtype = many, torch.float32
    gate = dict(act="silu", gate="glu", alpha=1.0, limit=0.0, eps=0.0)
    rows, hidden, units = 2 * made.intermediate_size, made.hidden_size, made.intermediate_size

    def stored(rows: int, columns: int) -> Any:
        return {
            "codes": ((many, rows, columns // 4), "uint8"),
            "codebook": ((many, 256, 4), "int8"),
            "scale": ((many, rows), "float16"),
        }

    entry = StoredExperts(
        gate, ["gate_up_proj", "down_proj"], stored(rows, hidden), stored(hidden, units)
    )
    paths = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    made.quantization_config = Compression(dict.fromkeys(paths, entry)).as_config()
    with NoLargeTensor():
        program = trace(made)
    coded = [n for n in program.graph.nodes if n.target is ops.VQ_EXPERTS]
    assert [n.meta["path"] for n in coded] == paths


def test_a_buffer_computed_from_a_large_constant_keeps_its_numbers() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.ones(6000, 6000).tril().sum(1))
            self.register_buffer("wide", torch.full((3, 1 << 24), 2, dtype=torch.int8))

            self.register_buffer("table", torch.zeros(4096, 1024))
            self.table[:, ::2] = 1

    with fake_parameters(FakeTensorMode(allow_non_fake_inputs=True)):
        made = Masked()
    assert torch.equal(made.table, torch.tensor([1.0, 0.0]).repeat(4096, 512))
    assert torch.equal(made.rows, torch.arange(1.0, 6001))
    assert made.wide.shape == (3, 1 << 24) and int(made.wide.sum()) == 6 << 24


@pytest.mark.parametrize("width", [2, 2048])  # small, and larger than what is allocated
def test_a_parameter_of_any_device_becomes_one_of_the_cpu(width: int) -> None:
    with fake_parameters(FakeTensorMode(allow_non_fake_inputs=True)):
        weight = nn.Linear(width, width, device="meta").weight
    assert isinstance(weight.data, FakeTensor) and weight.device.type == "cpu"
