"""What a run would do and need, without loading weights or running it: the report of `--dry-run`."""

import dataclasses
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import jax

from efx_jax.config import Config
from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.mesh import mesh_size, mesh_sizes
from efx_jax.parallel.partition import BATCH, axes_size
from efx_jax.training.accounting import (
    calibration_length,
    count_parameters,
    event_flops,
    flops_per_step,
    flops_per_token,
    search_flops_per_token,
)
from efx_jax.training.activations import Layout
from efx_jax.training.devices import Device, find_device
from efx_jax.training.disk import disk_bytes, disk_text
from efx_jax.training.lowered import compile_step, simulate_devices
from efx_jax.training.measure import rows_table
from efx_jax.training.memory import Memory, host_bytes, memory
from efx_jax.training.schedule import Event, prune_events, total_steps
from efx_jax.training.survey import DataCounts, RowCounts, check_shapes, count_data, plan_layout
from efx_jax.weights.shapes import FoundSpec, find_spec

_REACHED = 0.45
"""Share of a device's peak that an efficient run reaches, recomputation included."""

_GIB, _MIB = 2**30, 2**20
_INDENT = 14
_MOST_ROWS = 2**20


class _Phase(NamedTuple):
    """A kind of step: its name, whether masks are in force, and whether ATP's generator learns too."""

    name: str
    masked: bool
    searches: bool = False


def plan_text(config: Config) -> str:
    """The report of `--dry-run`: sizes, data, steps, events, FLOPs, and the bytes that one device needs and has.

    Reads the model's config and, if tokenizer and rows are on this disk, the data; no weights. Call it before
    anything touches a device, so that a CPU can simulate the mesh.

    Args:
        config: the checked settings.

    Raises:
        InputError: an unknown model or device, a mesh that does not divide the model, settings that do not fit it.
    """
    simulate_devices(mesh_size(config.mesh))
    found = find_spec(config.model.path)
    spec = found.spec
    check_shapes(config, spec)
    device = find_device(config.mesh.device, mesh_size(config.mesh))
    data = count_data(config, found)
    layout = plan_layout(config, found, device, data)
    epoch = _epoch(config, data)
    is_known = epoch or config.train.steps or not config.train.epochs
    steps = total_steps(config.train, epoch) if is_known else None
    needs = memory(spec, config, layout)
    lines = [
        *_model_lines(config, found),
        *_data_lines(data, config.model.path),
        *_training_lines(config, spec, layout, steps),
        *_event_lines(config, steps),
        *_event_arithmetic_lines(config, spec),
    ]
    if steps == 0:
        return "\n".join([*lines, *_memory_lines(dataclasses.replace(needs, step={}), device, config)])
    lines += [
        *_arithmetic_lines(config, spec, layout),
        *_time_lines(config, spec, layout, device, steps),
        *_memory_lines(needs, device, config),
        *_host_lines(config, spec, layout),
        *_disk_lines(config, spec, layout, steps),
        *_batch_lines(config, spec, layout, device),
        *_compiled_lines(config, spec, layout, needs),
    ]
    return "\n".join(lines)


def _model_lines(config: Config, found: FoundSpec) -> list[str]:
    parameters = count_parameters(found.spec, config)
    sizes = f"{parameters.total:,} parameters, {parameters.linears:,} in linears"
    return _paragraph("model", f"{found.spec.model_type}, {sizes}; from {found.origin}")


def _epoch(config: Config, data: DataCounts | RowCounts | str) -> int:
    """Rows of an epoch; 0 if not known."""
    if isinstance(data, DataCounts):
        return data.epoch_rows
    return data.rows if isinstance(data, RowCounts) and config.data.batching != "packing" else 0


def _data_lines(data: DataCounts | RowCounts | str, model: str) -> list[str]:
    if isinstance(data, str):
        return _paragraph("data", data)
    table = ["", *rows_table(data.report).splitlines(), ""] if "tasks" in data.report["train"] else []
    if isinstance(data, RowCounts):
        text = (
            f"{data.rows:,} training rows, {data.test_rows:,} test rows scored; tokens not counted, nothing shortened: "
            f"the tokenizer of {model} is not on this disk (model.path may be a folder that has it)"
        )
    else:
        text = (
            f"{data.sequences:,} sequences, {data.tokens:,} tokens, the longest {data.longest:,}; "
            f"{data.test_rows:,} test rows scored, {data.windows:,} perplexity windows"
        )
    return _paragraph("data", text) + table


def _training_lines(config: Config, spec: ModelSpec, layout: Layout, steps: int | None) -> list[str]:
    if steps == 0:
        return _paragraph("training", "none: nothing but a prune event changes the model")
    size = config.train.batch_size
    number = f"{steps:,} steps" if steps else f"{config.train.epochs:g} epochs in steps"
    unknown = "" if steps else "; how many steps that is, only the data can tell (or --train.steps)"
    trainable = count_parameters(spec, config).trainable
    return _paragraph(
        "training",
        f"{number} of {size} sequences of at most {layout.length:,} tokens, {layout.rows} in one forward pass, "
        f"{trainable:,} trainable parameters (rank {config.lora.rank}){unknown}",
    )


def _event_lines(config: Config, steps: int | None) -> list[str]:
    scale = 10**6 if steps is None else steps
    events = prune_events(config.prune, config.train, scale)

    def place(event: Event) -> str:
        return f"at {event.step / scale:.0%} of the steps" if steps is None else f"step {event.step:,}"

    if config.prune.score == "atp" and events:
        text = f"{place(events[0])}; {events[0].sparsity:.0%} of the weights of the linears are gone then"
        return _paragraph("search ends", text)
    return _paragraph(
        "prune events", ", ".join(f"{place(event)} to {event.sparsity:.0%}" for event in events) or "none"
    )


def _event_arithmetic_lines(config: Config, spec: ModelSpec) -> list[str]:
    """FLOPs of one event; nothing for ATP's."""
    prune = config.prune
    if not prune.sparsity or prune.score == "atp":
        return []
    length = calibration_length(spec, config)
    tokens = prune.calibration_rows * length
    flops = event_flops(spec, prune, config.lora.rank, tokens, length)
    parts = [(flops.passes, "passes over them"), (flops.grams, "Grams"), (flops.surgeons, "float32 on the Grams")]
    text = ", ".join(f"{_number(value / 1e12)} TFLOP of {name}" for value, name in parts if value)
    return _paragraph("an event", f"at most {tokens:,} calibration tokens: {text}")


def _arithmetic_lines(config: Config, spec: ModelSpec, layout: Layout) -> list[str]:
    """FLOPs of a token and of a step, before masks and under them."""
    texts = [
        f"{_number(_token_flops(spec, config, layout, phase) / 1e9)} GFLOP a token and "
        f"{_number(_step_flops(spec, config, layout, phase) / 1e12)} TFLOP a step {phase.name}"
        for phase in _phases(config, layout)
    ]
    return _paragraph("arithmetic", f"{'; '.join(texts)}; all rows full, recomputation (remat) included")


def _time_lines(config: Config, spec: ModelSpec, layout: Layout, device: Device, steps: int | None) -> list[str]:
    """Seconds of a step at the speed that the named device should reach."""
    if device.peak is None:
        return []
    speed = _REACHED * device.peak * mesh_size(config.mesh)
    seconds = [_step_flops(spec, config, layout, phase) / speed for phase in _phases(config, layout)]
    text = f"{' and '.join(f'{value:,.3g} s' for value in seconds)} a step at {_REACHED:.0%} of {device.name}'s "
    text += f"{device.peak / 1e12:,.0f} TFLOP/s"
    if steps:
        events = prune_events(config.prune, config.train, steps)
        first = events[0].step if events else steps
        total = first * seconds[0] + (steps - first) * seconds[-1]
        text += f"; {total / 3600:,.3g} h in all, without events and evaluation"
    return _paragraph("time", text)


def _phases(config: Config, layout: Layout) -> list[_Phase]:
    """The steps before and after the first event."""
    if not layout.events:
        return [_Phase("without masks", masked=False)]
    after = _Phase(f"under masks ({config.prune.mask_forward})", masked=True)
    if config.prune.score == "atp":
        return [_Phase("while units are searched", masked=True, searches=True), after]
    return [_Phase("before the first event", masked=False), after]


def _step_flops(spec: ModelSpec, config: Config, layout: Layout, phase: _Phase) -> float:
    passes = -(-config.train.batch_size // layout.rows)
    tokens = config.train.batch_size * layout.length
    own = flops_per_step(spec, config, layout.length, passes, phase.masked)
    return own + tokens * _search_flops(spec, config, layout, phase)


def _token_flops(spec: ModelSpec, config: Config, layout: Layout, phase: _Phase) -> float:
    own = flops_per_token(spec, config, layout.length, phase.masked, layout.rows).total
    return own + _search_flops(spec, config, layout, phase)


def _search_flops(spec: ModelSpec, config: Config, layout: Layout, phase: _Phase) -> float:
    return search_flops_per_token(spec, config, layout.length) if phase.searches else 0.0


def _memory_lines(needs: Memory, device: Device, config: Config) -> list[str]:
    """The table of bytes, in GiB, or in MiB for small models."""
    mesh, count = config.mesh, mesh_size(config.mesh)
    unit, name = (_GIB, "GiB") if needs.peak >= 4 * _GIB else (_MIB, "MiB")
    where = f"each of {count} devices" if count > 1 else "one device"
    lines = ["", f"{name} on {where} (data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor})"]
    sums = [("always", needs.resident), ("in a step", needs.step), ("for a score", needs.score)]
    for title, parts in [*sums, ("in an event", needs.event), ("in an evaluation", needs.evaluation)]:
        if parts:
            lines.append(_row(title, sum(parts.values()), unit))
            lines += [_row(f"  {part}", size, unit) for part, size in parts.items() if size >= unit / 200]
    verdict = "fits" if needs.peak <= device.memory else "DOES NOT FIT"
    lines.append(_row("peak", needs.peak, unit) + f"  {verdict}: {device.name} has {device.memory / unit:,.0f} to use")
    return [*lines, ""]


def _host_lines(config: Config, spec: ModelSpec, layout: Layout) -> list[str]:
    size = host_bytes(spec, config, layout.events)
    return _paragraph("hosts", f"{size / _GIB:,.2f} GiB of averaged scores in the memory of all hosts") if size else []


def _disk_lines(config: Config, spec: ModelSpec, layout: Layout, steps: int | None) -> list[str]:
    # If the number of steps is not known, assume as many checkpoints as are kept.
    steps = 10**9 if steps is None else steps
    times = [event.step for event in prune_events(config.prune, config.train, steps)]
    needed = disk_bytes(spec, config, layout.dtype, times, steps)
    return _paragraph("disk", f"up to {sum(needed.values()) / _GIB:,.1f} GiB: {disk_text(needed)}")


def _batch_lines(config: Config, spec: ModelSpec, layout: Layout, device: Device) -> list[str]:
    def fits(rows: int) -> bool:
        return memory(spec, config, dataclasses.replace(layout, rows=rows)).peak <= device.memory

    rows = largest_rows(fits, axes_size(BATCH, mesh_sizes(config.mesh)), _MOST_ROWS)
    found = f"{rows:,} sequences of {layout.length:,} tokens fit in one forward pass over all devices"
    return _paragraph("micro-batch", found if rows else "not even the smallest fits; use more devices (fsdp, tensor)")


def largest_rows(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` for which `fits` holds, by bisection; 0 if none does.

    Where `fits` fails, it must fail for all larger values too.
    """
    low, high = 0, most // unit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def _compiled_lines(config: Config, spec: ModelSpec, layout: Layout, needs: Memory) -> list[str]:
    """XLA's own figures for the available backend, next to ours for the named device."""
    try:
        compiled = compile_step(spec, config, layout)
    except InputError as error:
        return _paragraph("compiled", f"no: {error}")
    except jax.errors.JaxRuntimeError as error:
        return _paragraph("compiled", f"no: {str(error).splitlines()[0]}")
    arguments = sum(needs.resident.values()) - needs.resident["moving average"] - needs.resident["generator"]
    temporaries = sum(needs.step.values()) - needs.step["soft masks"]
    own = f"planned above: {arguments / _GIB:,.2f} and {temporaries / _GIB:,.2f}"
    step = "the adapters' step" if needs.step["soft masks"] else "the step"
    text = f"{step} for {compiled.platform} in {compiled.seconds:.0f} s: {compiled.arguments / _GIB:,.2f} GiB of "
    text += f"arguments and {compiled.temporaries / _GIB:,.2f} GiB of temporaries on each device ({own})"
    if compiled.platform == "cpu":
        text += "; a CPU widens bfloat16 to float32 and has no fused attention"
    return _paragraph("compiled", text)


def _row(name: str, size: int, unit: int) -> str:
    return f"  {name:<24}{size / unit:>10,.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _paragraph(title: str, text: str) -> list[str]:
    """`title` and `text`, wrapped to 80 columns with a hanging indent."""
    width = max(_INDENT, len(title) + 2)
    return textwrap.wrap(
        text, width=80, initial_indent=title.ljust(width), subsequent_indent=" " * _INDENT, break_on_hyphens=False
    )
