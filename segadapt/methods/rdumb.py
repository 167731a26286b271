"""RDumb: ETA that forgets everything now and then."""

from dataclasses import dataclass
from typing import Any

from segadapt.config import setting
from segadapt.methods.eata import Eata


class Rdumb(Eata):
    """ETA (see Eata, per pixel) with a full reset of weights and optimizer every N steps (Press et al. 2023, sec. 5).

    Published: N 1000 at batches of 64; ETA's values; SGD 2.5e-4 momentum 0.9.
    """

    @dataclass
    class Options(Eata.Options):
        reset_every: int = setting("images from one full reset to the next", low=1)

    def initial_state(self) -> dict[str, Any]:
        return super().initial_state() | {"steps": 0}

    def step(self, image_3HW, *, task, key):
        if self.state["steps"] == self.options.reset_every:
            self.reset()
        self.state["steps"] += 1
        return super().step(image_3HW, task=task, key=key)
