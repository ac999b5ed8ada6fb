"""`moex train --profile=START:STOP`: a trace of some steps by JAX's profiler.

docs/profiling.md says how to read one.
"""

import pathlib
import re

import jax

from moex.config.base import ConfigError

# The named scopes by which the time of a device is split.
SCOPES = ("router", "dispatch", "experts", "combine", "attention", "optimizer")


def profile_steps(text: str | None, num_steps: int) -> range:
    """Read the steps of `--profile=START:STOP`; the first step of a run is 0.

    Raises:
      ConfigError: if it is not two numbers with 0 <= START < STOP <= num_steps.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
    start, stop = map(int, match.groups()) if match else (0, 0)
    if not start < stop <= num_steps:
        raise ConfigError(
            f"--profile={text}: must be START:STOP with 0 <= START < STOP <= "
            f"config.steps = {num_steps}, such as 10:15 for steps 10 to 14."
        )
    return range(start, stop)


class Profiler:
    """Traces the steps of a range into a folder; each process writes its own file."""

    def __init__(self, steps: range, folder: pathlib.Path, say):
        self.steps, self.folder, self.say = steps, folder, say
        self.active, self.first = False, 0

    def check_start(self, step: int) -> None:
        """Warn if a run that goes on from `step` is past the first step to trace."""
        if self.steps and step > self.steps.start:
            rest = "nothing" if step >= self.steps.stop else f"{step}:{self.steps.stop}"
            self.say(f"--profile: the run is at step {step}; {rest} is traced")

    def begin(self, step: int) -> None:
        """Start the trace if `step` is to be traced; call this before its dispatch."""
        if self.active or step not in self.steps:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls would hide everything else
        jax.profiler.start_trace(str(self.folder), profiler_options=options)
        self.active, self.first = True, step

    def ends(self, step: int) -> bool:
        """Whether the trace ends after `step` steps."""
        return self.active and step == self.steps.stop

    def end(self, step: int, state=None) -> None:
        """Wait for the device and write the trace of the steps up to here."""
        if not self.active:
            return
        jax.block_until_ready(state)
        self.active = False
        jax.profiler.stop_trace()
        self.say(
            f"wrote the trace of steps {self.first}:{step} to {self.folder}; "
            "how to read it: docs/profiling.md"
        )
