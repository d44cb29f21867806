"""`attn_implementation="aam_kernels"` in small random models, against their own eager attention."""

import copy
import importlib.util
import sys

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention

from aam_kernels.integrations import transformers as integration

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "vocab_size": 24, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {}),
    "esm": (
        transformers.EsmForMaskedLM,
        transformers.EsmConfig,
        {"position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": True},
    ),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, {}),
}
TOLERANCES = {torch.float32: (1e-4, 2e-6), torch.float64: (1e-9, 1e-12)}
LENGTH = 11
MASKS = {
    "none": None,
    "full": [[1] * LENGTH] * 3,
    "right": [[1] * 11, [1] * 7 + [0] * 4, [1] + [0] * 10],
    "left": [[0] * 4 + [1] * 7, [1] * 11, [0] * 10 + [1]],
    "both": [[0] * 2 + [1] * 7 + [0] * 2, [1] * 3 + [0] * 8, [0] * 5 + [1] * 6],
    "holes": [[1] * 3 + [0] * 2 + [1] * 4 + [0] * 2, [0, 1] * 5 + [0], [1] * 11],
}


def mask_of(kind):
    return None if MASKS[kind] is None else torch.tensor(MASKS[kind])


def pair(name, dtype=torch.float32, cls=None, **options):
    """The same random model with eager attention and with ours, in evaluation mode."""
    known, config_class, extra = MODELS[name]
    cls = cls or known
    config = config_class(**{**SIZES, **extra, **options})
    eager = cls._from_config(config, attn_implementation="eager", dtype=dtype)
    ours = cls._from_config(copy.deepcopy(config), attn_implementation="aam_kernels", dtype=dtype)
    ours.load_state_dict(eager.state_dict())
    return eager.eval(), ours.eval()


def tokens(rows=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, SIZES["vocab_size"], (rows, LENGTH), generator=generator)


@pytest.fixture(autouse=True)
def _registered():
    integration.register()
    yield
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        interface._global_mapping.pop("aam_kernels", None)


def close(found, expected):
    rtol, atol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_logits_and_all_gradients_equal_eager_at_real_tokens(name, kind, dtype):
    eager, ours = pair(name, dtype)
    mask = mask_of(kind)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    ids = tokens().where(real, 0)
    labels = tokens().flip(1).where(real, -100)
    ids[0, 2:4] = 3  # ESM's mask token
    results = []
    for model in (eager, ours):
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        results.append((output.loss, output.logits[real], model))
    (loss, logits, _), (our_loss, our_logits, _) = results
    close(our_loss, loss)
    close(our_logits, logits)
    seen = 0
    for (label, a), (_, b) in zip(eager.named_parameters(), ours.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), label
        if a.grad is not None:
            close(b.grad, a.grad)
            seen += "attention" in label and bool(a.grad.abs().max() > 1e-6)
    assert seen >= 12  # query, key, value weights and more of both layers


def test_models_without_a_mask_of_tokens_equal_eager():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40,
        image_size=16, patch_size=4, hidden_dropout_prob=0.0,
    )  # fmt: skip
    eager = transformers.ViTModel._from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("aam_kernels")
    assert ours.config._attn_implementation == "aam_kernels"
    pixels = torch.randn(2, 3, 16, 16)
    close(ours(pixels).last_hidden_state, eager(pixels).last_hidden_state)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_padding_is_never_read_and_gives_zero(kind):
    eager, ours = pair("bert")
    mask = mask_of(kind)
    real = mask.bool()
    attended = []
    for layer in ours.bert.encoder.layer:
        layer.attention.self.register_forward_hook(lambda *args: attended.append(args[2][0]))
    embeddings = torch.randn(3, LENGTH, 32)
    expected = eager(inputs_embeds=embeddings, attention_mask=mask).logits[real]
    poisoned = embeddings.masked_fill(~real.unsqueeze(-1), float("nan"))
    close(ours(inputs_embeds=poisoned, attention_mask=mask).logits[real], expected)
    attended.clear()  # torch's flash attention on a CPU gives 0 for a query of NaN
    ours(inputs_embeds=embeddings, attention_mask=mask)
    assert len(attended) == 2
    for output in attended:
        assert (output[~real] == 0).all()
        assert (output[real] != 0).all()


def test_a_row_without_real_tokens_gives_zero_and_leaves_the_others():
    eager, ours = pair("bert")
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1] = 0
    output = ours(input_ids=tokens(), attention_mask=mask).logits
    assert output.isfinite().all()
    rows = [0, 2]
    close(output[rows], eager(input_ids=tokens()[rows]).logits)


def train_step(model, seed, mask):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=tokens(), attention_mask=mask, labels=tokens().flip(1)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_dropout_follows_torchs_seed_also_when_checkpointed():
    _, model = pair("bert", attention_probs_dropout_prob=0.4)
    mask = mask_of("holes")
    still = train_step(model, 1, mask)[0]
    assert still == train_step(model, 2, mask)[0]  # evaluation mode: no dropout
    model.train()
    first = train_step(model, 1, mask)
    assert all(map(torch.equal, first, train_step(model, 1, mask)))
    assert first[0] != train_step(model, 2, mask)[0]
    assert first[0] != still
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = train_step(model, 1, mask)
        assert len(found) == len(first)
        for a, b in zip(found, first, strict=True):
            close(a, b)


def test_dropout_keeps_the_mean():
    module = BertSelfAttention(transformers.BertConfig(**SIZES)).train()
    query, key, value = torch.randn(3, 2, 2, 40, 16).unbind(0)
    whole, _ = integration.attend(module, query, key, value, None)
    draws = [integration.attend(module, query, key, value, None, dropout=0.3)[0] for _ in range(80)]
    spread = (torch.stack(draws).mean(0) - whole).abs().mean()
    assert 0 < spread < 0.2 * (draws[0] - whole).abs().mean()
    assert torch.equal(
        integration.attend(module.eval(), query, key, value, None, dropout=0.3)[0], whole
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    eager, ours = pair("esm")
    mask = mask_of("left")
    expected = eager(input_ids=tokens(), attention_mask=mask).logits[mask.bool()]
    with torch.autocast("cpu", dtype):
        mixed = ours(input_ids=tokens(), attention_mask=mask).logits[mask.bool()]
    halved = ours.to(dtype)(input_ids=tokens(), attention_mask=mask).logits[mask.bool()]
    assert halved.dtype == dtype
    for found in (mixed, halved):
        assert (found.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_mixed_dtypes_are_joined_under_autocast():
    module = BertSelfAttention(transformers.BertConfig(**SIZES))
    x = torch.randn(2, 2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = integration.attend(module, x, x, x.bfloat16(), None)
    assert output.dtype == torch.bfloat16
    assert (output - plain(x, x, x, None)).abs().max() < 0.02


def plain(query, key, value, mask, scale=16**-0.5):
    """(batch, heads, length, dim) softmax attention with a mask of keys -> (batch, length, ...)."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("queries", [LENGTH, 4])
def test_cross_attention_masks_keys_and_serves_every_query(kind, queries):
    module = BertCrossAttention(transformers.BertConfig(**SIZES)).eval()
    query = torch.randn(3, 2, queries, 16)
    key, value = torch.randn(2, 3, 2, LENGTH, 16).unbind(0)
    mask = None if kind == "none" else mask_of(kind).bool()
    output, weights = integration.attend(module, query, key, value, mask, scaling=0.3)
    assert weights is None
    close(output, plain(query, key, value, mask, 0.3))


def test_grouped_key_heads_are_repeated():
    module = BertSelfAttention(transformers.BertConfig(**SIZES))
    query = torch.randn(2, 6, 5, 16)
    key, value = torch.randn(2, 2, 2, 5, 16).unbind(0)
    repeated = (x[:, [0, 0, 0, 1, 1, 1]] for x in (key, value))
    close(integration.attend(module, query, key, value, None)[0], plain(query, *repeated, None))


def test_sequences_packed_into_one_row():
    eager, ours = pair("bert")
    lengths = (5, 1, 8)
    rows = [tokens()[i, :n] for i, n in enumerate(lengths)]
    bounds = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8,
    }  # fmt: skip
    expected = torch.cat([eager(input_ids=row[None]).logits[0] for row in rows])
    close(ours(**packed).logits[0], expected)
    with pytest.raises(ValueError, match="cu_seq_lens_k of the same shape"):
        ours(**{**packed, "cu_seq_lens_k": None})
    with pytest.raises(ValueError, match="no attention_mask"):
        mask = torch.ones(1, 14, dtype=torch.long)
        mask[0, 3] = 0
        ours(**packed, attention_mask=mask)


def test_a_model_compiles_whole():
    eager, ours = pair("bert", cls=transformers.BertModel, num_hidden_layers=1)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    ids, mask = tokens(), mask_of("holes")
    found = compiled(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = eager(input_ids=ids, attention_mask=mask).last_hidden_state
    close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("holes", [True, False])
def test_attention_compiles_with_dynamic_shapes_both_ways(holes):
    module = BertSelfAttention(transformers.BertConfig(**SIZES))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(x, given):
        options = {"mask_function": integration.bidirectional_mask_function, "holes": holes}
        mask = integration.make_mask(*given.shape, attention_mask=given, **options)
        return integration.attend(module, x, 2 * x, 3 * x, mask)[0]

    for kind, rows in (("both", 3), ("left", 2), ("holes", 3)):
        mask = mask_of(kind).bool()[:rows]
        x = torch.randn(rows, 2, LENGTH, 16, dtype=torch.float64, requires_grad=True)
        if kind == "holes" and not holes:
            with pytest.raises(RuntimeError, match="an attention mask has holes"):
                attend(x, mask)
            continue
        expected = plain(x, 2 * x, 3 * x, mask)[mask]
        found = attend(x, mask)[mask]
        close(found, expected)
        weights = torch.randn_like(expected)
        close(*(torch.autograd.grad(y, x, weights)[0] for y in (found, expected)))


def test_a_promise_of_no_holes_is_checked():
    integration.register(holes=False)
    eager, ours = pair("bert")
    for kind in ("right", "left", "full", "none"):
        mask = mask_of(kind)
        found = ours(input_ids=tokens(), attention_mask=mask).logits
        expected = eager(input_ids=tokens(), attention_mask=mask).logits
        real = slice(None) if mask is None else mask.bool()
        close(found[real], expected[real])
    with pytest.raises(ValueError, match=r"row 1 .* has 5 runs .*promised one"):
        ours(input_ids=tokens(), attention_mask=mask_of("holes"))


@pytest.mark.parametrize("kind", ["none", "right"])
def test_no_gpu_is_waited_for_without_holes(kind):
    module = BertSelfAttention(transformers.BertConfig(**SIZES))
    with FakeTensorMode():  # reading a value raises
        x = torch.empty(3, 2, LENGTH, 16, device="cuda")
        given = None if kind == "none" else torch.ones(3, LENGTH, dtype=torch.bool, device="cuda")
        options = {"mask_function": integration.bidirectional_mask_function}
        mask = integration.make_mask(3, LENGTH, attention_mask=given, holes=False, **options)
        output, _ = integration.attend(module, x, x, x, mask)
        assert output.shape == (3, LENGTH, 2, 16)
        if given is not None:
            with pytest.raises(DataDependentOutputException):
                integration.make_mask(3, LENGTH, attention_mask=given, **options)


KEYWORDS = {
    "sliding_window": 4, "softcap": 30.0, "s_aux": torch.zeros(2), "output_attentions": True,
    "position_bias": torch.zeros(1, 2, 5, 5), "head_mask": torch.ones(2), "is_causal": True,
    "scaling": torch.ones(()), "some_new_keyword": 3,
}  # fmt: skip


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_keywords_that_change_attention_are_refused_by_name(keyword):
    module = BertSelfAttention(transformers.BertConfig(**SIZES))
    x = torch.randn(1, 2, 5, 16)
    with pytest.raises(NotImplementedError, match=r'BertSelfAttention; use .*"eager"') as caught:
        integration.attend(module, x, x, x, None, **{keyword: KEYWORDS[keyword]})
    assert keyword in str(caught.value) or keyword == "scaling"
    harmless = {"use_cache": True, "position_ids": torch.arange(5), "sliding_window": None}
    integration.attend(module, x, x, x, None, **harmless)


def test_shapes_and_masks_that_do_not_fit_are_refused():
    module = BertSelfAttention(transformers.BertConfig(**SIZES))
    x, longer = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 9, 16)

    def attend(query, key, mask, value=None):
        integration.attend(module, query, key, key if value is None else value, mask)

    with pytest.raises(NotImplementedError, match=r"key-value cache \(5 queries, 9 keys\)"):
        attend(x, longer, None)
    bias = torch.zeros(2, 1, 5, 5)
    for mask in (bias, bias > 0, torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.int64)):
        with pytest.raises(NotImplementedError, match=r"not a 2-D padding mask .*shape"):
            attend(x, x, mask)
    with pytest.raises(ValueError, match=r"for \(2, 4\) slots, but the keys .* are \(2, 5\)"):
        attend(x, x, torch.tensor([[True] * 3 + [False]] * 2))
    with pytest.raises(ValueError, match="a divisor of its heads"):
        attend(x.repeat(1, 2, 1, 1), torch.randn(2, 3, 5, 16), None)
    with pytest.raises(ValueError, match="must share one shape"):
        attend(x, x, None, torch.randn(2, 2, 5, 8))
    with pytest.raises(ValueError, match="head_dim 16, got 8"):
        attend(x, x[..., :8], None)
    with pytest.raises(TypeError, match=r"key is torch\.float64"):
        attend(x, x.double(), None)


def test_models_with_other_patterns_are_refused():
    config = transformers.BertConfig(**SIZES, is_decoder=True)
    decoder = transformers.BertLMHeadModel._from_config(config, attn_implementation="aam_kernels")
    with pytest.raises(NotImplementedError, match="causal attention"):
        decoder(input_ids=tokens())
    config = transformers.ModernBertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        vocab_size=24, pad_token_id=0, local_attention=4,
    )  # fmt: skip
    modern = transformers.ModernBertModel._from_config(config, attn_implementation="aam_kernels")
    with pytest.raises(NotImplementedError, match="a sliding window or another pattern"):
        modern(input_ids=tokens())
    _, bert = pair("bert")
    with pytest.raises(NotImplementedError, match="not a 2-D padding mask"):
        bert(input_ids=tokens(), attention_mask=torch.zeros(3, 1, LENGTH, LENGTH))
    with pytest.raises(NotImplementedError, match="returning attention weights"):
        bert(input_ids=tokens(), output_attentions=True)
    with pytest.raises(ValueError, match=r"must be \(3, 8\).*got \(2, 8\)"):
        bert(input_ids=tokens()[:, :8], attention_mask=torch.ones(2, 8))


@pytest.mark.parametrize(
    "options",
    [{"kv_offset": 2}, {"q_offset": 3}, {"allow_is_bidirectional_skip": False}],
    ids=["keys", "queries", "own"],
)
def test_mask_requests_beyond_padding_are_refused(options):
    given = {"mask_function": integration.bidirectional_mask_function, **options}
    with pytest.raises(NotImplementedError, match=r"cache|itself"):
        integration.make_mask(1, 4, **given)


def test_a_model_that_computes_with_the_mask_fails_loudly():
    options = {"mask_function": integration.bidirectional_mask_function}
    mask = integration.make_mask(1, 4, attention_mask=torch.tensor([[1, 1, 1, 0]]), **options)
    scores = torch.zeros(4, 4)
    for use in (
        lambda: scores + mask,
        lambda: scores.add_(mask),
        lambda: torch.where(mask, scores, 0.0),
    ):
        with pytest.raises(NotImplementedError, match="computes with its attention mask"):
            use()
    for use in (lambda: mask[:, None], lambda: 1.0 - mask):
        with pytest.raises(TypeError):
            use()
    with pytest.raises(TypeError):
        mask.to(torch.float32)


def fresh_import():
    """Runs the module's source again, as a first import would."""
    spec = importlib.util.spec_from_file_location("fresh_integration", integration.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fresh_integration"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["fresh_integration"]
    return module


def test_importing_registers_nothing_and_register_checks_its_options():
    interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    for interface in interfaces:
        interface._global_mapping.pop("aam_kernels")
    module = fresh_import()
    with pytest.raises(ValueError, match="impl"):
        module.register(impl="fast")
    assert not any("aam_kernels" in interface._global_mapping for interface in interfaces)
    module.register(impl="triton")
    assert all("aam_kernels" in interface._global_mapping for interface in interfaces)
    _, model = pair("bert")
    with pytest.raises(ValueError, match=r"impl='triton' is not available"):
        model(input_ids=tokens())


def test_a_missing_or_old_transformers_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"needs transformers 5.0 or newer, got 4.57.6"):
        fresh_import()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"needs transformers 5.0 or newer: pip install"
    ) as caught:
        fresh_import()
    assert "\n" not in str(caught.value)
