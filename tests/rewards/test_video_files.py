"""Real files: what is read is what is in them, whatever the container; what is broken is named."""

from fractions import Fraction

import av
import numpy as np
import pytest
from video_makers import encode, encode_tagged, encode_turned, numbered, read_numbers

from kvpo.rewards.video_files import probe, read_frames

ANY_SIZE = 10**9


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "libx264", "yuv422p"),
        ("a.mkv", "libx265", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("ten_bits.mp4", "libx265", "yuv420p10le"),
        ("ten_bits.mov", "prores_ks", "yuv422p10le"),
        ("alpha.mov", "qtrle", "argb"),
        ("alpha.apng", "apng", "rgba"),
        ("lossless.mkv", "ffv1", "yuv444p"),
        ("frames.mkv", "mjpeg", "yuvj420p"),
    ],
)
def test_usual_containers_and_pixel_formats(tmp_path, name, codec, pixel_format):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    frames = numbered(20)
    if name.startswith("alpha"):
        frames = np.concatenate([frames, np.full((*frames.shape[:3], 1), 255, np.uint8)], -1)
    rate = 20 if codec == "gif" else 16
    video = probe(encode(tmp_path / name, frames, codec, pixel_format, rate))
    assert (video.num_frames, round(video.frame_rate, 2)) == (20, rate)
    found = read_frames(video, [0, 3, 4, 11, 19], ANY_SIZE)
    assert found.shape == (5, 48, 64, 3) and found.dtype == np.uint8
    slack = 8 if codec == "gif" else 1
    assert np.abs(np.array(read_numbers(found)) - [0, 3, 4, 11, 19]).max() <= slack


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mpg", "mpeg2video"),  # cannot be entered at a key frame exactly
        ("a.ts", "libx264"),
        ("a.flv", "flv1"),
        ("a.wmv", "wmv2"),
        ("a.3gp", "libx264"),
        ("a.y4m", "rawvideo"),
        ("a.m4v", "mpeg4"),
    ],
)
def test_distant_frames_of_older_containers(tmp_path, name, codec):
    video = probe(encode(tmp_path / name, numbered(60), codec, rate=25))
    assert (video.num_frames, round(video.frame_rate, 2)) == (60, 25)
    wanted = [2, 19, 40, 58, 59]
    found = read_numbers(read_frames(video, wanted, ANY_SIZE))
    assert np.abs(np.array(found) - wanted).max() <= 1


def test_transparent_pixels_are_black(tmp_path):
    frames = np.full((4, 32, 32, 4), 200, np.uint8)
    frames[..., 3] = 255
    frames[:, :, :16, 3] = 0
    found = read_frames(probe(encode(tmp_path / "a.mov", frames, "qtrle", "argb")), [0, 3], ANY_SIZE)
    assert (found[:, :, :16] == 0).all() and (found[:, :, 16:] == 200).all()


def test_transparency_that_lies_beside_the_picture(tmp_path):
    frames = np.concatenate([numbered(20), np.full((20, 48, 64, 1), 255, np.uint8)], -1)
    frames[:, :, :32, 3] = 0
    path = encode(tmp_path / "a.webm", frames, "libvpx-vp9", "yuva420p", g="5")
    for indices in ([0, 7, 19], [13]):
        found = read_frames(probe(path), indices, ANY_SIZE)
        assert (found[:, :, :28] == 0).all()
        assert np.abs(np.array(read_numbers(found[:, :, 36:])) - indices).max() <= 1


CORNERS = np.zeros((3, 32, 48, 3), np.uint8)
CORNERS[:, :16, :24], CORNERS[:, 16:, :24], CORNERS[:, :16, 24:] = (240, 0, 0), (0, 240, 0), (0, 0, 240)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_frames_stand_as_the_header_says(tmp_path, turns, mirrored):
    path = encode_turned(tmp_path / "a.mp4", CORNERS, 90 * turns, mirrored)
    found = read_frames(probe(path), [0, 2], ANY_SIZE)[0].astype(int)
    expected = np.rot90(CORNERS[0], turns)
    expected = expected[:, ::-1] if mirrored else expected
    assert found.shape == expected.shape and np.abs(found - expected).max() < 30


def test_other_rotations_are_refused(tmp_path):
    path = encode_turned(tmp_path / "a.mp4", CORNERS, 37, False)
    with pytest.raises(ValueError, match="turns it by 3[67] degrees; only quarter turns"):
        read_frames(probe(path), [0], ANY_SIZE)


def test_pixels_that_are_not_square(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(3), aspect=Fraction(16, 11))
    assert read_frames(probe(path), [0], ANY_SIZE).shape == (1, 48, 93, 3)
    path = encode(tmp_path / "a.mp4", numbered(3), aspect=Fraction(1, 40))
    with pytest.raises(ValueError, match="pixels are 1/40 times as wide as they are high"):
        read_frames(probe(path), [0], ANY_SIZE)


@pytest.mark.parametrize(
    ("transfer", "signal", "grey"),
    [
        (16, 0.5807, 255),  # PQ: reference white, 203 cd/m2
        (16, 0.9, 255),  # a highlight
        (16, 0.4401, 143.1),  # a quarter of it: 255 (1/4)^(1/2.4)
        (16, 0.0, 0),
        (18, 0.75, 255),  # HLG: reference white
        (18, 0.5, 143.1),  # 1/12 of the scene's light: 1000 / 12^1.2 cd/m2
        (14, 0.5, 127.5),  # BT.2020 in standard range
    ],
)
def test_high_dynamic_range_is_converted(tmp_path, transfer, signal, grey):
    planes = np.full((48, 32), 512, np.uint16)
    planes[:32] = round(64 + 876 * signal)
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p10le")
    path = encode_tagged(tmp_path / "a.mkv", frame, transfer, 9)
    found = read_frames(probe(path), [0], ANY_SIZE)
    assert np.abs(found.astype(float) - grey).max() <= 2


def test_wide_colours_become_those_of_an_ordinary_display(tmp_path):
    """The red of BT.709 in BT.2020: linear (0.6274, 0.0691, 0.0164), ITU-R BT.2087."""
    red = (np.array([0.6274, 0.0691, 0.0164]) ** (1 / 2.4) * 65535).round().astype(np.uint16)
    image = av.VideoFrame.from_ndarray(np.tile(red, (32, 32, 1)), format="rgb48le")
    path = encode_tagged(tmp_path / "a.mkv", image.reformat(format="yuv444p10le", dst_colorspace=9), 14, 9)
    assert np.abs(read_frames(probe(path), [0], ANY_SIZE)[0] - [255.0, 0, 0]).max() <= 12


def test_variable_frame_rate(tmp_path):
    times = [0, 40, 80, 300, 340, 700, 740, 780]
    video = probe(encode(tmp_path / "vfr.mp4", numbered(8), times=times))
    assert video.num_frames == 8 and video.frame_rate == pytest.approx(7 / 0.78, rel=0.02)
    assert read_numbers(read_frames(video, [2, 3, 5, 7], ANY_SIZE)) == [2, 3, 5, 7]


def test_one_frame_and_odd_sizes(tmp_path):
    single = probe(encode(tmp_path / "one.mp4", numbered(1)))
    assert single.num_frames == 1 and read_frames(single, [0], ANY_SIZE).shape == (1, 48, 64, 3)
    odd = probe(encode(tmp_path / "odd.mkv", numbered(3, 33, 47), "ffv1", "yuv444p"))
    assert read_frames(odd, [0, 2], ANY_SIZE).shape == (2, 33, 47, 3)
    tiny = probe(encode(tmp_path / "tiny.mp4", numbered(3, 2, 2)))
    assert read_frames(tiny, [1], ANY_SIZE).shape == (1, 2, 2, 3)


def test_distant_frames_are_reached_by_jumping(tmp_path, monkeypatch):
    path = encode(tmp_path / "long.mp4", numbered(600, 32, 32), g="20", bf="2")
    video = probe(path)
    assert video.num_frames == 600 and len(video.key_times) >= 30
    decoded = []
    import kvpo.rewards.video_files as module

    real = module.av.open

    class Counting:
        def __init__(self, *arguments):
            self.container = real(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            self.container.close()

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    monkeypatch.setattr(module.av, "open", Counting)
    wanted = [5, 6, 205, 206, 207, 430, 599]
    assert read_numbers(read_frames(video, wanted, ANY_SIZE)) == [n % 60 for n in wanted]
    assert len(decoded) < 120


def test_large_frames_are_shrunk_on_reading(tmp_path):
    video = probe(encode(tmp_path / "large.mp4", numbered(4, 240, 320)))
    found = read_frames(video, [1, 2], 80 * 60)
    assert found.shape == (2, 60, 80, 3) and read_numbers(found) == [1, 2]


def test_what_cannot_be_read_is_named(tmp_path):
    good = encode(tmp_path / "good.mp4", numbered(40), g="5").read_bytes()
    cases = {
        "empty.mp4": (b"", "the file is empty"),
        "text.mp4": (b"not a video at all\n" * 50, "not a readable video"),
        "cut.mp4": (good[: len(good) // 3], "not a readable video"),
        "noise.webm": (np.random.default_rng(0).bytes(5000), "not a readable video"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            probe(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="not a readable video: No such file"):
        probe(tmp_path / "absent.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no video in it"):
        probe(tmp_path / "sound.wav")


def test_data_damaged_in_the_middle_is_read_or_named(tmp_path):
    path = encode(tmp_path / "webm.webm", numbered(60), "libvpx-vp9", g="5")
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(1)
    for position in generator.integers(len(content) // 4, len(content), 400):
        content[position] = generator.integers(256)
    path.write_bytes(content)
    try:
        video = probe(path)
        frames = read_frames(video, list(range(0, video.num_frames, 5)), ANY_SIZE)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert frames.shape[1:] == (48, 64, 3)
