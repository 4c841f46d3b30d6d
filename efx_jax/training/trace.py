"""A trace of the steps that `profile` selects, in a format that TensorBoard, XProf and Perfetto open."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from efx_jax.config import ProfileConfig


@contextlib.contextmanager
def tracing(profile: ProfileConfig, folder: Path) -> Iterator[Callable[[int], None]]:
    """Traces `profile.steps` steps from `profile.start` on, with the events between them; stops on exit at the latest.

    A run that resumes inside the window traces the rest of it.

    Args:
        profile: the window.
        folder: where the trace is written. Only the first host writes: all run the same program.

    Yields:
        What to call before every step, with the number of steps done.
    """
    is_running = False

    def before_step(done: int) -> None:
        nonlocal is_running
        is_inside = jax.process_index() == 0 and profile.start <= done < profile.start + profile.steps
        if is_inside and not is_running:
            jax.profiler.start_trace(str(folder))
        elif is_running and not is_inside:
            jax.profiler.stop_trace()
        is_running = is_inside

    try:
        yield before_step
    finally:
        if is_running:
            jax.profiler.stop_trace()
