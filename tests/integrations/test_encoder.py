"""Transformer encoders on fastseq's layer, beside torch's own: its slow path in float64 is the truth."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import needs_native
from torch import Tensor, nn

import fastseq
from fastseq.nn import encoder

PADDED, FULL, WINDOW, CAUSAL = "padding", "src_mask", "window", "is_causal"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each native call of the layer had."""
    counts: list[int] = []
    real = encoder._rows
    monkeypatch.setattr(encoder, "_rows", lambda x, *args, **kwargs: counts.append(len(x)) or real(x, *args, **kwargs))
    return counts


def layer(embed: int = 64, heads: int = 4, width: int = 128, **options: Any) -> nn.TransformerEncoderLayer:
    made = nn.TransformerEncoderLayer(embed, heads, width, **{"batch_first": True, **options}).eval()
    for p in made.parameters():  # no bias and no norm is trivial
        p += 0.1 * torch.randn_like(p)
    return made


def patched(model: nn.Module) -> Any:
    ours = copy.deepcopy(model)
    assert fastseq.patch(ours)
    return ours


def slow(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def truth(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return slow(copy.deepcopy(model).double(), x.double(), **{name: widened(v) for name, v in kwargs.items()})


def same(ours: Tensor, theirs: Tensor, right: Tensor) -> None:
    """ours is at most twice as far from the truth as torch's, but for some roundings of the largest value."""
    assert ours.shape == right.shape
    assert ours.dtype == theirs.dtype
    assert ours.isfinite().all()
    most = 2 * (theirs - right).abs().max() + 8 * torch.finfo(ours.dtype).eps * right.abs().max()
    assert (ours - right).abs().max() <= most


def padding_of(batch: int, steps: int) -> Tensor:
    """Bool: sequences of unlike lengths, the last whole."""
    return torch.arange(steps) >= torch.linspace(steps // 4 + 1, steps, batch).long()[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def masks(draw: random.Random, kinds: str, batch: int, steps: int, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """src_mask, src_key_padding_mask and is_causal of a drawn form; none hides all keys of a row."""
    given: dict[str, Any] = {}
    floating = draw.random() < 0.5
    if PADDED in kinds:
        hidden = padding_of(batch, steps)
        given["src_key_padding_mask"] = additive(hidden, dtype) if floating else hidden
    if FULL in kinds:
        shape = (batch * heads, steps, steps) if draw.random() < 0.5 else (steps, steps)
        hidden = (torch.rand(shape) < 0.4) & ~torch.eye(steps, dtype=torch.bool)
        hidden[..., 0] = False  # which no padding hides either
        given["src_mask"] = additive(hidden, dtype) if floating else hidden
    if CAUSAL in kinds:
        hidden = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        given |= {"src_mask": additive(hidden, dtype) if floating else hidden, "is_causal": True}
    return given


CASES = [
    (seed, kinds) for seed, kinds in enumerate(["", PADDED, FULL, CAUSAL, PADDED + FULL, PADDED + CAUSAL] * 6)
]  # fmt: skip


@pytest.mark.parametrize(("seed", "kinds"), CASES)
def test_evaluation_gives_torchs_values(seed, kinds):
    draw = random.Random(seed)
    dtype = draw.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16])
    embed, width = draw.choice([32, 64, 96, 160, 44]), draw.choice([32, 64, 544, 1120])
    batch_first = draw.random() < 0.7
    batch, steps, heads = draw.choice([1, 3, 5]), draw.choice([9, 67, 130, 257]), draw.choice([1, 2, 4])
    theirs = layer(
        embed, heads, width, batch_first=batch_first, norm_first=draw.random() < 0.5, bias=draw.random() < 0.8,
        activation=draw.choice(["relu", "gelu", nn.ReLU(), nn.GELU(), nn.GELU("tanh")]), dtype=dtype,
        layer_norm_eps=draw.choice([1e-5, 1e-3]),
    )  # fmt: skip
    given = masks(draw, kinds, batch, steps, heads, dtype)
    shape = (batch, steps, embed) if batch_first else (steps, batch, embed)
    x = torch.randn(shape, dtype=dtype)
    same(patched(theirs)(x, **given), slow(theirs, x, **given), truth(theirs, x, **given))


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_instruction_set_gives_torchs_values(isa, activation, norm_first, rows):
    try:
        torch.ops.fastseq.native_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    for embed, width, steps in ((32, 32, 256), (96, 544, 299), (160, 1120, 271)):
        theirs = layer(embed, 2, width, activation=activation, norm_first=norm_first)
        x = 3 * torch.randn(1, steps, embed)
        same(patched(theirs)(x), slow(theirs, x), truth(theirs, x))
    assert rows == [n for n in (256, 299, 271) for _ in range(3)]


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_values_do_not_depend_on_threads_or_neighbours(threads):
    before = torch.get_num_threads()
    ours = patched(layer(64, 4, 600 // 32 * 32, activation="gelu"))
    x = torch.randn(9, 64, 64)
    right = ours(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ours(x), right)
        assert torch.equal(ours(x[2:7]), right[2:7])
    finally:
        torch.set_num_threads(before)


@needs_native
def test_large_small_and_extreme_numbers_keep_their_digits():
    x = torch.randn(300, 64) * torch.logspace(-25, 12, 300)[:, None]
    w = torch.randn(96, 64) * torch.logspace(-3, 3, 96)[:, None]
    right = x.double() @ w.double().T
    y = torch.ops.fastseq.feed_forward(x, w, *[None] * 8, 0.0, 0)
    size = x.double().abs() @ w.double().abs().T
    assert ((y - right).abs() / size).max() < 4 * torch.finfo(torch.float32).eps
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    y = torch.ops.fastseq.feed_forward(x, w, *[None] * 8, 0.0, 0)
    others = torch.ones(300, dtype=torch.bool)
    others[[3, 7]] = False
    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    assert torch.equal(y[others], torch.ops.fastseq.feed_forward(x[others], w, *[None] * 8, 0.0, 0))


@needs_native
def test_gelu_is_torchs_over_its_whole_range():
    x = torch.cat([torch.linspace(-12, 12, 31 * 32 * 9), torch.tensor([-1e30, 1e30] * 16)]).view(-1, 32)
    y = torch.ops.fastseq.feed_forward(x, torch.eye(32), *[None] * 8, 0.0, 2)
    right = nn.functional.gelu(x.double())
    assert ((y - right).abs() / (1e-7 * right.abs() + 1e-8)).max() < 4


@pytest.mark.parametrize("kinds", ["", PADDED + CAUSAL])
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_in_training_are_torchs(kinds, norm_first):
    theirs = layer(dtype=torch.float64, norm_first=norm_first, dropout=0.0).train()
    ours = patched(theirs)
    given = masks(random.Random(1), kinds, 3, 20, 4, torch.float64)
    x = torch.randn(3, 20, 64, dtype=torch.float64)
    found = []
    with torch.enable_grad():
        for model in (ours, theirs):
            own = x.clone().requires_grad_()
            found.append(torch.autograd.grad(model(own, **given).sin().sum(), (own, *model.parameters())))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("steps", [40, 128])
def test_a_position_that_sees_no_key_is_finite_where_torch_gives_nan(steps, batch_first):
    """A window of 3 positions and a sequence padded from position 5 on: position 20 sees none."""
    theirs = layer(batch_first=batch_first)
    at = torch.arange(steps)
    given = {"src_mask": (at[:, None] - at).abs() > 3, "src_key_padding_mask": padding_of(4, steps)}
    given["src_key_padding_mask"][0] = at >= 5
    x = torch.randn(4, steps, 64) if batch_first else torch.randn(steps, 4, 64)
    ours = patched(theirs)(x, **given)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, slow(theirs, x, **given), rtol=1e-5, atol=1e-5)
    assert theirs(x, **given).isnan().any() == batch_first  # torch fuses nothing else


@needs_native
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(64)])
def test_padding_is_skipped_where_torch_skips_it(norm, rows):
    theirs = nn.TransformerEncoder(layer(), 2, norm=norm).eval()
    ours = patched(theirs)
    hidden = padding_of(6, 128)
    x = torch.randn(6, 128, 64)
    y = ours(x, src_key_padding_mask=hidden)
    assert rows == [int((~hidden).sum())] * 6
    right = theirs(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    x[hidden] = torch.nan
    assert torch.equal(ours(x, src_key_padding_mask=hidden), y)
    hidden[2] = True  # a sequence of padding alone
    assert ours(x, src_key_padding_mask=hidden)[[0, 1, 3, 4, 5]].equal(y[[0, 1, 3, 4, 5]])


def test_a_nested_tensor_comes_back_nested():
    theirs = layer()
    parts = [torch.randn(n, 64) for n in (200, 3, 150)]
    x = torch.nested.nested_tensor(parts)
    y = patched(theirs)(x)
    assert y.is_nested
    for mine, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(mine, slow(theirs, part), rtol=1e-5, atol=1e-5)


@needs_native
def test_sizes_are_as_torch_takes_them(rows):
    theirs = layer()
    ours = patched(theirs)
    for shape in ((300, 64), (0, 300, 64), (300, 1, 64), (1, 1, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), slow(theirs, x), rtol=1e-5, atol=1e-5)
    x = torch.randn(64, 5, 80).transpose(0, 2)  # not contiguous
    torch.testing.assert_close(ours(x), slow(theirs, x), rtol=1e-5, atol=1e-5)
    assert rows == [300] * 6 + [400] * 3
    with pytest.raises(Exception, match="65"):
        ours(torch.randn(4, 100, 65))
    with pytest.raises(fastseq.ArgumentError, match="key_padding_mask must be"):
        ours(torch.randn(4, 100, 64), src_key_padding_mask=torch.zeros(4, 99, dtype=torch.bool))


@needs_native
def test_changed_weights_are_seen_at_once():
    theirs = layer()
    ours = patched(theirs)
    x = torch.randn(4, 100, 64)
    ours(x)
    for name in ("self_attn.in_proj_weight", "linear1.weight", "linear2.bias", "norm2.weight"):
        for model in (ours, theirs):
            model.get_parameter(name).data.mul_(1.5)  # tells autograd of nothing
    torch.testing.assert_close(ours(x), slow(theirs, x), rtol=1e-5, atol=2e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(fastseq.nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        o, weights = super().forward(*args, **kwargs)
        return -o, weights


def changes(model: nn.TransformerEncoderLayer, how: str, seen: list) -> None:
    if how == "hook":
        model.linear1.register_forward_hook(lambda module, args, out: seen.append(how) or out * 2)
    elif how == "pre-hook of attention":
        model.self_attn.register_forward_pre_hook(lambda module, args: seen.append(how))
    elif how == "a linear layer of another class":
        model.linear2.__class__ = Doubled
    elif how == "a forward on the instance":
        model.norm1.forward = lambda x: x * 3
    elif how == "an attention layer of another class":
        model.self_attn.__class__ = Negated
    elif how == "another activation":
        model.activation = torch.tanh
    elif how == "dropout that goes on":
        model.dropout1.p = 1.0
        model.dropout1.train()
    elif how == "no norm":
        model.norm2 = nn.Identity()


@pytest.mark.parametrize(
    "how",
    ["hook", "pre-hook of attention", "a linear layer of another class", "a forward on the instance",
     "an attention layer of another class", "another activation", "dropout that goes on", "no norm"],
)  # fmt: skip
def test_what_a_user_changed_inside_takes_part_in_evaluation(how):
    seen: list[str] = []
    ours = patched(layer())
    x = torch.randn(4, 100, 64)
    plain = ours(x)
    changes(ours, how, seen)
    y = ours(x)
    assert ("hook" not in how) == (not seen)
    torch.testing.assert_close(y, slow(ours, x))
    if how != "pre-hook of attention":
        assert not torch.allclose(y, plain, atol=1e-3)


def test_patch_and_unpatch_change_the_class_alone():
    theirs = nn.TransformerEncoder(layer(), 2).eval()
    before = dict(theirs.named_parameters())
    report = fastseq.patch(theirs)
    assert [change.new for change in report.changed] == [
        "fastseq.nn.TransformerEncoderLayer", "fastseq.nn.MultiheadAttention",
    ] * 2  # fmt: skip
    assert not report.notes
    assert isinstance(theirs.layers[0], nn.TransformerEncoderLayer)
    assert all(theirs.get_parameter(name) is p for name, p in before.items())
    assert not fastseq.patch(theirs)
    assert len(fastseq.unpatch(theirs)) == 4
    assert type(theirs.layers[1]) is nn.TransformerEncoderLayer
    assert type(theirs.layers[1].self_attn) is nn.MultiheadAttention


def test_copies_pickles_and_state_dicts_are_torchs():
    theirs = layer(activation="gelu")
    x = torch.randn(4, 100, 64)
    ours = patched(theirs)
    right = ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is fastseq.nn.TransformerEncoderLayer
        assert torch.equal(other(x), right)
    built = fastseq.nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True).eval()
    built.load_state_dict(theirs.state_dict())
    assert torch.equal(built(x), right)
    encoders = nn.TransformerEncoder(built, 2)  # torch's encoder keeps its nested tensors for a layer of ours
    assert encoders.use_nested_tensor


class Named(nn.TransformerEncoderLayer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = "mine"


class Scaled(Named):
    def _ff_block(self, x: Tensor) -> Tensor:
        return 0 * super()._ff_block(x)


def test_a_layer_of_the_users_is_left_alone():
    for cls in (Named, Scaled):
        model = cls(64, 4, 128, batch_first=True).eval()
        report = fastseq.patch(model)
        assert type(model) is cls
        assert "subclass of torch.nn.TransformerEncoderLayer" in report.left[0].reason
        assert "set_fastpath_enabled(False)" in report.notes[0]
    kept = Named(64, 4, 128, batch_first=True).eval()
    x = torch.randn(4, 100, 64)
    right = slow(kept, x)
    fastseq.patch(kept, keep_class=True)
    assert isinstance(kept, Named)
    assert isinstance(kept, fastseq.nn.TransformerEncoderLayer)
    torch.testing.assert_close(kept(x), right, rtol=1e-5, atol=1e-5)
    scaled = Scaled(64, 4, 128, batch_first=True).eval()
    assert "overrides _ff_block" in fastseq.patch(scaled, keep_class=True).left[0].reason


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_and_exported_encoders_give_torchs_values(padded):
    theirs = nn.TransformerEncoder(layer(activation="gelu"), 2).eval()
    ours = patched(theirs)
    x = torch.randn(4, 100, 64)
    given = {"src_key_padding_mask": padding_of(4, 100)} if padded else {}
    kept = ~given["src_key_padding_mask"] if padded else torch.ones(4, 100, dtype=torch.bool)
    right = slow(theirs, x, **given)[kept]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **given)[kept], right, rtol=1e-5, atol=1e-5)
    program = torch.export.export(ours, (x,), given)
    torch.testing.assert_close(program.module()(x, **given)[kept], right, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@needs_native
def test_a_named_backend_autocast_and_transforms_take_the_modules(rows):
    theirs = layer()
    ours = patched(theirs)
    x = torch.randn(4, 100, 64)
    right = slow(theirs, x)
    for name in ("torch", "reference"):
        with fastseq.use_backend(name):
            torch.testing.assert_close(ours(x), right, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), slow(theirs, x), rtol=0.1, atol=0.1)
    mapped = torch.func.vmap(lambda part: ours(part[None])[0])(x)
    torch.testing.assert_close(mapped, right, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        assert ours(x).requires_grad
        gradients = torch.autograd.grad(ours(x).sin().sum(), list(ours.parameters()))
        others = torch.autograd.grad(slow(theirs, x).sin().sum(), list(theirs.parameters()))
        for mine, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        with torch.autograd.forward_ad.dual_level():
            y = ours(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert not rows
    with torch.enable_grad():
        assert not ours.requires_grad_(False)(x).requires_grad  # nothing wants a gradient
    ours(x)
    assert len(rows) == 6


def test_decoders_and_whole_transformers_give_torchs_values():
    theirs = nn.Transformer(64, 4, 2, 2, 128, batch_first=True).eval()
    ours = patched(theirs)
    source, target, hidden = torch.randn(4, 100, 64), torch.randn(4, 80, 64), padding_of(4, 100)
    given = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(80), "tgt_is_causal": True,
        "src_key_padding_mask": hidden, "memory_key_padding_mask": hidden,
    }  # fmt: skip
    torch.testing.assert_close(
        ours(source, target, **given), slow(theirs, source, target, **given), rtol=1e-5, atol=1e-5
    )


@needs_native
def test_the_operator_names_what_does_not_fit():
    x, w = torch.randn(5, 32), torch.randn(64, 32)
    for message, arguments in {
        "w1 must be a matrix whose rows are a multiple of 32": (x, torch.randn(33, 32)),
        "w1": (x, torch.randn(64, 31)),
        "x must be": (torch.randn(5), w),
        "w2": (x, w, None, torch.randn(64, 32)),
        "residual": (x, w, None, None, None, torch.randn(5, 63)),
        "x must be contiguous": (torch.randn(32, 5).T, w),
        "of float32": (x.double(), w),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastseq.feed_forward(*arguments, *[None] * (10 - len(arguments)), 0.0, 0)
    assert torch.ops.fastseq.feed_forward(x[:0], w, *[None] * 8, 0.0, 0).shape == (0, 64)


@needs_native
@pytest.mark.parametrize("features", [1, 5, 16, 33, 100])
def test_the_operator_takes_any_number_of_features(features):
    x, w = torch.randn(300, features), torch.randn(64, features)
    torch.ops.fastseq.feed_forward(torch.full((300, 128), torch.nan), torch.randn(64, 128), *[None] * 8, 0.0, 0)
    y = torch.ops.fastseq.feed_forward(x, w, *[None] * 8, 0.0, 0)  # in memory that held NaN
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-5)
