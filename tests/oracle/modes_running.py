"""Circumstances of a forward: levels, sampling, caches, inference mode, autocast, moved models, threads."""

import inspect
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from oracle.compare import Comparison, compare
from oracle.expectations import generate_problems
from oracle.matrix import NEW_TOKENS, forward_of, max_unseen, merge
from oracle.observe import WEIGHT_ROUNDING, bare, is_same, observed, watch
from oracle.outcome import NotAccepted
from oracle.registry import register_mode
from oracle.subset import keep_rows, part_of
from zoo.build import Build

from moe_debugger import Decisions, Session, new_id
from moe_debugger.v1 import routing_pb2 as pb

_NUM_BATCHES = 4


@register_mode("levels", families=None)
def levels(build: Build) -> Comparison:
    """All four levels: counts are sums of the routes that the oracle confirms, and full has each layer's logits."""
    model = build.make()
    inputs = build.inputs(model)
    bare(lambda model: forward_of(model, inputs), model)
    sums: dict[str, list[tuple[int, int, int, float]]] = {}
    rows: dict[str, Decisions] = {}
    for level in ("counts", "routes", "routes+tokens", "full"):
        with watch(model, level=level) as (oracle, debugger):
            forward_of(model, inputs)
            session = debugger.session
            assert session is not None
            sums[level] = _sums(session)
            if level != "counts":
                rows[level] = session.decisions()
    full = rows["full"]
    result = compare(full, oracle.calls, weight_rounding=WEIGHT_ROUNDING)
    for level, those in sums.items():
        if [each[:3] for each in those] != _summed(full):
            result.add_problem(f"the assignments of level {level} are not the sums of the routes")
        known = np.array([[each[3] for each in sums[name]] for name in (level, "full")])
        if not np.allclose(known[0], known[1], rtol=1e-3, atol=1e-6, equal_nan=True):
            result.add_problem(f"the mean router probabilities of level {level} are not those of level full")
    for level, decisions in rows.items():
        if not np.array_equal(decisions.expert_ids, full.expert_ids):
            result.add_problem(f"the routes of level {level} are not those of level full")
        if (decisions.token_id is not None) != (level in ("routes+tokens", "full") and "input_ids" in inputs):
            result.add_problem(
                f"level {level}: token ids are {'there' if decisions.token_id is not None else 'missing'}"
            )
        if (decisions.logits is not None) and level != "full":
            result.add_problem(f"level {level} has logits")
    _check_logits(result, full)
    return result


@register_mode("sampling")
def sampling(build: Build) -> Comparison:
    """Half of the requests: those that are captured are whole, at every layer and in every forward."""
    model: Any = build.make()
    inputs = build.inputs(model) if build.generate_inputs is None else build.generate_inputs(model)
    num_requests = len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
    batches = [[new_id() for _ in range(num_requests)] for _ in range(_NUM_BATCHES)]

    def run(model: Any) -> Any:
        if build.generate_inputs is None:
            return forward_of(model, inputs)
        return model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)

    bare(run, model)
    result = Comparison()
    chosen: set[str] = set()
    for names in batches:
        with watch(model, sampling_rate=0.5) as (oracle, debugger):
            with debugger.requests(names):
                run(model)
            assert debugger.session is not None
            decisions = debugger.session.decisions()
        found = set(decisions.request_ids)
        chosen |= found
        is_chosen = np.array([name in found for name in names])
        if not found <= set(names):
            result.add_problem(f"{len(found - set(names))} requests that nobody named")

        def kept_rows(_: Any, call: Any, kept: Any = is_chosen) -> Any:
            return np.repeat(kept, len(call.used) // len(kept))

        part = keep_rows(oracle.calls, kept_rows)
        if is_chosen.any():
            merge(result, compare(decisions, part, weight_rounding=WEIGHT_ROUNDING))
            for layer_index in decisions.layers:
                here = decisions.layer_index == layer_index
                missing = found - {decisions.request_ids[index] for index in decisions.request_index[here]}
                if missing:
                    result.add_problem(f"layer {layer_index} lacks {len(missing)} of the sampled requests")
        elif len(decisions):
            result.add_problem("rows of requests that are not among the sampled")
    if len(chosen) in (0, _NUM_BATCHES * num_requests):
        # 1 in 2048 with 12 requests: the ids are random.
        result.add_problem(f"{len(chosen)} of {_NUM_BATCHES * num_requests} requests were sampled at rate 0.5")
    return result


@register_mode("static cache")
def static_cache(build: Build) -> Comparison:
    """A cache of a fixed size, whose empty places are no tokens."""
    return _generates(build, build.generate_inputs, cache_implementation="static")


@register_mode("right-padded generate")
def right_padded_generate(build: Build) -> Comparison:
    """The prompts padded on the right, so that new tokens follow padding."""
    if build.generate_inputs is None or build.right_padded is None:
        return _generates(build, None)
    names = build.generate_inputs(build.make())
    padded = build.right_padded
    return _generates(build, lambda model: {name: value for name, value in padded(model).items() if name in names})


@register_mode("inference mode")
def inference_mode(build: Build) -> Comparison:
    """A forward under `torch.inference_mode`, whose tensors autograd never sees."""

    def run(model: Any) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    model = build.make()
    inputs = build.inputs(model)
    return observed(model, run, max_unseen=max_unseen(build)).comparison


@register_mode("autocast bf16")
def autocast(build: Build) -> Comparison:
    """A float32 model under autocast to bfloat16."""

    def run(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward_of(model, inputs)

    model = build.make()
    inputs = build.inputs(model)
    return observed(model, run, max_unseen=max_unseen(build)).comparison


@register_mode("moved to bf16")
def moved(build: Build) -> Comparison:
    """`model.to(bfloat16)` and back while the debugger is attached."""
    inputs = build.inputs(build.make())

    def run(model: Any) -> list[Any]:
        outputs = [forward_of(model, inputs)]
        outputs.append(forward_of(model.to(torch.bfloat16), _in_dtype(inputs, torch.bfloat16)))
        outputs.append(forward_of(model.to(torch.float32), inputs))
        return outputs

    expected = bare(run, build.make())
    model = build.make()
    with watch(model) as (oracle, debugger):
        outputs = run(model)
        assert debugger.session is not None
        decisions = debugger.session.decisions()
    result = compare(decisions, oracle.calls, weight_rounding=WEIGHT_ROUNDING)
    if not all(is_same(one, other) for one, other in zip(expected, outputs, strict=True)):
        result.add_problem("the outputs with the debugger differ from those without")
    return result


@register_mode("two threads")
def two_threads(build: Build) -> Comparison:
    """Two threads that call one model at a time: the rows of each forward are those of its own thread."""
    model = build.make()
    inputs = build.inputs(model)
    # The second thread has the batch the other way round, so that rows of the other's forward would be wrong.
    given = [inputs, {name: _flipped(value) for name, value in inputs.items()}]
    expected = bare(lambda model: [forward_of(model, each) for each in given], model)
    bare(lambda model: _in_threads(model, given, None)[0], model)
    num_requests = len(next(value for value in inputs.values() if isinstance(value, torch.Tensor)))
    names = [[new_id() for _ in range(num_requests)] for _ in given]
    with watch(model) as (oracle, debugger):
        outputs, threads = _in_threads(model, given, lambda index: debugger.requests(names[index]))
        assert debugger.session is not None
        decisions = debugger.session.decisions()
    result = Comparison()
    for index, thread in enumerate(threads):
        mine = {number for number, name in enumerate(decisions.request_ids) if name in names[index]}
        rows = np.isin(decisions.request_index, sorted(mine))
        calls = {site: [call for call in those if call.thread == thread] for site, those in oracle.calls.items()}
        merge(result, compare(part_of(decisions, rows), calls, weight_rounding=WEIGHT_ROUNDING))
        if not all(is_same(expected[index], output) for output in outputs[index]):
            result.add_problem(f"thread {index}: the outputs with the debugger differ from those without")
    return result


def _generates(build: Build, inputs_of: Any, **options: Any) -> Comparison:
    if inputs_of is None:
        raise NotAccepted("does not generate, or takes no text")
    model = build.make()
    given = inputs_of(model)
    options = {"max_new_tokens": NEW_TOKENS, **options}

    def run(model: Any) -> Any:
        return model.generate(**given, do_sample=False, **options)

    watched = observed(model, run, max_unseen=max_unseen(build))
    problems = generate_problems(
        watched.decisions,
        given,
        watched.output,
        is_encoder_decoder=build.kind == "encoder-decoder",
        takes_positions="position_ids" in inspect.signature(type(model).forward).parameters,
    )
    for problem in problems:
        watched.comparison.add_problem(problem)
    return watched.comparison


def _in_threads(model: Any, given: list[dict[str, Any]], scope: Any) -> tuple[list[list[Any]], list[int]]:
    """Run each of `given` twice in a thread of its own; return the outputs, and the threads' numbers."""
    outputs: list[list[Any]] = [[] for _ in given]
    threads = [0] * len(given)
    errors: list[BaseException] = []
    start = threading.Barrier(len(given))

    def work(index: int) -> None:
        threads[index] = threading.get_ident()
        try:
            start.wait(30)
            for _ in range(2):
                if scope is None:
                    outputs[index].append(forward_of(model, given[index]))
                else:
                    with scope(index):
                        outputs[index].append(forward_of(model, given[index]))
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(given))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return outputs, threads


def _flipped(value: Any) -> Any:
    return value.flip(0) if isinstance(value, torch.Tensor) else value


def _in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _sums(session: Session) -> list[tuple[int, int, int, float]]:
    """Return layer, expert, assignments and mean probability of every expert."""
    experts = session.get_expert_metrics().experts
    return [(each.layer_index, each.expert_id, each.num_assignments, each.mean_probability) for each in experts]


def _summed(decisions: Decisions) -> list[tuple[int, int, int]]:
    """Return layer, expert and assignments as the rows that are no padding give them."""
    found = []
    for layer_index, info in decisions.layers.items():
        rows = (decisions.layer_index == layer_index) & ~decisions.is_padding
        is_routed = decisions.slot_status[rows] == pb.SLOT_STATUS_ROUTED
        counts = np.bincount(decisions.expert_ids[rows][is_routed], minlength=info.num_experts)
        found += [(layer_index, expert_id, int(count)) for expert_id, count in enumerate(counts)]
    return found


def _check_logits(result: Comparison, decisions: Decisions) -> None:
    for layer_index, info in decisions.layers.items():
        rows = decisions.layer_index == layer_index
        logits = None if decisions.logits is None else decisions.logits[rows]
        has_any = logits is not None and bool((~np.isnan(logits)).any())
        if not has_any and not info.unavailable_reason and rows.any():
            result.add_problem(f"layer {layer_index} ({info.module_name}) has no logits and gives no reason for it")
        if logits is None or not has_any:
            continue
        where = f"layer {layer_index} ({info.module_name})"
        num_columns = info.num_experts + info.num_identity_experts
        is_there = ~np.isnan(logits)
        if logits.shape[1] < info.num_experts or not is_there[:, : info.num_experts].all():
            result.add_problem(f"{where}: the logits of its {info.num_experts} experts are not all there")
        if is_there[:, num_columns:].any():
            result.add_problem(f"{where}: logits past its {num_columns} experts")
