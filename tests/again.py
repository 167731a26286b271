"""A memory that works on the CPU as CUDA graphs do on a GPU: results stay where they are, and a replay writes there."""

import torch


class Again:
    """See segadapt.models.recording.Memory; a replay does the work again, in the autocast of the first time."""

    def __init__(self) -> None:
        self.recorded = 0

    def warm_up(self, work):
        work()

    def record(self, work):
        self.recorded += 1
        is_cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
            result = work()

        def replay():
            with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=is_cast):
                fresh = work()
            for old, new in zip(result or (), fresh or (), strict=True):
                if old is not None and old.data_ptr() != new.data_ptr():  # an input that is handed on
                    old.copy_(new)

        return result, replay


class Captured(Again):
    """What it records has not run, as on a GPU: the net's statistics and the generator are as they were."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self._net = net

    def record(self, work):
        kept = [(buffer, buffer.clone()) for buffer in self._net.buffers()]
        with torch.random.fork_rng(devices=[]):
            recorded = super().record(work)
        for buffer, before in kept:
            buffer.data.copy_(before)  # unseen by autograd
        return recorded
