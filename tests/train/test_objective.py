"""The objective against formulas written out, for each prediction type, and its random numbers."""

import pytest
import torch
from diffusers import DDPMScheduler

from pipeline.train.objective import denoising_loss, face_weights, noised, predicted_clean, weights
from pipeline.train.settings import ObjectiveSettings
from schemas.arcface import ARCFACE_TEMPLATE
from schemas.errors import ConfigError

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(kind="epsilon", **more):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, **more
    )


def make(kind="epsilon", seed=0, batch=6, more=None, **settings):
    latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    used = scheduler(kind, **(more or {}))
    made = noised(used, latents, ObjectiveSettings(**settings), torch.Generator().manual_seed(seed))
    return used, latents, made


def terms(used, made):
    variance = used.alphas_cumprod[made.timesteps].view(-1, 1, 1, 1)
    return variance.sqrt(), (1 - variance).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_noisy_latents_and_target_follow_the_schedule(kind):
    used, latents, made = make(kind)
    signal, noise = terms(used, made)
    assert torch.allclose(made.noisy_latents, signal * latents + noise * made.noise, atol=1e-6)
    expected = {"epsilon": made.noise, "sample": latents, "v_prediction": signal * made.noise - noise * latents}
    assert torch.allclose(made.target, expected[kind], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_predicts_the_clean_latents(kind):
    used, latents, made = make(kind)
    assert torch.allclose(predicted_clean(used, made.target, made), latents, atol=1e-3)


def test_an_unknown_prediction_type_is_refused():
    used = scheduler()
    used.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match="'flow'"):
        noised(used, torch.zeros(1, 4, 2, 2), ObjectiveSettings(), torch.Generator())


def test_the_same_generator_state_gives_the_same_numbers_and_others_others():
    first, second, other = (make(seed=seed, noise_offset=0.1)[2] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.timesteps, other.timesteps)


def test_timesteps_are_uniform_over_the_whole_schedule():
    latents = torch.zeros(8000, 4, 1, 1)
    drawn = noised(scheduler(), latents, ObjectiveSettings(), torch.Generator().manual_seed(0)).timesteps
    assert drawn.min() < 5
    assert drawn.max() > 994
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert (counts - 800).abs().max() < 150


def test_the_noise_offset_is_constant_over_a_channel_and_as_strong_as_asked():
    latents = torch.zeros(2000, 4, 2, 2)
    plain, offset = (
        noised(scheduler(), latents, ObjectiveSettings(noise_offset=size), torch.Generator().manual_seed(0))
        for size in (0.0, 0.5)
    )
    added = offset.noise - plain.noise
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert added.std() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(offset.noise, offset.target)


def snr_at(used, timesteps):
    variance = used.alphas_cumprod[timesteps]
    return variance / (1 - variance)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_the_clean_loss_by_the_capped_snr(kind):
    used, timesteps = scheduler(kind), torch.arange(0, 1000, 37)
    snr = snr_at(used, timesteps)
    # The squared error of the clean image is the squared error of the target times this:
    clean = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": torch.ones_like(snr)}[kind]
    assert torch.allclose(weights(used, timesteps, 5.0), snr.clamp_max(5.0) * clean, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_terminal_snr_of_zero_gives_finite_weights_and_predictions(kind):
    used, _, made = make(kind, more={"rescale_betas_zero_snr": True})
    made = made._replace(timesteps=torch.full_like(made.timesteps, 999))
    assert used.alphas_cumprod[999] < 1e-6
    last = weights(used, torch.tensor([999, 0]), 5.0)
    assert last[0] == pytest.approx(1.0 if kind == "epsilon" else 0.0, abs=1e-5)
    assert torch.isfinite(last).all()
    assert torch.isfinite(predicted_clean(used, made.noise, made)).all()


def test_gamma_zero_is_the_plain_mean_squared_error():
    used, _, made = make()
    guess = torch.zeros_like(made.target)
    even = weights(used, made.timesteps, 0.0)
    assert torch.equal(even, torch.ones(6))
    assert denoising_loss(guess, made, even) == pytest.approx(made.target.square().mean().item(), rel=1e-6)


def test_a_weight_counts_for_its_own_sample():
    _, _, made = make(batch=2)
    guess = made.target.clone()
    guess[1] += 2.0
    assert denoising_loss(guess, made, torch.tensor([7.0, 0.5])) == pytest.approx(4 * 0.5 / 2, rel=1e-5)


def test_a_face_counts_as_many_times_as_much_and_its_sample_as_much_as_before():
    _, latents, made = make(batch=2)
    # The second face is half out of its picture, and the whole of it, at 8 px per latent, is 64 px wide.
    kps = torch.tensor(ARCFACE_TEMPLATE) / 112 * 32 + torch.tensor([[[16.0, 8.0]], [[48.0, 8.0]]])
    made_weights = face_weights(kps, latents, 5.0)
    assert made_weights.shape == (2, 1, 8, 8)
    assert torch.allclose(made_weights.mean((1, 2, 3)), torch.ones(2))
    for one, columns in zip(made_weights[:, 0], (slice(2, 6), slice(6, 8)), strict=True):
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[1:5, columns] = True
        assert torch.allclose(one[inside], 5 * one[~inside][0])
        assert torch.equal(one == one.max(), inside)
    even = torch.ones(2)
    flat = made.target + 0.5  # wrong by as much everywhere
    assert torch.allclose(denoising_loss(flat, made, even, made_weights), denoising_loss(flat, made, even))
    in_face = made.target + 0.5 * (made_weights == made_weights.amax((2, 3), keepdim=True))
    ratio = denoising_loss(in_face, made, even, made_weights) / denoising_loss(in_face, made, even)
    assert ratio == pytest.approx((16 * 5 / 2 + 8 * 5 / 1.5) / (16 + 8)), "of 16 latents, and of 8"
    assert face_weights(kps, latents, 1.0) is None


def test_a_picture_without_its_face_is_as_before():
    _, latents, _ = make(batch=1)
    kps = torch.tensor(ARCFACE_TEMPLATE)[None] + 500
    assert torch.equal(face_weights(kps, latents, 5.0), torch.ones(1, 1, 8, 8))
