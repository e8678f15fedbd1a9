"""Stops a run in the middle."""

from transformers import TrainerCallback


class StopAt(TrainerCallback):
    """As if the run had been killed after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
