"""`MoEDebuggerCallback` in a real `transformers.Trainer`: a tiny Mixtral, accumulation of 2, evaluations in between."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
from torch import nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from moe_debugger import MoEDebugger
from moe_debugger.errors import InvalidInputError
from moe_debugger.training import MoEDebuggerCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

NUM_STEPS, ACCUMULATION, BATCH, LENGTH, NUM_EVAL = 4, 2, 2, 8, 6
TRAIN, EVAL = 3, 4


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, num_rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, tiny_moe.VOCABULARY, (num_rows, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def build(**changes: Any) -> Any:
    return tiny_moe.build("mixtral", output_router_logits=True, router_aux_loss_coef=0.02, **changes).train()


def trainer(model: Any, folder: Path, callbacks: list[Any], kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return kind(
        model,
        TrainingArguments(output_dir=str(folder), **options),
        train_dataset=Rows(64, 0),
        eval_dataset=Rows(NUM_EVAL, 1),
        callbacks=callbacks,
    )


def hooks_of(model: nn.Module) -> int:
    """Ours: transformers leaves its own, which record router logits."""
    hooks = [
        hook for one in model.modules() for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
    ]
    return sum(hook.__module__.startswith("moe_debugger") for hook in hooks)


def by_step(callback: MoEDebuggerCallback, name: str) -> dict[int, float]:
    rows = callback.session.series().select(name)
    return dict(zip(rows.step.tolist(), rows.value.tolist(), strict=True))


def test_steps_phases_and_series_of_a_training(tmp_path: Path) -> None:
    model = build()
    with MoEDebuggerCallback(gradients=True) as callback:
        running = trainer(model, tmp_path, [callback])
        running.train()
        assert hooks_of(model) == 0
        decisions = callback.session.decisions()
        # Each step: its micro-batches train, and after steps 2 and 4 the evaluation's batches.
        seen = sorted({(int(s), int(f), int(p)) for s, f, p in zip(*_columns(decisions), strict=True)})
        expected: list[tuple[int, int]] = []
        for step in range(1, NUM_STEPS + 1):
            expected += [(step, TRAIN)] * ACCUMULATION
            expected += [(step, EVAL)] * (NUM_EVAL // BATCH if step % 2 == 0 else 0)
        assert [(step, phase) for step, _, phase in seen] == expected
        assert [index for _, index, _ in seen] == list(range(len(expected)))
        assert len(decisions) == len(expected) * BATCH * LENGTH * 3

        logged = {int(one["step"]): one for one in running.state.log_history if "loss" in one}
        assert by_step(callback, "loss") == {step: one["loss"] for step, one in logged.items()}
        assert by_step(callback, "lr") == {step: one["learning_rate"] for step, one in logged.items()}
        assert by_step(callback, "grad_norm") == {step: one["grad_norm"] for step, one in logged.items()}
        evaluated = {int(one["step"]): one["eval_loss"] for one in running.state.log_history if "eval_loss" in one}
        assert by_step(callback, "eval_loss") == evaluated
        assert sorted(evaluated) == [2, 4]
        assert by_step(callback, "balance_coef") == dict.fromkeys(range(1, NUM_STEPS + 1), 0.02)
        series = callback.session.series()
        for name, width in (("router_gradient_norm", 1), ("router_weight_norm", 1), ("expert_gradient_norm", 8)):
            rows = series.select(name)
            assert rows.step.tolist() == [step for step in range(1, NUM_STEPS + 1) for _ in range(3 * width)]
            assert np.isfinite(rows.value).all()
            assert (rows.value > 0).any()
        assert series.notes == {}
    assert callback.debugger is None


def _columns(decisions: Any) -> tuple[Any, Any, Any]:
    return decisions.step, decisions.forward_index, decisions.phase


def test_the_balance_loss_is_the_mean_of_the_steps_forwards(tmp_path: Path) -> None:
    model, losses = build(), []
    handle = model.register_forward_hook(
        lambda module, _args, output: losses.append(output.aux_loss.item()) if module.training else None
    )
    with MoEDebuggerCallback() as callback:
        trainer(model, tmp_path, [callback]).train()
        found = by_step(callback, "balance_loss")
    handle.remove()
    assert found == {
        step + 1: pytest.approx(np.mean(losses[step * ACCUMULATION : (step + 1) * ACCUMULATION]))
        for step in range(NUM_STEPS)
    }


class _WithRouterLogits(Trainer):  # type: ignore[misc]  # transformers is untyped here
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers 5.23 reads it from the call alone in an encoder-decoder, not from the config.
        return super().compute_loss(model, {**inputs, "output_router_logits": True}, *args, **kwargs)


def test_the_balance_losses_of_encoder_and_decoder_add_up_as_in_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=tiny_moe.VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2,
        num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
        router_aux_loss_coef=0.03,
    )  # fmt: skip
    model, losses = SwitchTransformersForConditionalGeneration(config), []
    handle = model.register_forward_hook(
        lambda _module, _args, output: losses.append((output.encoder_aux_loss + output.decoder_aux_loss).item())
    )
    with MoEDebuggerCallback() as callback:
        trainer(model, tmp_path, [callback], _WithRouterLogits, eval_strategy="no", max_steps=2).train()
        assert by_step(callback, "balance_loss") == {
            step + 1: pytest.approx(np.mean(losses[step * ACCUMULATION : (step + 1) * ACCUMULATION]))
            for step in range(2)
        }
        assert by_step(callback, "balance_coef") == {1: 0.03, 2: 0.03}
    handle.remove()


def test_a_model_without_a_balance_loss_has_no_coefficient(tmp_path: Path) -> None:
    model = tiny_moe.build("mixtral", router_aux_loss_coef=0.02).train()
    with MoEDebuggerCallback() as callback:
        trainer(model, tmp_path, [callback], eval_strategy="no").train()
        assert callback.session.series().names() == ("grad_norm", "loss", "lr")


def test_the_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [MoEDebuggerCallback(gradients=True, level="full")]):
        model = build(attention_dropout=0.1)
        running = trainer(model, tmp_path, list(callbacks), seed=3)
        running.train()
        results.append(
            (
                [one["loss"] for one in running.state.log_history if "loss" in one],
                [parameter.detach().clone() for parameter in model.parameters()],
                torch.rand(3),
            )
        )
        for callback in callbacks:
            callback.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))
    assert torch.equal(results[0][2], results[1][2])


class Failing(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Fails in the third micro-batch's loss."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().compute_loss(*args, **kwargs)


def test_a_training_that_fails_leaves_the_model_and_the_trainer_as_they_were(tmp_path: Path) -> None:
    model = build()
    with MoEDebuggerCallback() as callback:
        running = trainer(model, tmp_path, [callback], Failing)
        with pytest.raises(KeyboardInterrupt):
            running.train()
        assert hooks_of(model) == 0
        assert not {"_run_epoch", "_evaluate", "_finalize_training"} & set(vars(running))
        # What was captured until then is there, and the next training begins anew.
        assert set(callback.session.decisions().step.tolist()) == {1}
        running.train()
        assert hooks_of(model) == 0
        assert set(callback.session.decisions().step.tolist()) == set(range(1, NUM_STEPS + 1))


def test_a_debugger_of_the_callers_own_keeps_its_open_session(tmp_path: Path) -> None:
    model = build()
    with MoEDebugger(model, step_domain="global") as debugger:
        callback = MoEDebuggerCallback(debugger)
        trainer(model, tmp_path, [callback], max_steps=1, eval_strategy="no").train()
        assert callback.session is debugger.session
        assert hooks_of(model) > 0
        model(torch.randint(3, 90, (1, 4)))
        assert set(callback.session.decisions().step.tolist()) == {1}
        callback.close()
        assert debugger.session is not None
    assert hooks_of(model) == 0


def test_a_debugger_of_another_model_is_refused(tmp_path: Path) -> None:
    with MoEDebugger(build()) as debugger:
        running = trainer(build(), tmp_path, [MoEDebuggerCallback(debugger)], max_steps=1, eval_strategy="no")
        with pytest.raises(InvalidInputError, match="no part of the MixtralForCausalLM which this Trainer trains"):
            running.train()


def test_a_resumed_training_goes_on_counting_its_steps(tmp_path: Path) -> None:
    def run(last_step: int, **changes: Any) -> list[int]:
        with MoEDebuggerCallback() as callback:
            running = trainer(
                build(), tmp_path, [callback], max_steps=last_step, eval_strategy="no", save_strategy="steps",
                save_steps=2, save_only_model=False, **changes,
            )  # fmt: skip
            running.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if last_step > 2 else None)
            assert set(by_step(callback, "loss")) == set(callback.session.decisions().step.tolist())
            return sorted(set(callback.session.decisions().step.tolist()))

    assert run(2) == [1, 2]
    assert run(5) == [3, 4, 5]


def test_gradient_checkpointing_is_counted_once(tmp_path: Path) -> None:
    counts = []
    for checkpointing in (False, True):
        model = build()
        with MoEDebuggerCallback(gradients=True) as callback:
            trainer(model, tmp_path, [callback], activation_checkpointing=checkpointing, seed=5, max_steps=2).train()
            stats = callback.session.get_routing_stats()
            norms = callback.session.series().select("expert_gradient_norm").value
            counts.append((stats.num_tokens, [layer.expert_counts.tolist() for layer in stats.layers], norms))
    assert counts[0][0] == 2 * ACCUMULATION * BATCH * LENGTH + NUM_EVAL * LENGTH
    assert counts[0][:2] == counts[1][:2]
    np.testing.assert_allclose(counts[0][2], counts[1][2], rtol=1e-5)


def test_wrong_arguments_are_named() -> None:
    model = tiny_moe.build("mixtral")
    with MoEDebugger(model) as debugger, pytest.raises(InvalidInputError, match="gradients"):
        MoEDebuggerCallback(debugger, gradients=True)
    with pytest.raises(InvalidInputError, match="train"):
        _ = MoEDebuggerCallback().session
