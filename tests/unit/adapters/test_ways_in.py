"""How an adapter reaches the capture: registered, by an entry point, or written after the text of a refusal."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unit.adapters.stand_ins import (
    GLAM_FOLDER,
    Block,
    BlockAdapter,
    Decoder,
    DenseLayer,
    MixtralAdapter,
    SequenceFirstAdapter,
    example,
    make,
    make_mixtral,
)

from moe_debugger import (
    InvalidInputError,
    ModelNotSupportedError,
    MoEDebugger,
    check_adapter,
    register_adapter,
    unregister_adapter,
)
from moe_debugger.capture import find_sites

DROPPED = 2


def run_python(code: str, *folders: Path) -> str:
    """Run `code` in an interpreter of its own that finds modules in `folders`, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
    )
    return done.stdout + done.stderr


def routed(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    with MoEDebugger(model, level="full") as debugger, torch.no_grad():
        model(**inputs)
        assert debugger.session is not None
        return debugger.session.decisions(), debugger.session.layers()


def glam_routes_are_right(model: Any) -> None:
    """Compare the captured rows with what the routers of a GLaM returned."""
    outputs = []
    handles = [
        module.register_forward_hook(lambda m, a, output: outputs.append(output))
        for name, module in model.named_modules()
        if name.endswith(".router")
    ]
    ids = torch.arange(48).view(4, 12) % 19
    decisions, layers = routed(model, {"input_ids": ids, "attention_mask": (torch.arange(12) > 2).long().expand(4, 12)})
    for handle in handles:
        handle.remove()
    assert [layer.module_name for layer in layers] == ["layers.1.feed_forward", "layers.3.feed_forward"]
    for layer, output in zip(layers, outputs, strict=True):
        rows = decisions.layer_index == layer.layer_index
        used = np.zeros((48, 64), bool)
        weights = np.zeros((48, 64))
        for token, (chosen, weight) in enumerate(
            zip(decisions.expert_ids[rows], decisions.gate_weights[rows], strict=True)
        ):
            used[token, chosen[chosen >= 0]] = True
            weights[token, chosen[chosen >= 0]] = weight[chosen >= 0]
        assert np.array_equal(used, output.routing_map.numpy())
        assert np.allclose(weights, output.probabilities.numpy())
        # A dropped choice keeps its slot, beside the expert that it was meant for.
        assert np.array_equal(decisions.intended_expert_ids[rows], output.chosen.numpy())
        is_dropped = decisions.slot_status[rows] == DROPPED
        assert np.array_equal(is_dropped, decisions.expert_ids[rows] < 0)
        assert is_dropped.any()
        kept = ~is_dropped
        assert np.array_equal(decisions.expert_ids[rows][kept], decisions.intended_expert_ids[rows][kept])


def test_a_registered_adapter_reads_every_route_of_a_glam() -> None:
    register_adapter(example("glam_adapter").GlamAdapter())
    glam_routes_are_right(example("modeling_glam").tiny_model())


def test_the_rows_of_a_layer_with_the_sequence_first_are_those_of_the_forward() -> None:
    register_adapter(SequenceFirstAdapter())
    model = make(Decoder(DenseLayer(), is_sequence_first=True))
    kept: list[Any] = []
    model.layers[0].router.register_forward_hook(lambda m, args, output: kept.append((args[0], output[1])))
    decisions, _ = routed(model, {"input_ids": torch.arange(15).view(3, 5)})
    hidden, routing_map = kept[0]
    assert hidden.shape[:2] == (5, 3)
    for row in range(15):
        text, position = divmod(row, 5)
        expected = routing_map[position * 3 + text].nonzero().flatten().tolist()
        assert sorted(decisions.expert_ids[row].tolist()) == expected


def test_the_example_shows_layers_statistics_and_dropped_shares() -> None:
    text = run_python(
        f"import runpy, sys; sys.argv = ['watch.py', '--max-new-tokens', '3']; "
        f"runpy.run_path({str(GLAM_FOLDER / 'watch.py')!r}, run_name='__main__')",
        GLAM_FOLDER,
    )
    # 8 prompts of 24 tokens, and of three new ones two go in again.
    assert "Routing of GlamForCausalLM: 208 tokens in 3 forwards" in text
    assert re.search(r"layers\.1\.feed_forward: \d+\.\d% of 416 choices found their expert full", text), text


ATTACH = """
    from modeling_glam import tiny_model
    from moe_debugger import MoEDebugger
    debugger = MoEDebugger(tiny_model())
    print([(layer.adapter, layer.num_experts) for layer in debugger.layers()])
"""


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """Make a folder with a distribution that offers the adapter of the example."""
    for name in ("modeling_glam.py", "glam_adapter.py"):
        shutil.copy(GLAM_FOLDER / name, tmp_path)
    info = tmp_path / "glam_debugging-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: glam-debugging\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_debugger.adapters]\nglam = glam_adapter:GlamAdapter\n")
    return tmp_path


def test_an_installed_package_offers_its_adapter_by_an_entry_point(distribution: Path) -> None:
    assert run_python(ATTACH, distribution) == "[('glam', 64), ('glam', 64)]\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("no_such_module:Adapter", "ModuleNotFoundError: No module named 'no_such_module'; repair or uninstall"),
        ("string:digits", "'0123456789' is no moe_debugger.Adapter; subclass it"),
    ],
)
def test_an_entry_point_that_is_broken_is_named(distribution: Path, value: str, expected: str) -> None:
    (distribution / "glam_debugging-1.0.dist-info" / "entry_points.txt").write_text(
        f"[moe_debugger.adapters]\nglam = {value}\n"
    )
    text = run_python("from moe_debugger.capture import registered_adapters as all; all()", distribution)
    assert "InvalidInputError: entry point glam = " + value in text
    assert expected in text


def test_the_adapter_that_a_refusal_shows_works_once_it_is_filled_in() -> None:
    glam = example("modeling_glam")
    with pytest.raises(ModelNotSupportedError) as refused:
        MoEDebugger(glam.tiny_model())
    text = str(refused.value)
    assert "2 looked at" in text
    assert "layers.1.feed_forward.experts" in text
    assert "layers.3.feed_forward.experts" in text
    assert "check-adapter" in text

    shown = re.search(r"(    class MyAdapter.*register_adapter\(MyAdapter\(\)\))", text, re.DOTALL)
    assert shown is not None
    code = textwrap.dedent(shown[1])
    for given, filled in (
        ("num_experts=..., top_k=...", 'num_experts=64, top_k=2, empty_slot="dropped"'),
        ("logits, weights, expert_ids = call.output", "made = call.output"),
        (
            "moe_debugger.Routing(expert_ids=expert_ids, gate_weights=weights, logits=logits)",
            "moe_debugger.Routing.dense(made.probabilities, made.routing_map, intended_expert_ids=made.chosen)",
        ),
    ):
        assert given in code
        code = code.replace(given, filled)
    # What is matched and hooked stands in the text already.
    assert '"GlamMoE"' in code
    assert "return module.router" in code
    exec("import moe_debugger\n" + code, {})
    glam_routes_are_right(glam.tiny_model())


def test_what_lies_inside_a_layer_of_an_adapter_is_the_adapters_alone() -> None:
    glam = example("modeling_glam").tiny_model()
    register_adapter(example("glam_adapter").GlamAdapter())
    assert find_sites(glam).unreadable == ()
    # A built-in reader would know these experts.
    model, inputs = make_mixtral(), {"input_ids": torch.arange(12).view(2, 6)}
    register_adapter(MixtralAdapter())
    decisions, layers = routed(model, inputs)
    assert [layer.adapter for layer in layers] == ["mine", "mine"]
    assert len(decisions) == 24
    unregister_adapter("mine")
    expected, _ = routed(model, inputs)
    assert np.array_equal(decisions.expert_ids, expected.expert_ids)
    assert np.array_equal(decisions.gate_weights, expected.gate_weights)


def test_the_layer_may_be_all_of_the_model() -> None:
    register_adapter(MixtralAdapter())
    layer = make_mixtral().model.layers[0].mlp
    sites = find_sites(layer).sites
    assert [(site.info.module_name, site.info.adapter) for site in sites] == [("", "mine")]


def test_a_name_and_an_instance_are_asked_for() -> None:
    class Nameless(BlockAdapter):
        name = ""

    with pytest.raises(InvalidInputError, match="has no name"):
        register_adapter(Nameless())
    with pytest.raises(InvalidInputError, match="pass an instance"):
        check_adapter(BlockAdapter, make(Decoder(Block())))  # type: ignore[arg-type]
