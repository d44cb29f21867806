"""Files that survive a full disk, models that describe themselves, encoders that are loaded."""

import errno
import os
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from aam.errors import InputError
from aam.files import write_table, write_text
from aam.learning import model_file
from aam.learning.checkpoint import load_state, save_state
from aam.learning.model_file import load_encoder, read_model, save_model
from aam.model import AsvEncoder, EncoderShape, Predictor, PretrainedModel
from aam.model.predictor import PredictorShape

STATE = {"format": model_file.FORMAT, "objective": {"w": torch.arange(3.0)}}
SHAPE = EncoderShape(embedding_dim=32, wide_dim=24, num_heads=2, num_layers=1)
WIDE = replace(SHAPE, encoder="wide")


def full(*_args, **_keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS = {
    "checkpoint": lambda path: save_state(path, STATE),
    "model": lambda path: save_model(path, PretrainedModel(AsvEncoder(SHAPE)), {"data": {}}),
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


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(aam, tmp_path):
    run = tmp_path / "run"
    assert aam("pretrain", "--epochs", 4, "--max-steps", 5, "--output-dir", run) == 0
    before = (run / "checkpoints" / "last.pt").read_bytes()
    words = ["pretrain", "--resume-from", str(run), "--max-steps", "10", "--tensorboard"]
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


MODELS = {
    "clades": lambda: PretrainedModel(AsvEncoder(SHAPE), clades=7),
    "pairs": lambda: PretrainedModel(AsvEncoder(WIDE), free_clades=5, abundance=True),
    "nucleotides": lambda: PretrainedModel(AsvEncoder(SHAPE)),
    "predictor": lambda: Predictor(
        AsvEncoder(SHAPE),
        PredictorShape(outputs=3, count_embedding="add", category_sizes=(2, 4),
                       target_head="mlp", predict_counts=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_file_alone(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "pairs":
        model.pairs.unit.fill_(2.5)
    if name == "predictor":
        model.sample_encoder.standardise_by(torch.randn(9, 32), torch.ones(9))
    arrays = {
        "known.bases": np.frombuffer(b"ACGT", dtype=np.uint8),
        "tree.length": np.arange(5.0)[::2],
        "empty": np.empty((0, 3), dtype=np.float32),
        "stops": np.array([1, 1 << 40]),
    }
    description = {"categories": {"sex": ["f", "m"]}}
    save_model(tmp_path / "model.safetensors", model, description, arrays)
    saved = read_model(tmp_path)
    assert saved.description["categories"] == {"sex": ["f", "m"]}
    assert saved.arrays.keys() == arrays.keys()
    for key, values in arrays.items():
        assert saved.arrays[key].dtype == values.dtype
        np.testing.assert_array_equal(saved.arrays[key], values)
    again = saved.build()
    assert type(again) is type(model) and again.encoder.shape == model.encoder.shape
    assert not again.training
    own = again.state_dict()
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    if name == "predictor":
        assert again.shape == model.shape
        assert {"sample_encoder.mean", "sample_encoder.spread"} <= own.keys()
    elif name == "pairs":
        assert again.pairs.abundance and own["pairs.unit"] == 2.5


def test_files_of_another_version_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "FORMAT", 1)
    save_model(tmp_path / "model.safetensors", MODELS["clades"](), {})
    save_state(tmp_path / "last.pt", {**STATE, "format": 1})
    monkeypatch.undo()
    for read, path in ((read_model, "model.safetensors"), (load_state, "last.pt")):
        with pytest.raises(InputError, match="of this version of aam") as caught:
            read(tmp_path / path)
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_the_encoder_of_any_model_is_loaded_and_what_happened_is_told(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    save_model(tmp_path / "model.safetensors", model, {})
    target = AsvEncoder(SHAPE)
    rows = load_encoder(target, tmp_path)
    done = {(part, what) for part, what, _ in rows}
    kind = "new" if name == "pairs" else "loaded"
    assert {("wide", "loaded"), ("stack", kind), ("gate", kind)} <= done
    skipped = {"clades": {"clades"}, "pairs": {"pairs"}, "nucleotides": set()}
    if name in skipped:
        assert {part for part, what in done if what == "skipped"} == skipped[name]
    stack = sum(one.numel() for one in target.stack.parameters())
    assert next(size for part, _, size in rows if part == "stack") == stack
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_an_encoder_of_another_width_is_refused(tmp_path):
    save_model(tmp_path / "model.safetensors", MODELS["clades"](), {})
    with pytest.raises(InputError, match=r"has shape .* this model needs"):
        load_encoder(AsvEncoder(replace(SHAPE, embedding_dim=64)), tmp_path)


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path):
    save_model(tmp_path / "model.safetensors", MODELS["clades"](), {"pretrained": {"clades": 8}})
    saved = read_model(tmp_path)
    saved.weights.pop("clades.bias")
    with pytest.raises(InputError, match="do not fit the model's description"):
        saved.build()


@pytest.mark.parametrize("kept", [0, 4, 100, 2000, -1])
def test_a_truncated_model_gives_one_line(tmp_path, kept):
    path = tmp_path / "model.safetensors"
    save_model(path, MODELS["clades"](), {})
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
