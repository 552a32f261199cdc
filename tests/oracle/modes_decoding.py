"""Ways of decoding, and of calling a model beside one forward and greedy decoding."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from oracle.compare import Comparison, compare
from oracle.matrix import NEW_TOKENS, check_forward, check_generate, forward_of, max_unseen, merge
from oracle.observe import WEIGHT_ROUNDING, bare, observed, watch
from oracle.outcome import NotAccepted
from oracle.registry import register_mode
from zoo.build import Build

from moe_debugger.v1 import routing_pb2 as pb


@register_mode("right padding", families=None)
def right_padding(build: Build) -> Comparison:
    """A right-padded batch."""
    if build.right_padded is None:
        raise NotAccepted("takes no text")
    model = build.make()
    return check_forward(build, model, build.right_padded(model))


@register_mode("re-attach")
def reattach(build: Build) -> Comparison:
    """Attach, detach, run bare, attach again: both times all is captured, in between nothing changes."""
    model = build.make()
    first = check_forward(build, model)
    inputs = build.inputs(model)
    bare(lambda model: forward_of(model, inputs), model)
    second = check_forward(build, model)
    if first.num_rows != second.num_rows:
        second.add_problem(f"{first.num_rows} rows the first time, {second.num_rows} the second")
    merge(first, second)
    return first


@register_mode("beam search")
def beam_search(build: Build) -> Comparison:
    """Two beams a text: rows are texts x beams."""
    return _generates(build, num_beams=2)


@register_mode("chunked prefill")
def chunked_prefill(build: Build) -> Comparison:
    """The prompt in chunks of three tokens, each chunk a prefill."""
    model = build.make()
    if build.generate_inputs is None:
        raise NotAccepted("does not generate")
    inputs = build.generate_inputs(model)
    if build.kind == "encoder-decoder":
        raise NotAccepted("an encoder-decoder's prompt is one token")
    watched = observed(model, lambda model: _greedy(model, inputs, prefill_chunk_size=3))
    decisions, result = watched.decisions, watched.comparison
    # 7 columns: chunks of 3, 3 and 1, whose last makes the first new token; then a forward for each other new token.
    width = inputs["input_ids"].shape[1]
    num_prefills = -(-width // 3)
    for layer_index in decisions.layers:
        rows = decisions.layer_index == layer_index
        forwards = np.unique(decisions.forward_index[rows])
        phases = [int(decisions.phase[rows & (decisions.forward_index == forward)].max()) for forward in forwards]
        expected = [pb.PHASE_PREFILL] * num_prefills + [pb.PHASE_DECODE] * (NEW_TOKENS - 1)
        if phases != expected:
            result.add_problem(f"layer {layer_index}: phases {phases}, expected {expected}")
        real = rows & ~decisions.is_padding
        lengths = inputs["attention_mask"].sum(-1) + NEW_TOKENS - 1
        for request in np.unique(decisions.request_index):
            positions = np.sort(decisions.position[real & (decisions.request_index == request)])
            if len(positions) not in lengths.tolist() or not np.array_equal(positions, np.arange(len(positions))):
                result.add_problem(f"layer {layer_index}: request {request} has positions {positions.tolist()}")
    return result


@register_mode("prompt lookup")
def prompt_lookup(build: Build) -> Comparison:
    """Assisted decoding whose drafts are looked up in the prompt."""
    return _generates(build, first_text_only=True, prompt_lookup_num_tokens=2)


@register_mode("assisted decoding")
def assisted_decoding(build: Build) -> Comparison:
    """Assisted decoding by a second model, whose drafts are often rejected."""
    if build.generate_inputs is None:
        raise NotAccepted("does not generate")
    assistant: Any = build.make()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return _generates(build, first_text_only=True, assistant_model=assistant)


@register_mode("two forwards a step")
def two_forwards_a_step(build: Build) -> Comparison:
    """Two forwards under one `debugger.step`, and one under the next."""
    model = build.make()
    inputs = build.inputs(model)
    bare(lambda model: forward_of(model, inputs), model)
    with watch(model, step_domain="global") as (oracle, debugger):
        for step, num_forwards in ((7, 2), (8, 1)):
            debugger.step(step)
            for _ in range(num_forwards):
                forward_of(model, inputs)
        assert debugger.session is not None
        decisions = debugger.session.decisions()
    result = compare(decisions, oracle.calls, weight_rounding=WEIGHT_ROUNDING)
    for layer_index in decisions.layers:
        rows = decisions.layer_index == layer_index
        pairs = list(
            dict.fromkeys(zip(decisions.step[rows].tolist(), decisions.forward_index[rows].tolist(), strict=True))
        )
        if [step for step, _ in pairs] != [7, 7, 8] or len({forward for _, forward in pairs}) != 3:
            result.add_problem(f"layer {layer_index}: steps and forwards are {pairs}")
    return result


def _generates(build: Build, *, first_text_only: bool = False, **options: Any) -> Comparison:
    if build.generate_inputs is None:
        raise NotAccepted("does not generate")
    model = build.make()
    if not first_text_only:
        return check_generate(build, model, **options)
    # Assisted decoding takes one text at a time; the first one has no padding.
    inputs = {name: value[:1] for name, value in build.generate_inputs(model).items()}
    return observed(
        model,
        lambda model: _greedy(model, inputs, **{"max_new_tokens": 8, **options}),
        max_unseen=max_unseen(build),
    ).comparison


def _greedy(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    return model.generate(**inputs, do_sample=False, **{"max_new_tokens": NEW_TOKENS, **options})
