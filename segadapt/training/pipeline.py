"""Pipeline: each process has some of SegFormer's stages; micro-batches pass from one to the next. Experimental.

torch.distributed.pipelining, which its own pages call alpha, in the order 1F1B: Narayanan et al., "PipeDream", 2019.
The head needs the maps of all stages, so each process passes on those of the stages before it.

B images of a micro-batch   3 RGB   H W crop px   C classes   h w logits   D feature channels   y x a map
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.losses import Objective
from segadapt.models.discriminative import Outputs
from segadapt.models.discriminative.mmseg import stage_maps
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.precision import autocast
from segadapt.seeds import derive
from segadapt.training.learner import Losses
from segadapt.training.parallel import World
from segadapt.training.sizes import targets_of

FAMILIES = ("segformer", "segadapt_segformer_mmseg")


def refuse_pipeline(settings: TrainConfig, world: World, net: Any) -> None:
    """UserError: this net, these batches or so many processes make no pipeline."""
    t, chosen = settings.train, net.config.model_type
    if chosen not in FAMILIES:
        raise UserError(f"train.parallel=pipeline: {chosen} is not divided into stages; expected one of "
                        f"{', '.join(FAMILIES)}. Set train.parallel=ddp or fsdp.")  # fmt: skip
    most = len(net.config.depths)
    if not 2 <= world.size <= most:
        raise UserError(f"train.parallel=pipeline with {world.size} processes: expected 2 to {most}, as {chosen} has "
                        f"{most} stages. Start as many, or set train.parallel=ddp or fsdp.")  # fmt: skip
    if t.accumulate < world.size:
        raise UserError(f"train.accumulate={t.accumulate} with train.parallel=pipeline: expected {world.size} "
                        "micro-batches or more, one for each process at a time. Raise train.accumulate.")  # fmt: skip
    if t.transforms.size_mode != "fixed":
        raise UserError(f"train.transforms.size_mode={t.transforms.size_mode} with train.parallel=pipeline: its "
                        "processes expect batches of one size. Set train.transforms.size_mode=fixed.")  # fmt: skip


def stages_of(depths: Sequence[int], processes: int) -> list[range]:
    """The stages of each process, in a row: the most blocks of one are as few as can be.

    Blocks of SegFormer cost about the same in every stage: a quarter of the pixels, twice the channels.
    """
    cuts = ((0, *inner, len(depths)) for inner in combinations(range(1, len(depths)), processes - 1))
    best = min(cuts, key=lambda cut: max(sum(depths[first:last]) for first, last in pairwise(cut)))
    return [range(first, last) for first, last in pairwise(best)]


class Received(nn.Module):
    """In the place of a stage that another process has: gives the map that came from there."""

    map_BDyx: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Whatever it is asked with."""
        return self.map_BDyx


class Part(nn.Module):
    """This process's stages, and in the last the head: what came (the image, or maps) to maps, or logits and features.

    Stages and head of other processes are taken out of the segmenter's net.
    """

    def __init__(self, segmenter: NetSegmenter, own: range, *, precision: str):
        super().__init__()
        self.net: Any = segmenter.net
        self._segmenter, self._own, self._precision = segmenter, own, precision
        stages = self.net.segformer.stages
        self._is_last = own.stop == len(stages)
        for index in set(range(len(stages))) - set(own):
            stages[index] = Received()
        if not self._is_last:
            self.net.decode_head = nn.Identity()

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        stages = self.net.segformer.stages
        with autocast(given[0].device, self._precision):
            if self._is_last:
                for stage, map_BDyx in zip(stages, given, strict=False):
                    stage.map_BDyx = map_BDyx
                least_px = self._segmenter.family.least_px(self._segmenter.net.config)
                image_13ss = given[0].new_zeros(1, 3, least_px, least_px)  # which Received overlooks
                outputs = self._segmenter.outputs(image_13ss)
                return outputs.logits_BChw.contiguous(), outputs.features_BDyx.contiguous()
            is_first = self._own.start == 0
            maps = [] if is_first else [map_BDyx.view_as(map_BDyx) for map_BDyx in given]
            x = self._segmenter.normalised(given[0]) if is_first else maps[-1]
            for index in self._own:
                x = stages[index](x)
                maps.append(x.contiguous())
            return tuple(maps)


class Pipeline:
    """The schedule of one process, and what its losses were.

    Args:
        unsharded: the whole segmenter, which stays as it is; the other one keeps this process's part alone.
        objective: without random draws.
    """

    def __init__(
        self,
        settings: TrainConfig,
        segmenter: NetSegmenter,
        unsharded: NetSegmenter,
        objective: Objective,
        world: World,
    ):
        self._seed, self._world, self._objective = settings.experiment.seed, world, objective
        self._net, device, precision = segmenter.net, segmenter.net.device, settings.runtime.precision
        own = stages_of(segmenter.net.config.depths, world.size)[world.rank]
        self._part = Part(segmenter, own, precision=precision)
        names = world.every(list(segmenter.net.state_dict()))
        self._owner = {name: rank for rank, held in enumerate(names) for name in held}
        t = settings.train
        given, made = _examples(
            unsharded,
            torch.zeros(t.batch_size // t.accumulate, 3, *targets_of(t.transforms)[0], device=device),
            own,
            precision=precision,
        )
        stage = PipelineStage(self._part, world.rank, world.size, device, input_args=given, output_args=made)
        self._schedule = Schedule1F1B(stage, t.accumulate, self._loss, scale_grads=False)
        self._shares_MT = torch.zeros(0, 0)
        self._step, self._found = 0, cast(Losses, [])
        self._weights: dict[str, float] = {}

    def backward(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], shares_MT: Tensor | None, step: int
    ) -> tuple[Losses, dict[str, float]]:
        """As `AllLayers.backward`; but in the last process there are no losses and no weights."""
        assert shares_MT is not None, "see refuse_pipeline: there are several micro-batches"
        self._shares_MT, self._step, self._found = shares_MT, step, []
        torch.manual_seed(derive(self._seed, "training", step - 1, 0, self._world.rank))
        images, labels = zip(*micro_batches, strict=True)
        is_first, is_last = self._world.rank == 0, self._world.rank == self._world.size - 1
        target = torch.cat(labels) if is_last else None
        self._schedule.step(*([torch.cat(images)] if is_first else []), target=target, return_outputs=False)
        return self._found, self._weights

    def told(self, rates: Mapping[str, float], found: Losses, weights: dict[str, float]) -> Any:
        """Of the groups of all processes, and from the last, in every process."""
        at_hand = [{name: value.cpu() for name, value in values.items()} for values in found]
        everyone = self._world.every((dict(rates), at_hand, weights))
        _, found, weights = everyone[-1]
        back = [{name: value.to(self._net.device) for name, value in values.items()} for values in found]
        return {name: rate for own, _, _ in everyone for name, rate in own.items()}, back, weights

    def _loss(self, outputs: tuple[Tensor, Tensor], label_BHW: Tensor) -> Tensor:
        """Of the next micro-batch, its share in it. The schedule keeps their order."""
        shares_T = self._shares_MT[len(self._found)]
        terms = self._objective(Outputs(outputs[0], None, outputs[1]), label_BHW, step=self._step, shares_T=shares_T)
        self._weights = terms.weights
        self._found.append({"loss": terms.total.detach(), **terms.values})
        return terms.total

    @torch.no_grad()
    def gather(self, state: Mapping[str, Tensor]) -> None:
        """Fill the whole net's state in all processes, each name from the process that trains it."""
        own = self._net.state_dict()
        for name, target in state.items():
            if name in own:
                target.copy_(own[name])
            dist.broadcast(target, src=self._owner[name])

    def buffers(self) -> dict[str, Tensor]:
        """Of the whole net, on the CPU."""
        own = {name: buffer.cpu() for name, buffer in self._net.named_buffers()}
        return {name: buffer for held in self._world.every(own) for name, buffer in held.items()}


def _examples(
    segmenter: NetSegmenter, image_B3HW: Tensor, own: range, *, precision: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the stages are given, and what they make of it: the shapes, dtypes and strides that the processes send.

    On a GPU strides vary with the algorithm, and NCCL sends bytes as they lie: everything is made contiguous.
    """
    net: Any = segmenter.eval().net
    with torch.no_grad(), autocast(image_B3HW.device, precision):
        maps = stage_maps(net.segformer, segmenter.normalised(image_B3HW))
        outputs = segmenter.outputs(image_B3HW)
    maps = [map_BDyx.contiguous().requires_grad_() for map_BDyx in maps]
    given = (image_B3HW,) if own.start == 0 else tuple(maps[: own.start])
    if own.stop == len(maps):
        made = outputs.logits_BChw.contiguous(), outputs.features_BDyx.contiguous()
        return given, (made[0].requires_grad_(), made[1].requires_grad_())
    return given, tuple(maps[: own.stop])
