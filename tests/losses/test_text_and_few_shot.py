"""TextHead and PANet against the formulas with up-sampled features, similarities and logits there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast.losses import TextHead, masked_mean, panet_alignment_loss, panet_logits, panet_loss, panet_prototypes

B, D, K, SMALL, LARGE = 2, 8, 4, (5, 7), (17, 23)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(number=B, high=K):
    found = torch.randint(0, high, (number, *LARGE), generator=torch.Generator().manual_seed(1))
    found[:, 0, :4] = 255
    return found


def up(z):
    return F.interpolate(z, LARGE, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("temperature", (0.07, *TEMPERATURES))
def test_a_text_head_is_the_cosine_and_the_mean_over_all_pixels(temperature, per_image):
    head, y = TextHead(temperature), labels()

    def plain(x, text):
        score = torch.einsum("bdhw,bkd->bkhw", F.normalize(x, dim=1), F.normalize(text.expand(B, K, D), dim=-1))
        return F.cross_entropy(up(score / temperature), y, ignore_index=255, reduction="none").mean()

    text = drawn(B, K, D, seed=2) if per_image else drawn(K, D, seed=2)
    assert_equals(lambda x, text: head.loss(head(x, text), y), plain, x=drawn(B, D, *SMALL), text=text, slack=128)


def test_a_text_head_takes_the_options_of_its_op():
    head, x, text, y = TextHead(), drawn(B, D, *SMALL), drawn(K, D, seed=2), labels()
    labelled = F.cross_entropy(up(head(x, text) / 0.07), y, ignore_index=255)
    torch.testing.assert_close(head.loss(head(x, text), y, denominator="labelled"), labelled, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        TextHead(0)


# ---- PANet -----------------------------------------------------------------------------------------------------------


def written_mean(x, mask):
    return torch.einsum("bdhw,bkhw->bkd", up(x), mask) / (mask.sum((2, 3))[..., None] + 1e-5)


def test_the_masked_mean_is_that_of_the_up_sampled_features():
    masks = (drawn(B, 3, *LARGE, seed=3) > 0).float()
    masks[0, 1] = 0  # empty
    assert_equals(lambda x: masked_mean(x, masks), lambda x: written_mean(x, masks.to(x.dtype)), x=drawn(B, D, *SMALL))
    with pytest.raises(ValueError, match=r"masks \[B, K, H, W\], got \[2, 8, 5, 7\] and \[2, 17, 23\]"):
        masked_mean(drawn(B, D, *SMALL), masks[:, 0])


@pytest.mark.parametrize("scale", [20.0, 1.0, 0.01])
def test_logits_and_loss_are_the_scaled_cosine_up_sampled(scale):
    y = labels()

    def plain(x, p):
        z = scale * F.cosine_similarity(x[:, None], p[None, :, :, None, None], dim=2)
        return F.cross_entropy(up(z), y, ignore_index=255)

    def ours(x, p):
        return panet_loss(panet_logits(x, p, scale=scale), y)

    assert_equals(ours, plain, x=drawn(B, D, *SMALL), p=drawn(K, D, seed=2), slack=64)


def episode(ways=2, shots=2):
    fore = (drawn(ways, shots, *LARGE, seed=4) > 0.5).float()
    back = (drawn(ways, shots, *LARGE, seed=4) < 0).float()
    return drawn(ways, shots, D, *SMALL, seed=5), fore, back


def test_prototypes_are_means_over_shots_with_the_background_first():
    support, fore, back = episode()
    fore_means = [
        torch.stack([written_mean(support[w, [s]], fore[w, [s]][None])[0, 0] for s in range(2)]) for w in range(2)
    ]
    back_means = [
        torch.stack([written_mean(support[w, [s]], back[w, [s]][None])[0, 0] for s in range(2)]) for w in range(2)
    ]
    expected = torch.stack([torch.stack(back_means).mean((0, 1)), *(way.mean(0) for way in fore_means)])
    torch.testing.assert_close(panet_prototypes(support, fore, back), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", [True, False])
def test_alignment_segments_the_support_by_what_the_query_predicts(absent):
    support, fore, back = episode()
    z = drawn(3, 3, *SMALL, seed=7)
    if absent:
        z[:, 2] = -100

    def plain(query, support):
        shown = F.one_hot(z.argmax(1), 3).to(query.dtype)
        prototypes = torch.einsum("nhwk,ndhw->kd", shown, query) / (shown.sum((0, 1, 2))[:, None] + 1e-5)
        total = 0
        for way in range(2):
            if not (z.argmax(1) == way + 1).any():
                continue
            for shot in range(2):
                pair = prototypes[[0, way + 1]]
                logits = 20 * F.cosine_similarity(support[way, shot][None, None], pair[None, :, :, None, None], dim=2)
                y = torch.full(LARGE, 255)
                y[fore[way, shot] == 1] = 1
                y[back[way, shot] == 1] = 0
                total = total + F.cross_entropy(up(logits), y[None], ignore_index=255) / 4
        return total

    assert_equals(
        lambda query, support: panet_alignment_loss(query, z, support, fore, back), plain,
        query=drawn(3, D, *SMALL, seed=6), support=support, slack=64,
    )  # fmt: skip
