"""Steps of the tiny models for tests: several in a row, and one whose teacher decides as told."""

import torch


def random_noise(seed):
    return torch.rand(3, 32, 45, generator=torch.Generator().manual_seed(seed))


def steps(combined, names):
    images = [1 + "abcd".index(name) for name in names]
    return [combined.step(random_noise(seed), task="t", key=str(seed)) for seed in images]


def decide(combined, is_right):
    """The teacher's error is 0 for the segmenter's own top class and 1 for the others, or the other way round."""
    chunks, velocity = combined._backward_chunks, combined.generative.velocity

    def with_truth(leaf_RCyx, noisy, candidates, **more):
        top_Ryx = leaf_RCyx.argmax(dim=1)

        def decided(noisy, pair_row_P, pair_class_P):
            is_top_Pyx = top_Ryx[pair_row_P] == pair_class_P[:, None, None]
            wrong_Pyx = (is_top_Pyx != is_right).float()
            return noisy.target_Kzyx[pair_row_P] + wrong_Pyx[:, None] + 0 * velocity(noisy, pair_row_P, pair_class_P)

        combined.generative.velocity = decided
        taught = chunks(leaf_RCyx, noisy, candidates, **more)
        combined.generative.velocity = velocity
        return taught

    combined._backward_chunks = with_truth
