"""ID loss: alignment against insightface's, gradients, what is refused."""

import pickle
import warnings
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from pipeline.shared.bases import find_base
from pipeline.train import id_loss as identity
from pipeline.train.alignment import align, in_face, similarity_transform
from pipeline.train.base_model import Base
from pipeline.train.id_loss import IdLoss, id_loss_of
from pipeline.train.objective import Noised, noised
from pipeline.train.settings import ObjectiveSettings
from schemas.arcface import ARCFACE_TEMPLATE
from schemas.errors import ConfigError, WeightsError

CPU = torch.device("cpu")
TEMPLATE = np.array(ARCFACE_TEMPLATE, np.float32)


def norm_crop(image, kps, size=112):
    from insightface.utils import face_align

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.norm_crop(image, kps, size)


def picture(height=200, width=260, seed=0):
    """A smooth RGB picture without symmetry."""
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def points(scale=1.0, degrees=0.0, at=(120.0, 100.0), jitter=0.0, seed=0):
    """The template scaled, turned and moved so that its centre is `at`, with unlike noise on each point."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved = (TEMPLATE - TEMPLATE.mean(0)) @ turn * scale + at
    return (moved + np.random.default_rng(seed).normal(0, jitter, (5, 2)) if jitter else moved).astype(np.float32)


@pytest.mark.parametrize(
    "kps",
    [
        points(),
        points(0.6, 30),
        points(1.6, -75, jitter=3),
        points(1.0, 180, jitter=5),
        points(1.2, 10, at=(5.0, 190.0)),
    ],
    ids=["straight", "small", "large", "upside-down", "over-the-edge"],
)
def test_alignment_is_insightface_s(kps):
    image = picture()
    ours = ((align(tensor(image), torch.from_numpy(kps)[None])[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    theirs = norm_crop(image, kps).astype(np.float32)
    # cv2 rounds positions to 1/32 pixel and fades its border otherwise.
    assert np.abs(ours - theirs).mean() < 1.0


def test_each_image_of_a_batch_is_aligned_by_its_own_points():
    images = torch.cat([tensor(picture(seed=1)), tensor(picture(seed=2))])
    kps = torch.from_numpy(np.stack([points(0.8, 20), points(1.3, -40)]))
    alone = torch.cat([align(image[None], one[None]) for image, one in zip(images, kps, strict=True)])
    assert torch.allclose(align(images, kps), alone, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=0.1)


def test_the_transform_undoes_what_made_the_points():
    kps = torch.from_numpy(np.stack([points(2.5, 77), points(0.3, -130, at=(7.0, 900.0))]))
    rotation, shift = similarity_transform(kps)
    assert torch.allclose(kps @ rotation + shift, torch.from_numpy(TEMPLATE).expand(2, 5, 2), atol=1e-2)


@pytest.mark.parametrize(("scale", "degrees", "at"), [(1.0, 0, (120, 100)), (0.7, 35, (90, 80)), (2.0, 0, (30, 190))])
def test_the_cells_of_a_face_are_those_whose_middle_norm_crop_shows(scale, degrees, at):
    """A white cell alone on black shows in the aligned face or does not."""
    kps, (height, width), step = points(scale, degrees, at=at), (12, 16), 16
    inside = in_face(torch.from_numpy(kps)[None], (height, width), step)[0]
    seen = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            image = np.zeros((height * step, width * step, 3), np.uint8)
            middle = slice(row * step + 7, row * step + 9), slice(column * step + 7, column * step + 9)
            image[middle] = 255
            seen[row, column] = norm_crop(image, kps).any()
    assert inside.any()
    # A white spot whose middle is just outside has an edge that is seen.
    assert (seen >= inside.numpy()).all()
    assert (seen != inside.numpy()).sum() <= 2


def test_points_that_fell_together_give_numbers():
    assert torch.isfinite(align(tensor(picture()), torch.full((1, 5, 2), 50.0))).all()


@pytest.fixture(scope="module", autouse=True)
def _few_layers():
    """The recogniser with one block of each width; with -m long test_on_a_gpu trains with all 50 layers."""
    from facexlib.recognition.arcface_arch import get_block

    blocks = [get_block(*widths, num_units=1) for widths in ((64, 64), (64, 128), (128, 256), (256, 512))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facexlib.recognition.arcface_arch.get_blocks", lambda layers: blocks)
        yield


@pytest.fixture(scope="module")
def state(_few_layers):
    """A random state dict of the recogniser."""
    from facexlib.recognition.arcface_arch import Backbone

    with torch.device("meta"):
        shapes = Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se").state_dict()
    generator = torch.Generator().manual_seed(0)
    made = {}
    for key, like in shapes.items():
        if not like.is_floating_point():
            made[key] = torch.zeros(like.shape, dtype=like.dtype)
        elif key.endswith("running_var") or like.ndim == 1:
            made[key] = torch.rand(like.shape, generator=generator) * 0.2 + 0.9
        else:
            made[key] = torch.randn(like.shape, generator=generator) / max(like[0].numel(), 1) ** 0.5
    return made


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "recognition_arcface_ir_se50.pth"
    torch.save(state, path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def loss(weights):
    return IdLoss(weights, CPU)


def test_the_same_image_costs_nothing_and_another_something(loss):
    kps = torch.from_numpy(np.stack([points(), points()]))
    images = torch.cat([tensor(picture(seed=1)), tensor(picture(seed=2))])
    same, other = loss(images, kps, images), loss(images, kps, images.flip(0))
    assert same.shape == (2,)
    assert same.abs().max() < 1e-5
    assert other.min() > 1e-4


def test_gradients_reach_the_pixels_of_the_face_and_nothing_else(loss):
    kps = torch.from_numpy(points(0.5, at=(60.0, 60.0)))[None]
    predicted = tensor(picture(seed=1)).requires_grad_()
    target = tensor(picture(seed=2)).requires_grad_()
    loss(predicted, kps, target).sum().backward()
    assert predicted.grad[..., 40:80, 40:80].abs().sum() > 0
    assert predicted.grad[..., 150:, 150:].abs().sum() == 0
    assert target.grad is None
    assert not any(weight.requires_grad for weight in loss._recogniser.parameters())


def test_the_recogniser_sees_bgr_in_float32_even_under_autocast(loss):
    image, kps = tensor(picture()), torch.from_numpy(points())[None]
    expected = loss._recogniser(align(image, kps).flip(1))
    with torch.autocast("cpu", torch.bfloat16):
        embedded = loss.embed(image, kps)
    assert embedded.dtype == torch.float32
    assert torch.equal(embedded, expected)
    assert embedded.norm(dim=1) == pytest.approx(1, abs=1e-5)


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("code in a weights file was run",))


@pytest.fixture(scope="module")
def base():
    return Base(find_base("tiny"), CPU, torch.float32)


def asked(weights, **more):
    return ObjectiveSettings(id_loss=2.0, id_loss_max_t=0.25, id_loss_weights=str(weights), **more)


def step(base, timesteps, seed=0):
    """Latents, what they became at these timesteps, and a batch that knows the points."""
    count = len(timesteps)
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    made = noised(base.scheduler, latents, ObjectiveSettings(), torch.Generator().manual_seed(seed))
    timesteps = torch.tensor(timesteps)
    noisy = base.scheduler.add_noise(latents, made.noise, timesteps)
    kps = torch.from_numpy(np.stack([points(0.35, at=(32.0, 32.0))] * count))
    batch = SimpleNamespace(kps=kps, uncond_image=torch.zeros(count, dtype=torch.bool))
    return latents, made._replace(noisy_latents=noisy, timesteps=timesteps), batch


def some(of, rows):
    """Some samples of such a step."""
    latents, made, batch = of
    few = SimpleNamespace(kps=batch.kps[rows], uncond_image=batch.uncond_image[rows])
    return Noised(*(part[rows] for part in made)), latents[rows], few


def test_the_loss_is_off_unless_it_is_asked_for(base):
    assert id_loss_of(ObjectiveSettings(id_loss_weights="/nowhere.pth"), base) is None


def test_the_loss_needs_weights_and_says_where_they_are(base):
    with pytest.raises(ConfigError, match=r"objective\.id_loss_weights") as told:
        id_loss_of(ObjectiveSettings(id_loss=0.1), base)
    assert identity.WEIGHTS_URL in str(told.value)
    with pytest.raises(WeightsError, match=r"nowhere\.pth does not exist: fetch https.*ir_se50\.pth"):
        id_loss_of(asked("/nowhere.pth"), base)


def test_the_true_noise_predicts_the_same_person_and_other_noise_another(base, weights):
    loss = id_loss_of(asked(weights), base)
    latents, made, batch = step(base, [0, 200])
    assert loss(made.noise, made, latents, batch).abs() < 1e-3
    guess = torch.zeros_like(made.noise).requires_grad_()
    wrong = loss(guess, made, latents, batch)
    assert wrong > 1e-3
    wrong.backward()
    assert guess.grad.flatten(1).abs().sum(1).min() > 0
    assert all(weight.grad is None for weight in base.unet.parameters())


def test_only_samples_of_low_noise_count_and_the_mean_is_over_all(base, weights):
    loss = id_loss_of(asked(weights), base)
    latents, made, batch = step(base, [249, 250, 900])
    guess = torch.zeros_like(made.noise).requires_grad_()
    mixed = loss(guess, made, latents, batch)
    mixed.backward()
    assert [bool(one.abs().sum() > 0) for one in guess.grad] == [True, False, False]
    alone = loss(guess[:1], *some((latents, made, batch), slice(1)))
    assert mixed.item() == pytest.approx(alone.item() / 3, rel=1e-3)
    nothing = loss(guess[1:], *some((latents, made, batch), slice(1, 3)))
    assert nothing.item() == 0


def test_samples_without_a_face_as_their_condition_do_not_count(base, weights):
    """They are there for guidance: what is drawn without a face must not learn one."""
    loss = id_loss_of(asked(weights), base)
    step_of_four = latents, made, batch = step(base, [0, 100, 200, 900])
    batch.uncond_image[[1, 3]] = True
    guess = torch.zeros_like(made.noise).requires_grad_()
    mixed = loss(guess, made, latents, batch)
    mixed.backward()
    assert [bool(one.abs().sum() > 0) for one in guess.grad] == [True, False, True, False]
    with_face = loss(guess[[0, 2]], *some(step_of_four, [0, 2]))
    assert mixed.item() == pytest.approx(with_face.item(), rel=1e-3)
    batch.uncond_image[:] = True
    assert loss(guess, made, latents, batch).item() == 0


def test_files_that_are_no_weights_are_refused(tmp_path, state):
    state = {key: torch.zeros((), dtype=like.dtype).expand(like.shape) for key, like in state.items()}  # small files
    without = {key: value for key, value in state.items() if key != "output_layer.3.bias"}
    wrong = {**state, "output_layer.3.bias": torch.zeros(3)}
    contents = {
        "empty": lambda path: path.write_bytes(b""),
        "noise": lambda path: path.write_bytes(bytes(range(256))),
        "code": lambda path: path.write_bytes(pickle.dumps(Harm(), protocol=2)),
        "list": lambda path: torch.save([1, 2], path),
        "few": lambda path: torch.save({"a": torch.zeros(2)}, path),
        "without": lambda path: torch.save(without, path),
        "wrong": lambda path: torch.save(wrong, path),
    }
    for name, write in contents.items():
        path = tmp_path / f"{name}.pth"
        write(path)
        with pytest.raises(WeightsError, match=f"{name}.pth is not recognition_arcface_ir_se50"):
            IdLoss(path, CPU)
        path.unlink()
