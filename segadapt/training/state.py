"""What a training run moves: trained weights, their moving average, the optimizer. Saved whole, so it can go on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from segadapt.errors import UserError
from segadapt.record import write_bytes


class TrainingState:
    """Named parameters with an exponential moving average, and the AdamW that moves them.

    The average forgets the random start: its decay is at most (1 + step) / (10 + step).

    Args:
        parameters: all that is trained, by name.
        optimizer: over these parameters and no other.
        decay: of the average; 0: the average is the weights.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, decay: float):
        self.parameters, self.optimizer, self.decay, self.step = dict(parameters), optimizer, decay, 0
        self._average = [p.detach().clone() for p in self.parameters.values()]

    @torch.no_grad()
    def advance(self) -> None:
        """One optimizer step with the gradients at hand, then the average follows."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._average, [p.detach() for p in self.parameters.values()], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold their average inside, and themselves again outside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters.values()):
            parameter.data, self._average[index] = self._average[index], parameter.data

    def keep_average(self) -> None:
        """Training is over: the parameters become their average."""
        self._swap()

    @staticmethod
    def step_of(path: Path) -> int:
        """Steps made when a file was saved."""
        with safe_open(path, "pt") as file:
            return int(file.metadata()["step"])

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.parameters.items(), self._average, strict=True):
            tensors |= {f"weight/{name}": parameter.detach(), f"average/{name}": average}
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
        write_bytes(path, save(whole, metadata={"step": str(self.step)}))

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read what `save` wrote, exactly.

        Raises:
            UserError: the file does not fit the parameters.
        """
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith("weight/")}
            if shapes != {f"weight/{name}": tuple(p.shape) for name, p in self.parameters.items()}:
                raise UserError(
                    f"{path}: other weights than this run trains. Remove the file, or set experiment.restart=true."
                )
            for index, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(file.get_tensor(f"weight/{name}"))
                self._average[index].copy_(file.get_tensor(f"average/{name}"))
                moments = {key: f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(stored) if key == "step" else file.get_tensor(stored).to(parameter.device)
                    for key, stored in moments.items()
                    if stored in names
                }
        self.step = self.step_of(path)
