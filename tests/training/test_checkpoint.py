"""Files that survive a full disk, models that describe themselves, encoders that are loaded."""

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from aam.errors import InputError
from aam.model import CommunityEncoder, Predictor
from aam.model.encoder import EncoderShape
from aam.model.predictor import PredictorShape
from aam.training import checkpoint
from aam.training.checkpoint import (
    load_encoder,
    load_model,
    load_state,
    read_model,
    save_model,
    save_state,
    write_text,
)
from aam.training.runs import write_table

STATE = {"format": checkpoint.FORMAT, "objective": {"w": torch.arange(3.0)}}
SHAPE = EncoderShape(32, 2, 1)


def full(*_args, **_keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS = {
    "checkpoint": lambda path: save_state(path, STATE),
    "model": lambda path: save_model(path, CommunityEncoder(SHAPE), {"data": {}}),
    "text": lambda path: write_text(path, "new\n"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fails", ["os.fsync", "os.replace", "pathlib.Path.write_bytes"])
def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch, writer, fails):
    if writer == "text" and fails.startswith("pathlib"):
        fails = "pathlib.Path.write_text"
    path = tmp_path / "file"
    path.write_text("before")
    monkeypatch.setattr(fails, full)
    with pytest.raises(InputError) as caught:
        WRITERS[writer](path)
    assert str(caught.value) == (
        f"{path}: cannot be written (No space left on device); the previous file is kept"
    )
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def limited(bytes_most):
    """Make every file that grows beyond a size fail, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_most, bytes_most))


@pytest.mark.parametrize("board", ["--no-tensorboard", "--tensorboard"])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(aam, community, tmp_path, board):
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 4, "--max-steps", 5, "--output-dir", run) == 0
    before = (run / "checkpoints" / "last.pt").read_bytes()
    words = ["pretrain", "--resume-from", str(run), "--max-steps", "10", board]
    result = subprocess.run(
        [sys.executable, "-m", "aam.train", *words],
        capture_output=True, text=True, preexec_fn=limited(len(before) // 2),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "cannot be written" in errors[0]
    assert "Traceback" not in result.stderr
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    assert not list(run.rglob(".*"))
    assert aam("pretrain", "--resume-from", run, "--max-steps", 10, files=False) == 0


def test_a_model_is_its_file_alone(tmp_path):
    torch.manual_seed(0)
    model = Predictor(
        CommunityEncoder(EncoderShape(32, 2, 1, count_embedding="film")),
        PredictorShape(outputs=3, category_sizes=(2, 4), target_head="mlp", predict_counts=True),
    )
    save_model(tmp_path / "model.safetensors", model, {"categories": {"sex": ["f", "m"]}})
    again, described = load_model(tmp_path)
    assert described["categories"] == {"sex": ["f", "m"]}
    assert again.shape == model.shape and again.encoder.shape == model.encoder.shape
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_an_encoder_is_loaded_and_what_happened_is_told(tmp_path):
    torch.manual_seed(0)
    source = CommunityEncoder(SHAPE)
    save_model(tmp_path / "model.safetensors", source, {})
    target = CommunityEncoder(EncoderShape(32, 2, 1, sample_position="slot"))
    rows = load_encoder(target, tmp_path)
    assert {(part, what) for part, what, _ in rows} == {
        ("asv_encoder", "loaded"), ("sample_encoder", "loaded"), ("unifrac_encoder", "loaded"),
        ("sample_encoder", "new"),
    }  # fmt: skip
    new = next(size for part, what, size in rows if what == "new")
    assert new == (1024 + 5) * 32
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    with pytest.raises(InputError, match=r"has shape .* this model needs"):
        load_encoder(CommunityEncoder(EncoderShape(64, 2, 1)), tmp_path)


def test_the_encoder_of_a_fine_tuned_model_is_loaded_too(tmp_path):
    model = Predictor(CommunityEncoder(SHAPE), PredictorShape())
    save_model(tmp_path / "model.safetensors", model, {})
    target = CommunityEncoder(SHAPE)
    assert {what for _, what, _ in load_encoder(target, tmp_path)} == {"loaded"}
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_a_truncated_model_gives_one_line(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_model(path, CommunityEncoder(SHAPE), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="truncated or not a model") as caught:
        read_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text\nof lines", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_gives_one_line(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="checkpoint") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_tables_hold_cells_as_they_are(tmp_path):
    write_table(tmp_path / "t.tsv", ["sample-id", 'probability_"a,b"'], [["x 'y'", '"'], [1, ""]])
    assert (tmp_path / "t.tsv").read_text() == ('sample-id\tprobability_"a,b"\nx \'y\'\t"\n1\t\n')
    for broken in ("a\tb", "a\nb", "a\rb"):
        with pytest.raises(InputError, match="has a tab or a line break"):
            write_table(tmp_path / "u.tsv", ["id"], [[broken]])
    assert not (tmp_path / "u.tsv").exists()
