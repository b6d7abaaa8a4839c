"""The moving scenes, their captions, and the measure of their speed."""

import numpy as np
import pytest
import torch

from hasten.models.scenes import classifier, clips, data, motion


def of_every_class(count, seed, **sizes):
    labels = np.arange(count * len(clips.CLASSES)) % len(clips.CLASSES)
    return clips.render(len(labels), seed, labels=labels, **sizes)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not():
    one, again, other = clips.render(6, seed=4), clips.render(6, seed=4), clips.render(6, seed=5)
    assert one.frames.tobytes() == again.frames.tobytes()
    assert np.array_equal(one.labels, again.labels)
    assert one.frames.shape == (6, 8, 3, 32, 32)
    assert (one.frames.dtype, one.labels.dtype) == (np.float32, np.int64)
    assert not np.array_equal(one.frames, other.frames)
    assert np.abs(one.frames).max() <= 1


def test_still_clips_stand_still_and_shapes_stay_in_the_picture():
    made = of_every_class(8, seed=1)
    still = made.labels < len(data.CLASSES)
    changes = np.abs(np.diff(made.frames, axis=1)).max((1, 2, 3, 4))
    assert changes[still].max() == 0
    assert changes[~still].min() > 0.1
    colourful = (np.ptp(made.frames, axis=2) > 0.6).sum((2, 3))
    assert (colourful > 0.75 * colourful.max(1, keepdims=True)).all()


def test_a_wider_picture_and_fewer_frames_show_the_same_speeds():
    made = of_every_class(2, seed=2, frames=5, size=64)
    assert made.frames.shape == (96, 5, 3, 64, 64)
    speed, _ = motion.straight_lines(torch.from_numpy(made.frames))
    wanted = torch.tensor(clips.PIXELS_A_FRAME)[torch.from_numpy(made.labels) // 16]
    torch.testing.assert_close(speed, wanted, rtol=0, atol=0.06)


def test_half_of_the_clips_go_to_the_left_and_none_up_or_down():
    made = clips.render(200, seed=3, labels=np.full(200, 2 * 16 + 5))
    place = motion.centroids(torch.from_numpy(made.frames)) * 32
    across, down = (place[:, -1] - place[:, 0]).T
    assert 80 < (across < 0).sum() < 120
    assert down.abs().max() < 0.05


def test_a_label_is_a_scene_and_a_speed():
    assert len(clips.CLASSES) == clips.NULL_CLASS == 48
    assert (clips.CLASSES[0], clips.CLASSES[16 + 7], clips.CLASSES[47]) == (
        "still red circle",
        "slow yellow square",
        "fast yellow cross",
    )
    made = of_every_class(8, seed=6)
    right = motion.accuracy(classifier.load(), torch.from_numpy(made.frames), torch.from_numpy(made.labels))
    assert (right["colour"], right["speed"]) == (1, 1)
    assert min(right["shape"], right["all"], right["frames"]) > 0.96


def test_captions_spell_shape_colour_and_speed():
    spelled = clips.captions(np.array([16 + 7, clips.NULL_CLASS]))
    assert (spelled.shape, spelled.dtype) == ((2, 3, len(clips.WORDS)), np.float32)
    assert [[clips.WORDS[i] for i in row] for row in spelled.argmax(2)] == [
        ["square", "yellow", "slow"],
        ["nothing"] * 3,
    ]
    assert np.array_equal(np.sort(spelled, axis=2)[..., -2:], np.broadcast_to([0, 1], (2, 3, 2)))
    every = clips.captions(np.arange(49)).reshape(49, -1)
    assert len(np.unique(every, axis=0)) == 49


def square(places, size=32):
    """A clip of a red square of 5 x 5 pixels whose corner is at these pixels."""
    clip = torch.zeros(1, len(places), 3, size, size)
    for frame, (x, y) in zip(clip[0], places, strict=True):
        frame[:, y : y + 5, x : x + 5] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    return clip


def test_centroids_are_where_the_square_is():
    torch.testing.assert_close(
        motion.centroids(square([(3, 10), (20, 7)]))[0] * 32, torch.tensor([[5.5, 12.5], [22.5, 9.5]])
    )
    torch.testing.assert_close(motion.centroids(torch.zeros(1, 2, 3, 32, 32)), torch.full((1, 2, 2), 0.5))


def test_speed_is_that_of_the_line_and_wobble_the_distance_from_it():
    speed, wobble = motion.straight_lines(square([(2 + 3 * i, 1 + 4 * i) for i in range(5)]))
    assert speed.item() == pytest.approx(5, abs=1e-4)
    assert wobble.item() == pytest.approx(0, abs=1e-4)
    # To and fro: no way is made, and every centroid is a pixel off.
    speed, wobble = motion.straight_lines(square([(10, 10), (12, 10), (12, 10), (10, 10)]))
    assert speed.item() == pytest.approx(0, abs=1e-4)
    assert wobble.item() == pytest.approx(1, abs=1e-4)


def test_clips_with_another_motion_or_colour_are_told_apart():
    made = of_every_class(4, seed=8)
    frames, label, judge = torch.from_numpy(made.frames), torch.from_numpy(made.labels), classifier.load()
    faster = motion.accuracy(judge, frames, (label + 16) % 48)
    assert (faster["speed"], faster["all"], faster["colour"]) == (0, 0, 1)
    assert motion.accuracy(judge, frames, label // 4 * 4 + (label + 1) % 4)["colour"] == 0
    assert motion.accuracy(judge, frames, label // 16 * 16 + (label + 4) % 16)["shape"] < 0.03
    right = motion.accuracy(judge, frames, label)
    assert [right[name] for name in clips.SPEEDS] == pytest.approx(clips.PIXELS_A_FRAME, abs=0.02)
    # One frame in eight of another picture: the clip is recognised still, the frames count it.
    frames[:, 3] = frames.roll(1, 0)[:, 3]
    spoilt = motion.accuracy(judge, frames, label)
    assert spoilt["frames"] == pytest.approx(right["frames"] * 7 / 8, abs=0.03)
    assert spoilt["colour"] > 0.95
    assert spoilt["wobble"] > 0.5


def test_message_for_labels_that_do_not_match_the_count():
    with pytest.raises(ValueError, match=r"^render: 3 clips were asked for with 2 labels; give one label a clip$"):
        clips.render(3, 0, labels=np.array([1, 2]))
