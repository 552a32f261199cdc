"""The rules on real routers: the shipped model on text of one kind, and really trained ones that collapse or do not."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from moe_debugger.analysis import Analysis, FindingKind, LayerShape, RoutingState, Severity, finish, merge_all
from moe_debugger.demo.corpus import KINDS, Kind, build_corpus
from moe_debugger.demo.scenarios import ScenarioStep, run_scenario
from moe_debugger.models import load_model
from moe_debugger.v1 import routing_pb2 as pb
from moe_debugger.wire.codec import LayerColumns, RoutingColumns

torch = pytest.importorskip("torch")

Fold = Callable[[RoutingState, Sequence[int], str], None]
SHAPES = [LayerShape(layer, 8, 2) for layer in range(4)]


class RouterTap:
    """Reads what the routers return, by hooks of this test's own."""

    def __init__(self, model: Any) -> None:
        self.outputs: list[tuple[Any, Any, Any]] = []
        routers = [module for _, module in model.named_modules() if type(module).__name__ == "MixtralTopKRouter"]
        assert len(routers) == len(SHAPES)
        self.handles = [router.register_forward_hook(self._keep) for router in routers]

    def _keep(self, _module: Any, _inputs: Any, output: tuple[Any, Any, Any]) -> None:
        self.outputs.append(tuple(part.detach().float() for part in output))

    def fold(
        self,
        state: RoutingState,
        *,
        tokens: Sequence[Sequence[int]],
        names: list[str],
        phase: int,
        step: int = 0,
        with_tokens: bool = True,
    ) -> None:
        """Add what the forward of `tokens` (rows of equal length) left here."""
        rows, length = len(tokens), len(tokens[0])
        count = rows * length
        layers = []
        for index, (logits, weights, ids) in enumerate(self.outputs):
            probabilities = torch.softmax(logits, -1)
            entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)
            layers.append(
                LayerColumns(
                    index,
                    8,
                    ids.numpy().astype(np.int32),
                    gate_weights=weights.numpy().astype(np.float16),
                    router_entropy=entropy.numpy(),
                    top1_probability=probabilities.max(-1).values.numpy(),
                )
            )
        self.outputs.clear()
        state.fold(
            RoutingColumns(
                step=np.full(count, step, np.uint64),
                forward_index=np.full(count, step, np.uint64),
                request_ids=names,
                request_index=np.repeat(np.arange(rows, dtype=np.uint32), length),
                position=np.tile(np.arange(length, dtype=np.uint32), rows),
                phase=np.full(count, phase, np.uint8),
                is_padding=np.zeros(count, bool),
                token_id=np.array(tokens, np.uint32).ravel() if with_tokens else None,
                layers=layers,
            )
        )


@pytest.fixture(scope="module")
def fold() -> Iterator[Fold]:
    """Return what runs a prompt through the shipped model and adds its routes to a state."""
    model = load_model("demo", device="cpu").model
    tap = RouterTap(model)

    def run(state: RoutingState, tokens: Sequence[int], name: str) -> None:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(tokens)]))
        tap.fold(state, tokens=[tokens], names=[name], phase=pb.PHASE_PREFILL)

    yield run
    for handle in tap.handles:
        handle.remove()


def loud(analysis: Analysis) -> list[tuple[str, int | None, int | None]]:
    return [
        (str(finding.kind), finding.layer_index, finding.expert_id)
        for finding in analysis.findings
        if finding.severity is not Severity.INFO
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_prompts", "length"), [(5, 64), (5, 500), (32, 64), (32, 200)])
def test_prompts_of_one_kind_through_the_healthy_model_give_nothing_above_info(
    fold: Fold, kind: Kind, num_prompts: int, length: int
) -> None:
    corpus, rng = build_corpus("held_out"), random.Random(length)
    state = RoutingState.empty(SHAPES)
    for index in range(num_prompts):
        fold(state, list(corpus.window(kind, length, rng)), f"{kind} {index}")
        # As a live page looks: after every prompt.
        assert loud(finish(state)) == []


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(150))


def _integers(rng: random.Random) -> str:
    return " ".join(str(rng.randint(0, 99_999)) for _ in range(40))


def _table(rng: random.Random) -> str:
    return "\n".join(",".join(f"{rng.random() * 100:.2f}" for _ in range(6)) for _ in range(6))


def _query(rng: random.Random) -> str:
    return (
        f"SELECT ID, NAME FROM USERS WHERE AGE > {rng.randint(1, 99)} AND CITY = 'BERLIN' LIMIT {rng.randint(1, 99)};"
    )


@pytest.mark.parametrize("make", [_digits, _integers, _table, _query, lambda rng: "a" * rng.randint(64, 200)])
def test_narrow_prompts_through_the_healthy_model_give_no_more_than_hot_experts(
    fold: Fold, make: Callable[[random.Random], str]
) -> None:
    rng = random.Random(1)
    state = RoutingState.empty(SHAPES)
    for index in range(35):
        fold(state, list(make(rng).encode()), f"narrow {index}")
    # One query again and again does make experts hot, and that is said: as skew, which is no fault of the router.
    loud_ones = [finding for finding in finish(state).findings if finding.severity is not Severity.INFO]
    assert {(finding.kind, finding.severity) for finding in loud_ones} <= {(FindingKind.HOT_EXPERT, Severity.WARNING)}


def test_one_prompt_thirty_times_through_the_healthy_model_gives_nothing_above_info(fold: Fold) -> None:
    corpus, rng = build_corpus("held_out"), random.Random(2)
    for kind in KINDS:
        state = RoutingState.empty(SHAPES)
        prompt = list(corpus.window(kind, 100, rng))
        for index in range(30):
            fold(state, prompt, f"{kind} {index}")
        assert loud(finish(state)) == []


def _train(name: str, steps: int) -> list[RoutingState]:
    """Really train, and return the state of each step, without token ids as the lowest capture level leaves them."""
    taps: list[RouterTap] = []
    states: list[RoutingState] = []
    trainer = "moe_debugger.demo.scenarios.Trainer"
    with pytest.MonkeyPatch.context() as patch:
        from moe_debugger.demo.training import Trainer

        class TappedTrainer(Trainer):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                taps.append(RouterTap(self.model))

        patch.setattr(trainer, TappedTrainer)

        def on_step(done: ScenarioStep) -> None:
            tokens = [[0] * 128] * (len(taps[0].outputs[0][2]) // 128)
            state = RoutingState.empty(SHAPES)
            names = [f"row {row}" for row in range(len(tokens))]
            taps[0].fold(state, tokens=tokens, names=names, phase=pb.PHASE_TRAIN, step=done.step, with_tokens=False)
            states.append(state)

        run_scenario(name, steps=steps, on_step=on_step)
    return states


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_really_trained_routers_give_their_findings() -> None:
    healthy = _train("healthy", 100)
    for end in range(10, 101, 10):
        for window in (10, 30):
            assert loud(finish(merge_all(healthy[max(0, end - window) : end]))) == []
    collapsed = _train("collapse", 120)
    late = loud(finish(merge_all(collapsed[-30:])))
    assert {kind for kind, _, _ in late} == {"router_collapse"}
    assert len(late) >= 3
    unbalanced = loud(finish(merge_all(_train("no-balance", 60)[-30:])))
    assert "load_imbalance" in {kind for kind, _, _ in unbalanced}
    assert "router_collapse" not in {kind for kind, _, _ in unbalanced}
