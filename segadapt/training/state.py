"""What a training run moves: trained weights, their moving average, the optimizer. Saved, so it can go on."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from segadapt.checkpoint import decode, encode
from segadapt.errors import UserError
from segadapt.record import write_bytes
from segadapt.training.sharded import fill, local


class TrainingState:
    """Named parameters with an exponential moving average, and the optimizer that moves them.

    The average forgets the random start: its decay is at most (1 + step) / (10 + step).

    Args:
        parameters: all that is trained, by name.
        optimizer: over these parameters and no other.
        decay: of the average; 0: there is none, and the weights stand for it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, *, decay: float):
        self.parameters, self.optimizer, self.decay, self.step = dict(parameters), optimizer, decay, 0
        self._average = [p.detach().clone() for p in self.parameters.values()] if decay else []

    @torch.no_grad()
    def advance(self) -> None:
        """One optimizer step with the gradients at hand, then the average follows."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.decay:
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            average, now = [local(a) for a in self._average], [local(p) for p in self.parameters.values()]
            torch._foreach_lerp_(average, now, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold their average inside, and themselves again outside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.decay:  # in place: FSDP and recorded graphs know where a parameter lies
            for parameter, average in zip(self.parameters.values(), self._average, strict=True):
                kept = local(parameter).clone()
                local(parameter).copy_(local(average))
                local(average).copy_(kept)

    def keep_average(self) -> None:
        """Training is over: the parameters become their average."""
        self._swap()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as `checkpoint.encode` takes it; tensors that are sharded are this process's DTensors."""
        averages = dict(zip(self.parameters, self._average, strict=True)) if self.decay else {}
        moments = {name: self.optimizer.state[p] for name, p in self.parameters.items()}
        return {
            "step": self.step,
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "average": averages,
            "moments": {name: {key: value for key, value in own.items() if isinstance(value, Tensor)}
                        for name, own in moments.items()},
        }  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Those of `state_dict` by their path in it, such as moments/NAME/exp_avg."""
        return flat(self.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was when `state_dict` gave this in a process that held all, to the bit."""
        values = flat(state)

        def fill_all(targets: Mapping[str, Tensor]) -> None:
            for path, target in targets.items():
                fill(target, values[path])

        self.restore(state["step"], values, fill_all)

    @torch.no_grad()
    def restore(self, step: int, paths: Iterable[str], read: Callable[[Mapping[str, Tensor]], None]) -> None:
        """As it was after that step.

        Args:
            paths: of the saved tensors, see `tensors`; those of other processes among them.
            read: fills tensors by their paths, in place.
        """
        self.step, is_fused = step, self.optimizer.defaults.get("fused")
        targets = {f"weights/{name}": p.detach() for name, p in self.parameters.items()}
        if self.decay:
            targets |= {f"average/{name}": own for name, own in zip(self.parameters, self._average, strict=True)}
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {}
        for path in paths:
            kind, name, *key = path.split("/")
            if kind != "moments" or name not in self.parameters:
                continue
            parameter = self.parameters[name]
            if key == ["step"]:  # a fused rule counts where the parameter lies, any other on the CPU
                moment = torch.zeros((), device=parameter.device if is_fused else "cpu")
            else:
                moment = torch.zeros_like(parameter)
            self.optimizer.state[parameter][key[0]] = targets[path] = moment
        read(targets)

    @staticmethod
    def step_of(path: Path) -> int:
        """Steps made when a file was saved."""
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])["step"]

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        state = self.state_dict()
        content = {key: encode(value, tensors, key) for key, value in state.items()}
        at_hand = {name: value.cpu().contiguous() for name, value in tensors.items()}
        write_bytes(path, save(at_hand, metadata={"state": json.dumps(content)}))

    def load(self, path: Path) -> None:
        """Read what `save` wrote, exactly.

        Raises:
            UserError: the file does not fit the parameters.
        """
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            content = json.loads(file.metadata()["state"])
        state = {key: decode(value, tensors) for key, value in content.items()}
        shapes = {name: value.shape for name, value in state["weights"].items()}
        if shapes != {name: p.shape for name, p in self.parameters.items()}:
            raise UserError(
                f"{path}: other weights than this run trains. Remove the file, or set experiment.restart=true."
            )
        self.load_state_dict(state)


def flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of weights, average and moments by path."""
    tensors: dict[str, Tensor] = {}
    for key in ("weights", "average", "moments"):
        encode(dict(state[key]), tensors, key)
    return tensors
