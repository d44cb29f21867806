"""What the module refuses, by the name of the argument: past it nothing is checked any more."""

import re
import threading

import pytest
import torch

DIM, HIDDEN, HEADS = 32, 48, 2
OFFSETS = torch.tensor([0, 3, 5], dtype=torch.int32)


def attention():
    x = {name: torch.ones(5, 2, 8) for name in ("query", "key", "value", "output")}
    return {
        **x, "lse": torch.ones(5, 2), "offsets": OFFSETS, "lengths": None, "key_offsets": None,
        "key_lengths": None, "scale": 1.0, "dropout_p": 0.0, "seed": 0, "first_row": 0,
        "first_key_row": 0, "threads": 1,
    }  # fmt: skip


def attention_grads():
    names = ("grad_output", "grad_query", "grad_key", "grad_value")
    return {**{name: torch.ones(5, 2, 8) for name in names}, **attention()}


def pooling():
    return {
        "values": torch.ones(5, 7), "scores": torch.ones(5), "pooled": torch.ones(2, 7),
        "lse": torch.ones(2), "offsets": OFFSETS, "lengths": None, "threads": 1,
    }  # fmt: skip


def pooling_grads():
    grads = {"grad_pooled": torch.ones(2, 7), "grad_values": torch.ones(5, 7)}
    return {**pooling(), **grads, "grad_scores": torch.ones(5)}


def weights():
    shapes = [(DIM,), (DIM,), (3 * DIM, DIM), (3 * DIM,), (DIM, DIM), (DIM,), (DIM,), (DIM,),
              (HIDDEN, DIM), (HIDDEN,), (DIM, HIDDEN), (DIM,)]  # fmt: skip
    return [torch.ones(shape) for shape in shapes]


def layer():
    widths = (3 * DIM, DIM, HEADS, DIM, HIDDEN)
    return {
        "x": torch.ones(5, DIM), "output": torch.ones(5, DIM),
        "saved": [torch.ones(5, width) for width in widths], "weights": weights(),
        "offsets": OFFSETS, "heads": HEADS, "dropout_p": 0.0, "seed": 0, "first_row": 0,
        "threads": 1,
    }  # fmt: skip


def layer_grads():
    grads = {"grad_output": torch.ones(5, DIM), "grad_x": torch.ones(5, DIM), "grads": weights()}
    return {**{name: x for name, x in layer().items() if name != "output"}, **grads}


CALLS = {
    "attention_forward": attention,
    "attention_backward": attention_grads,
    "pooling_forward": pooling,
    "pooling_backward": pooling_grads,
    "layer_forward": layer,
    "layer_backward": layer_grads,
}
TENSORS = [
    (function, name)
    for function, arguments in CALLS.items()
    for name, value in arguments().items()
    if isinstance(value, torch.Tensor)
]
LISTS = [
    (function, name, place)
    for function, name, places in (
        ("layer_forward", "saved", 5),
        ("layer_forward", "weights", 12),
        ("layer_backward", "saved", 5),
        ("layer_backward", "weights", 12),
        ("layer_backward", "grads", 12),
    )
    for place in range(places)
]


def refused(compiled, function, error, message, **changed):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        getattr(compiled, function)(**{**CALLS[function](), **changed})


@pytest.mark.parametrize("function", CALLS)
def test_what_fits_is_taken(compiled, function):
    assert getattr(compiled, function)(**CALLS[function]()) is None


@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_every_tensor_is_checked(compiled, function, name):
    tensor = CALLS[function]()[name]
    dtype = "int32" if name == "offsets" else "float32"
    wrong = {torch.float64: "float64", torch.bfloat16: "bfloat16", torch.int64: "int64"}
    for kind, shown in wrong.items():
        changed = {name: tensor.to(kind)}
        refused(compiled, function, TypeError, f"{name}: expected {dtype}, got {shown}", **changed)
    refused(compiled, function, TypeError, f"{name}: expected a {dtype} tensor, got list",
            **{name: tensor.tolist()})  # fmt: skip
    refused(compiled, function, ValueError, f"{name}: expected shape", **{name: tensor[None]})
    if name == "offsets":
        return
    # The first tensor is what the others are compared with.
    blamed = {"query": "key", "values": "scores", "x": "offsets"}.get(name, name)
    refused(compiled, function, ValueError, blamed, **{name: tensor[:-1]})


@pytest.mark.parametrize(("function", "name", "place"), LISTS)
def test_every_tensor_of_a_list_is_checked(compiled, function, name, place):
    tensors = CALLS[function]()[name]
    where = f"{name}[{place}]: expected"
    for error, changed in (
        (TypeError, tensors[place].double()),
        (TypeError, "a word"),
        (ValueError, tensors[place][:-1]),
        (ValueError, torch.ones(2, *tensors[place].shape)[:, ::2]),
    ):
        if place == 8 and error is ValueError and changed.dim() == 2 and name == "weights":
            where = "weights[9]: expected"  # its rows are the hidden width
        listed = [*tensors[:place], changed, *tensors[place + 1 :]]
        refused(compiled, function, error, where, **{name: listed})
        where = f"{name}[{place}]: expected"
    refused(compiled, function, ValueError, f"{name}: expected {len(tensors)} tensors, got ",
            **{name: tensors[:-1]})  # fmt: skip
    refused(compiled, function, TypeError, f"{name}: expected a list", **{name: tensors[0]})


def test_strides(compiled):
    spread = torch.ones(5, 2, 16)[..., ::2]
    message = "expected a last dimension of stride 1, got strides (32, 16, 2) for shape (5, 2, 8)"
    for name in ("query", "key", "value", "output"):
        refused(compiled, "attention_forward", ValueError, f"{name}: {message}", **{name: spread})
    message = "lse: expected a contiguous tensor, got strides (1, 5) for shape (5, 2)"
    refused(compiled, "attention_forward", ValueError, message, lse=torch.ones(2, 5).t())
    query, key, value = torch.randn(5, 3, 2, 8).unbind(1)
    compiled.attention_forward(**{**attention(), "query": query, "key": key, "value": value})
    compiled.pooling_forward(**{**pooling(), "scores": torch.ones(5, 4)[:, 1]})


@pytest.mark.parametrize(
    ("function", "message", "changed"),
    [
        ("attention_forward", "threads: expected at least 1, got 0", {"threads": 0}),
        ("attention_forward", "dropout_p: expected a number in [0, 1), got 1", {"dropout_p": 1.0}),
        ("attention_forward", "dropout_p: expected", {"dropout_p": float("nan")}),
        ("attention_forward", "head_dim: expected 1 to 128, got 129",
         {"query": torch.ones(5, 1, 129)}),
        ("attention_forward", "key_lengths: expected None without key_offsets",
         {"key_lengths": OFFSETS[1:]}),
        ("attention_forward", "key_offsets: expected 2 sequences, got 1",
         {"key_offsets": OFFSETS[:2]}),
        ("attention_forward", "offsets: expected at least one element", {"offsets": OFFSETS[:0]}),
        ("layer_forward", "heads: expected at least 1, got 0", {"heads": 0}),
        ("layer_forward", "heads: expected a divisor of the width 32, got 3", {"heads": 3}),
    ],
)  # fmt: skip
def test_numbers(compiled, function, message, changed):
    refused(compiled, function, ValueError, message, **changed)


def test_a_layer_of_a_width_that_is_not_served(compiled):
    narrow = [w[tuple(slice(0, 24 * n // DIM) for n in w.shape)].contiguous() for w in weights()]
    narrow[2], narrow[3] = torch.ones(72, 24), torch.ones(72)
    narrow[8], narrow[9], narrow[10] = torch.ones(48, 24), torch.ones(48), torch.ones(24, 48)
    refused(compiled, "layer_forward", ValueError, "x: expected a width that is a multiple of 16",
            x=torch.ones(5, 24), weights=narrow)  # fmt: skip


def test_a_layer_without_hidden_features(compiled):
    empty = weights()
    empty[8], empty[9], empty[10] = torch.ones(0, DIM), torch.ones(0), torch.ones(DIM, 0)
    refused(compiled, "layer_forward", ValueError, "weights[8]: expected at least one",
            weights=empty)  # fmt: skip


@pytest.mark.parametrize(
    ("offsets", "lengths", "message"),
    [
        ([0, 3, 6], None, "sequence 1 has rows 3 to 6, outside of the 5 that there are"),
        ([-1, 3, 5], None, "sequence 0 has rows -1 to 3, outside"),
        ([0, 3, 2], None, "sequence 1 has rows 3 to 2, outside"),
        ([0, 3, 5], [2, 3], "sequence 1 has rows 3 to 6, outside"),
        ([0, 3, 5], [2, -1], "sequence 1 has rows 3 to 2, outside"),
        ([0, 2147483647, 5], [2, 2147483647], "sequence 1 has rows 2147483647 to 4294967294"),
    ],
)
def test_no_sequence_leaves_the_rows(compiled, offsets, lengths, message):
    changed = {
        "offsets": torch.tensor(offsets, dtype=torch.int32),
        "lengths": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
    }
    for function in ("attention_forward", "pooling_backward"):
        refused(compiled, function, ValueError, f"offsets: {message}", **changed)
    keys = {f"key_{name}": x for name, x in changed.items()}
    refused(compiled, "attention_backward", ValueError, f"key_offsets: {message}", **keys)


def test_lengths_fit_the_offsets(compiled):
    refused(compiled, "pooling_forward", ValueError, "lengths: expected shape (2,), got (3,)",
            lengths=OFFSETS)  # fmt: skip


def test_other_threads_go_on_meanwhile(compiled):
    x, lse = torch.ones(4096, 4, 32), torch.ones(4096, 4)
    offsets = torch.tensor([0, 4096], dtype=torch.int32)
    arguments = {**attention(), **dict.fromkeys(("query", "key", "value"), x)}
    arguments |= {"output": torch.empty_like(x), "lse": lse, "offsets": offsets}
    compiled.select(compiled.runnable()[-1])  # the slowest: tenths of a second
    other = threading.Thread(target=compiled.attention_forward, kwargs=arguments)
    other.start()
    turns = 0
    while other.is_alive():
        other.join(1e-3)
        turns += 1
    assert turns > 5
