"""A memory of embeddings for the contrast loss: for each class a ring of pixels and a ring of regions.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021, section 3.3. All ranks hold
the same rows. Self-made: no row is read before it was written, class 0 is a class, and rows carry their true label.

B images  C classes  D embedding width  P pixels of the batch's grid  y x that grid  M rows of a ring  K rows of a class
N new rows  R rows that are read
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from segadapt.datasets.labels import IGNORE


@dataclass(frozen=True)
class Rows:
    """Embeddings without graph, each with its class; some places may hold none."""

    embedding_RD: Tensor
    class_R: Tensor  # int64
    is_there_R: Tensor  # bool


def joined(parts: list[Rows]) -> Rows:
    """Their rows one after the other."""
    names = ("embedding_RD", "class_R", "is_there_R")
    return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def drawn(*shape: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform in [0, 1), float32, on the device; drawn on the CPU, so that devices do not change a draw."""
    # from pinned memory: any other copy would wait for all that the GPU was given before
    values = torch.rand(shape, generator=generator, pin_memory=device.type == "cuda")
    return values.to(device, non_blocking=True)


def in_groups(group_P: Tensor, groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of the pixels by group, in random order within each: [P]; where each group starts: [groups + 1].

    Args:
        group_P: int64; those of `groups` and above come last.
        generator: see `drawn`.
    """
    drawn_P = drawn(len(group_P), generator=generator, device=group_P.device)
    # both exact: a group is a whole number below 2^24
    key_P, order_P = (group_P.double() + drawn_P.double()).sort(stable=True)
    edges = torch.arange(groups + 1, device=group_P.device, dtype=torch.double)
    return order_P, torch.searchsorted(key_P, edges)


def entry_of_pixels(label_Byx: Tensor, num_classes: int) -> Tensor:
    """Number of each pixel's (image, class), B C for all pixels of IGNORE: int64 [P]."""
    first_B11 = num_classes * torch.arange(len(label_Byx), device=label_Byx.device)[:, None, None]
    return torch.where(label_Byx == IGNORE, num_classes * len(label_Byx), first_B11 + label_Byx).flatten()


def new_regions(embedding_BDyx: Tensor, label_Byx: Tensor, num_classes: int) -> Rows:
    """The mean embedding of each class in each image, normalised after; images in order."""
    is_class_BCP = (
        label_Byx.flatten(1)[:, None] == torch.arange(num_classes, device=label_Byx.device)[:, None]
    ).float()
    sum_BCD = is_class_BCP @ embedding_BDyx.float().flatten(2).mT
    class_BC = torch.arange(num_classes, device=label_Byx.device).expand(len(label_Byx), -1)
    return Rows(F.normalize(sum_BCD, dim=2).flatten(0, 1), class_BC.flatten(), is_class_BCP.any(dim=2).flatten())


def new_pixels(
    embedding_BDyx: Tensor, label_Byx: Tensor, num_classes: int, *, count: int, generator: torch.Generator
) -> Rows:
    """Of each class in each image `count` random pixels, or all if it has fewer; images in order."""
    entries = num_classes * len(label_Byx)
    order_P, start_E = in_groups(entry_of_pixels(label_Byx, num_classes), entries, generator)
    place_EK = start_E[:-1, None] + torch.arange(count, device=label_Byx.device)
    pixel_EK = order_P[place_EK.clamp(max=len(order_P) - 1)]
    class_E = torch.arange(entries, device=label_Byx.device) % num_classes
    return Rows(
        pixels_at(embedding_BDyx, pixel_EK.flatten()).float(),
        class_E.repeat_interleave(count),
        (place_EK < start_E[1:, None]).flatten(),
    )


def pixels_at(embedding_BDyx: Tensor, pixel_N: Tensor) -> Tensor:
    """Embeddings at places of the flat B y x grid: [N, D]."""
    image_N, inside_N = pixel_N // embedding_BDyx[0, 0].numel(), pixel_N % embedding_BDyx[0, 0].numel()
    return embedding_BDyx.flatten(2)[image_N, :, inside_N]


class Ring(nn.Module):
    """For each class the last M rows that were written, float32; its buffers belong to the checkpoint."""

    rows_CMD: Tensor
    next_C: Tensor
    filled_C: Tensor

    def __init__(self, num_classes: int, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows_CMD", torch.zeros(num_classes, rows, width))
        self.register_buffer("next_C", torch.zeros(num_classes, dtype=torch.int64))  # where the next row goes
        self.register_buffer("filled_C", torch.zeros(num_classes, dtype=torch.int64))

    def write(self, rows_ND: Tensor, class_N: Tensor) -> None:
        """Append rows in order; each class's oldest give way. Of more than M of one class the last M remain."""
        rows = self.rows_CMD.shape[1]
        count_C = (class_N[:, None] == torch.arange(len(self.next_C), device=class_N.device)).sum(dim=0)
        order_N = class_N.argsort(stable=True)
        class_N = class_N[order_N]
        number_N = torch.arange(len(class_N), device=class_N.device) - (count_C.cumsum(0) - count_C)[class_N]
        # one row a place: what is written does not depend on an order
        stays_N = (number_N >= count_C[class_N] - rows).nonzero()[:, 0]
        class_N, number_N, order_N = class_N[stays_N], number_N[stays_N], order_N[stays_N]
        self.rows_CMD[class_N, (self.next_C[class_N] + number_N) % rows] = rows_ND[order_N].to(self.rows_CMD)
        self.next_C.copy_((self.next_C + count_C) % rows)
        self.filled_C.copy_((self.filled_C + count_C).clamp(max=rows))

    def read(self, count: int, *, min_filled: int, generator: torch.Generator) -> Rows:
        """Random rows of every class, each at most once, `count` or as many as it has; none below min_filled."""
        classes, rows, _ = self.rows_CMD.shape
        drawn_CM = drawn(classes, rows, generator=generator, device=self.rows_CMD.device)
        is_empty_CM = torch.arange(rows, device=drawn_CM.device) >= self.filled_C[:, None]
        place_CK = drawn_CM.masked_fill(is_empty_CM, 2).argsort(dim=1, stable=True)[:, :count]
        class_C = torch.arange(classes, device=drawn_CM.device)
        is_there_CK = ~is_empty_CM.gather(1, place_CK) & (self.filled_C >= min_filled)[:, None]
        return Rows(
            self.rows_CMD[class_C[:, None], place_CK].flatten(0, 1),
            class_C.repeat_interleave(place_CK.shape[1]),
            is_there_CK.flatten(),
        )


class Memory(nn.Module):
    """Both rings. Rows are kept at the loss of a step, and written after it, on all ranks in the order of ranks."""

    def __init__(
        self, num_classes: int, width: int, *, region_rows: int, pixel_rows: int, pixels_per_image: int
    ) -> None:
        super().__init__()
        self.regions, self.pixels = Ring(num_classes, region_rows, width), Ring(num_classes, pixel_rows, width)
        self.num_classes, self.pixels_per_image = num_classes, pixels_per_image
        self._kept: dict[str, list[Rows]] = {"regions": [], "pixels": []}

    @torch.no_grad()
    def keep(self, embedding_BDyx: Tensor, label_Byx: Tensor, generator: torch.Generator) -> None:
        """Take the new rows of a batch, for `write`."""
        count = self.pixels_per_image
        self._kept["regions"].append(new_regions(embedding_BDyx, label_Byx, self.num_classes))
        self._kept["pixels"].append(
            new_pixels(embedding_BDyx, label_Byx, self.num_classes, count=count, generator=generator)
        )

    @torch.no_grad()
    def write(self) -> None:
        """Write what was kept, on every rank; waits for the device twice a ring, with several ranks more often."""
        for name, parts in self._kept.items():
            rows = joined(parts)
            there_N = rows.is_there_R.nonzero()[:, 0]
            rows_ND, class_N = rows.embedding_RD[there_N], rows.class_R[there_N]
            self.get_submodule(name).write(*of_all_ranks(rows_ND, class_N))  # pyright: ignore[reportCallIssue]
            parts.clear()

    @torch.no_grad()
    def read(self, count: int, *, min_filled: int, generator: torch.Generator) -> Rows:
        """`count` rows of every class and ring, see Ring.read, all in one random order."""
        rings = (self.regions, self.pixels)
        rows = joined([ring.read(count, min_filled=min_filled, generator=generator) for ring in rings])
        order_R = drawn(len(rows.class_R), generator=generator, device=rows.class_R.device).argsort(stable=True)
        return Rows(rows.embedding_RD[order_R], rows.class_R[order_R], rows.is_there_R[order_R])


def of_all_ranks(rows_ND: Tensor, class_N: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes in the order of their ranks; without torch.distributed they are one's own."""
    if not dist.is_initialized():
        return rows_ND, class_N
    count = torch.tensor([len(class_N)], device=class_N.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    most = int(torch.cat(counts).max())
    padding = (0, 0, 0, most - len(class_N))
    padded_NE = F.pad(torch.cat([rows_ND, class_N[:, None].to(rows_ND)], dim=1), padding)  # float32 holds any class
    everyone = [torch.empty_like(padded_NE) for _ in counts]
    dist.all_gather(everyone, padded_NE)
    rows_NE = torch.cat([part[: int(number)] for part, number in zip(everyone, counts, strict=True)])
    return rows_NE[:, :-1], rows_NE[:, -1].long()
