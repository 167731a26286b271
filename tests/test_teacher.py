"""The teacher as judge: the diffusion classifier; a perfect teacher leads a segmenter to the true posterior."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from segadapt.models.combined import Combined
from segadapt.models.generative.candidates import select
from segadapt.models.generative.loss import normalise
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.sd3 import NoisyLatent, add_noise
from segadapt.models.generative.teacher import classify, true_classes
from segadapt.seeds import torch_generator

# K windows   C classes   P (window, class) pairs   z y x latent channels and grid


def test_true_class_is_that_of_the_cell_centre():
    label_Kss = torch.arange(2 * 16 * 16).view(2, 16, 16)
    assert true_classes(label_Kss, 2).tolist() == [[[68, 76], [196, 204]], [[324, 332], [452, 460]]]


def test_classifier_takes_the_smallest_velocity_error_of_each_pixel(build_teacher):
    teacher, draws = build_teacher(), 2
    windows_K3ss = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent_Kzyx = teacher.encode(windows_K3ss)
    error_KCyx = torch.zeros(2, 6, 4, 4)
    generator = torch_generator(3, "classify")
    for _ in range(draws):
        noisy = add_noise(latent_Kzyx, torch.randn(latent_Kzyx.shape, generator=generator), torch.full((2,), 0.3))
        for window, index in itertools.product(range(2), range(6)):
            with torch.no_grad():
                velocity_1zyx = teacher.velocity(noisy, torch.tensor([window]), torch.tensor([index]))
            error_KCyx[window, index] += (velocity_1zyx[0] - noisy.target_Kzyx[window]).square().mean(dim=0)
    for max_pairs in (1, 5, 64):
        got_Kyx = classify(teacher, windows_K3ss, sigma=0.3, seed=3, draws=draws, max_pairs=max_pairs)
        assert torch.equal(got_Kyx, error_KCyx.argmin(dim=1))


class GaussianMixture:
    """The perfect teacher of a known world: given its class, every latent pixel is N(mean of the class, spread^2).

    With x_t = (1 - sigma) x_0 + sigma eps all of it is known in closed form: the posterior of the class, x_0 given
    the class, and so each class's velocity, E[eps - x_0 | x_t, class] = (x_t - E[x_0 | x_t, class]) / sigma.
    The means are orthogonal and of equal length, so that no two classes are more alike than others.
    """

    spread = 0.5

    def __init__(self, num_classes: int, sigma: float):
        self.means_Cz = 1.5 * torch.eye(num_classes, 16, dtype=torch.float64)
        self.sigma = sigma
        self.gain = (1 - sigma) * self.spread**2 / ((1 - sigma) ** 2 * self.spread**2 + sigma**2)
        self.transformer = nn.Identity()
        self.parallel = Parallel([self.transformer], [torch.device("cpu")], parts=1)

    def clean_mean(self, x_t_Pzyx: Tensor, class_P: Tensor) -> Tensor:
        """E[x_0 | x_t, class]: [P, z, y, x]."""
        mean_Pz11 = self.means_Cz[class_P][:, :, None, None]
        return mean_Pz11 + self.gain * (x_t_Pzyx - (1 - self.sigma) * mean_Pz11)

    def velocity(self, noisy: NoisyLatent, pair_window_P: Tensor, pair_class_P: Tensor) -> Tensor:
        x_t_Pzyx = noisy.x_t_Kzyx[pair_window_P]
        return (x_t_Pzyx - self.clean_mean(x_t_Pzyx, pair_class_P)) / self.sigma

    def posterior(self, x_t_zyx: Tensor) -> Tensor:
        """p(class | x_t) of every pixel, all classes being equally frequent: [C, y, x]."""
        variance = (1 - self.sigma) ** 2 * self.spread**2 + self.sigma**2
        distance_Cyx = (x_t_zyx - (1 - self.sigma) * self.means_Cz[:, :, None, None]).square().sum(dim=1)
        return (-distance_Cyx / (2 * variance)).softmax(dim=0)

    def draw(self, classes_Kyx: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 of windows whose classes are known: [K, z, y, x]."""
        mean_Kzyx = self.means_Cz[classes_Kyx].movedim(-1, 1)
        return mean_Kzyx + self.spread * torch.randn(mean_Kzyx.shape, generator=generator, dtype=torch.float64)

    def explain(self, x_t_zyx: Tensor, classes_Kyx: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 drawn from p(x_0 | x_t, class): ways in which the same noisy pixels can have come about."""
        x_t_Kzyx = x_t_zyx.expand(len(classes_Kyx), -1, -1, -1)
        per_class_CKzyx = torch.stack(
            [self.clean_mean(x_t_Kzyx, torch.full((len(x_t_Kzyx),), index)) for index in range(len(self.means_Cz))]
        )
        index_1Kzyx = classes_Kyx[None, :, None].expand(1, -1, 16, -1, -1)
        mean_Kzyx = per_class_CKzyx.gather(0, index_1Kzyx)[0]
        deviation = (self.spread**2 * (1 - self.gain * (1 - self.sigma))) ** 0.5
        return mean_Kzyx + deviation * torch.randn(mean_Kzyx.shape, generator=generator, dtype=torch.float64)


class FreeLogits:
    """A segmenter whose logits are its parameters: what it learns is what the loss wants, pixel by pixel."""

    def __init__(self, logits_1Cyx: Tensor):
        self.net = nn.ParameterDict({"logits": logits_1Cyx.clone()})

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.net.named_parameters())

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        return {}


CLASSES, GRID, SIGMA, DRAWS = 4, 6, 0.55, 64


def learn(compose_settings, world: GaussianMixture, x_t_zyx: Tensor, *, logit_norm: bool, steps: int) -> Tensor:
    """Class weights after some hundred steps on one noisy image whose clean image is drawn anew: [C, y, x]."""
    generator = torch.Generator().manual_seed(1)
    settings = compose_settings(
        "model.update.generative=false",
        f"model.loss.logit_norm={logit_norm}",
        f"model.loss.topk={CLASSES}",
        "model.generative.max_pairs=100",
        "tta.optimizer.lr=0.05",
    )
    segmenter = FreeLogits(torch.randn(1, CLASSES, GRID, GRID, generator=generator, dtype=torch.float64))
    combined = Combined(segmenter, world, settings.model, settings.tta.optimizer, seed=0, precision="fp32")  # type: ignore
    posterior_Cyx = world.posterior(x_t_zyx)
    x_t_Kzyx = x_t_zyx.expand(DRAWS, -1, -1, -1)
    sigma_K = torch.full((DRAWS,), SIGMA, dtype=torch.float64)
    averaged_Cyx, weights_1Cyx = torch.zeros_like(posterior_Cyx), torch.empty(0)
    for step in range(steps):
        classes_Kyx = torch.multinomial(posterior_Cyx.flatten(1).T, DRAWS, replacement=True, generator=generator).T
        x_0_Kzyx = world.explain(x_t_zyx, classes_Kyx.view(DRAWS, GRID, GRID), generator)
        noisy = NoisyLatent(x_t_Kzyx, (x_t_Kzyx - x_0_Kzyx) / SIGMA, sigma_K)
        q_1Cyx = segmenter.net["logits"]
        q_1Cyx = normalise(q_1Cyx) if logit_norm else q_1Cyx
        q_KCyx = q_1Cyx.expand(DRAWS, -1, -1, -1)
        candidates = select(q_KCyx.detach(), topk=CLASSES, classes_threshold=20, generators=[generator] * DRAWS)
        leaf_KCyx = q_KCyx.detach().requires_grad_()
        loss = combined._backward_chunks(leaf_KCyx, noisy, candidates)
        q_KCyx.backward(leaf_KCyx.grad)
        assert combined._update(q_1Cyx[0].detach(), loss, candidates).is_updated
        weights_1Cyx = q_1Cyx.detach().softmax(dim=1)
        if step >= steps // 2:  # averaging the second half removes the noise of the draws
            averaged_Cyx += weights_1Cyx[0] / (steps - steps // 2)
    return averaged_Cyx


@pytest.fixture(scope="module")
def world() -> GaussianMixture:
    return GaussianMixture(CLASSES, SIGMA)


@pytest.fixture(scope="module")
def x_t_zyx(world) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    classes_1yx = torch.randint(CLASSES, (1, GRID, GRID), generator=generator)
    x_0_zyx = world.draw(classes_1yx, generator)[0]
    noise_zyx = torch.randn(x_0_zyx.shape, generator=generator, dtype=torch.float64)
    return (1 - SIGMA) * x_0_zyx + SIGMA * noise_zyx


def test_oracle_world_explains_its_own_noisy_pixels(world):
    """Classes and x_0 drawn forwards and, given x_t, backwards have the same moments: the oracle is no guess."""
    generator = torch.Generator().manual_seed(2)
    classes_Kyx = torch.randint(CLASSES, (1, 60, 60), generator=generator)
    x_0_Kzyx = world.draw(classes_Kyx, generator)
    noise_Kzyx = torch.randn(x_0_Kzyx.shape, generator=generator, dtype=torch.float64)
    noisy = add_noise(x_0_Kzyx, noise_Kzyx, torch.full((1,), SIGMA, dtype=torch.float64))
    posterior_Cyx = world.posterior(noisy.x_t_Kzyx[0])
    for index in range(CLASSES):
        is_class_1yx = classes_Kyx == index
        assert posterior_Cyx[index].mean() == pytest.approx(is_class_1yx.double().mean().item(), abs=0.03)
        assert posterior_Cyx[index][is_class_1yx[0]].mean() > 0.35
    again_Kzyx = world.explain(noisy.x_t_Kzyx[0], classes_Kyx, generator)
    for one, other in ((x_0_Kzyx, again_Kzyx), (x_0_Kzyx * noisy.x_t_Kzyx, again_Kzyx * noisy.x_t_Kzyx)):
        assert one.mean().item() == pytest.approx(other.mean().item(), abs=0.01)
        assert one.var().item() == pytest.approx(other.var().item(), rel=0.03)
    mixture_zyx = sum(
        posterior_Cyx[index] * world.velocity(noisy, torch.tensor([0]), torch.tensor([index]))[0]
        for index in range(CLASSES)
    )
    residual_zyx = noisy.target_Kzyx[0] - mixture_zyx  # nothing about x_t may be left to explain
    assert abs((residual_zyx * noisy.x_t_Kzyx[0]).mean()) < 0.02
    assert abs(residual_zyx.mean()) < 0.02


def test_perfect_teacher_leads_the_segmenter_to_the_posterior(compose_settings, world, x_t_zyx):
    posterior_Cyx = world.posterior(x_t_zyx)
    weights_Cyx = learn(compose_settings, world, x_t_zyx, logit_norm=False, steps=300)
    assert posterior_Cyx.amax(dim=0).min() < 0.3  # there is doubt to be learned, and certainty
    assert posterior_Cyx.amax(dim=0).max() > 0.8
    assert (weights_Cyx - posterior_Cyx).abs().mean() < 0.01  # 0.005 measured
    assert (weights_Cyx - posterior_Cyx).abs().max() < 0.05  # 0.024 measured


def test_perfect_teacher_leads_the_segmenter_to_the_likeliest_class_under_logit_norm(compose_settings, world, x_t_zyx):
    """The weights of unit logits are too flat to be the posterior, but their order is its order."""
    posterior_Cyx = world.posterior(x_t_zyx)
    weights_Cyx = learn(compose_settings, world, x_t_zyx, logit_norm=True, steps=300)
    first_yx, second_yx = posterior_Cyx.topk(2, dim=0).values
    is_clear_yx = first_yx - second_yx > 0.05  # a closer race is decided by the draws
    assert is_clear_yx.double().mean() > 0.8
    assert torch.equal(weights_Cyx.argmax(dim=0)[is_clear_yx], posterior_Cyx.argmax(dim=0)[is_clear_yx])
    assert weights_Cyx.max() < 0.55
