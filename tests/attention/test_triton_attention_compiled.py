"""The Triton attention compiled ahead of time: every tile of the tables, without spills, its loops on tensor cores.

On Hopper, where the tiles were measured, the fastest ones spill a little around their loops: never within.

A line of CASES is a set of features with the same code; the numbers are in test_triton_attention_interpreted.py.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from attention_operators import Options
from fastseq.kernels.attention import tuning as tuning_attention
from triton_attention_support import Plan, compile_plan, loops, plans, variant
from triton_support import NVIDIA, Compiled, needs_compiler

pytestmark = needs_compiler

HALF = torch.bfloat16
WIDTHS = {64: (64, 64), 128: (128, 128), 192: (192, 128), 256: (256, 256), 512: (512, 512)}


def case(name: str, dtype: torch.dtype = HALF) -> Options:
    batch, heads, length = 2, 4, 256
    lengths = torch.empty(batch, dtype=torch.int64)
    by_pair: Options = {
        "bias": torch.empty(batch, heads, length, length, dtype=dtype),
        "mask": torch.empty(batch, heads, length, length, dtype=torch.bool),
    }
    options: dict[str, Options] = {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window_left": 100, "sinks": torch.empty(heads, dtype=dtype)},
        "packed": {"causal": True, **{f"cu_seqlens_{x}": torch.empty(batch + 1, dtype=torch.int32) for x in "qk"}},
        "lengths": {"lengths_q": lengths, "lengths_k": lengths, "sinks": torch.empty(heads)},
        "padding mask": {"mask": torch.empty(batch, 1, 1, length, dtype=torch.bool)},
        "bias of heads": {"bias": torch.empty(1, heads, length, length, dtype=dtype)},
        "bias of keys": {"bias": torch.empty(batch, 1, 1, length)},
        "prefix": {"causal": True, "prefix_lengths": lengths},
        "prefix and window": {"causal": True, "window_left": 100, "prefix_lengths": lengths},
        "dropout": {"dropout_p": 0.1, "seed": torch.empty(1, dtype=torch.int64), "causal": True},
        "alibi": {"alibi_slopes": torch.empty(heads), "causal": True},
        "softcap": {"softcap": 30.0, "causal": True, "window_left": 100},
        "everything": {
            **by_pair, "alibi_slopes": torch.empty(heads), "softcap": 30.0, "dropout_p": 0.1, "window_left": 9,
            "seed": torch.empty(1, dtype=torch.int64), "sinks": torch.empty(heads), "lengths_q": lengths,
            "lengths_k": lengths, "prefix_lengths": lengths, "causal": True,
        },
    }  # fmt: skip
    return options[name]


CASES = [
    "full", "causal", "window", "packed", "lengths", "padding mask", "bias of heads", "bias of keys", "prefix",
    "prefix and window", "dropout", "alibi", "softcap", "everything",
]  # fmt: skip
QUICK = [("sm_90", "causal", 64), ("sm_90", "causal", 128), ("sm_80", "window", 128), ("sm_100", "packed", 128),
         ("sm_90", "everything", 128), ("sm_80", "everything", 64), ("sm_90", "full", 192),
         ("sm_90", "prefix", 128), ("sm_80", "prefix and window", 64),
         ("sm_100", "causal", 512)]  # fmt: skip


def problem_of(target: str, kernel: str, found: Compiled, half: bool) -> str | None:
    """What is wrong with a kernel of products."""
    try:
        found.check(tensor_cores=half, spills_outside=target == "sm_90")
    except AssertionError as error:
        return str(error)
    if found.shared > tuning_attention.SHARED[target]:
        return f"{found.shared} bytes of shared memory"
    if adds := re.search(r"\b(?:atom|red)\.\w|\b(?:global|flat|buffer)_atomic\w*|\bds_(?:pk_)?add_\w+", found.text):
        return f"an atomic operation: {adds[0]}"
    # The compiler may drop a loop that it cannot make, without an error.
    bodies = loops(found.text)
    if not bodies:
        return "no loop"
    if half and not any(product in body for body in bodies for product in set(found.products)):
        return "no product in a loop"
    return None


def check(target: str, name: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """``heads``: features of q and of v."""
    made = plans(target, dtype, case(name, dtype), *heads)
    pointed = plans(target, dtype, case(name, dtype), *heads, describable=False)
    made += [other for plan, other in zip(made, pointed, strict=True) if plan.arguments.get("TMA")]
    half = dtype != torch.float32
    problems = []
    for plan in made:
        kernel = plan.kernel.__name__
        found = compile_plan(target, plan)
        what = f"{kernel} {name} {heads} {dtype} {plan.options}"
        if kernel in ("attention_delta", "attention_backward_sinks", "attention_merge"):
            if found.spilled:
                problems.append(f"{what}: {found.spilled} bytes spilled")
            continue
        problem = problem_of(target, kernel, found, half)
        if problem is not None:
            problems.append(f"{what}: {problem}")
        reads_rows = kernel in ("attention_forward", "attention_backward_queries")
        wide = plan.arguments["BLOCK_M"] >= 64 and reads_rows
        if target == "sm_90" and half and wide and "wgmma.mma_async" not in found.products:
            problems.append(f"{what}: no wgmma")
        if target == "sm_100" and half and wide and "tcgen05.mma" not in found.products:
            problems.append(f"{what}: no tcgen05")
        if plan.arguments.get("TMA", False) != ("cp.async.bulk.tensor" in found.text):
            problems.append(f"{what}: TMA is {plan.arguments['TMA']}")
    assert not problems, "\n".join(problems)


UNALIKE = [(15, 63), (31, 15), (63, 15), (63, 31), (65, 16), (65, 64), (97, 31), (127, 63), (129, 127), (255, 33),
           (128, 16), (64, 32), (16, 128)]  # fmt: skip


def check_unalike(name: str, heads: tuple[int, int]) -> None:
    """Rows that are not aligned, or keys and values that are not laid out alike in shared memory."""
    for plan in plans("sm_90", HALF, case(name), *heads):
        found = compile_plan("sm_90", plan)
        what = f"{plan.kernel.__name__} {name} {heads} {plan.options}"
        assert not found.unset, f"{what}: {found.unset}"
        if plan.kernel.__name__ == "attention_forward":
            assert (problem := problem_of("sm_90", "attention_forward", found, True)) is None, f"{what}: {problem}"


@pytest.mark.parametrize("heads", UNALIKE[3:5], ids=str)
def test_heads_that_are_laid_out_unalike(heads: tuple[int, int]) -> None:
    check_unalike("causal", heads)


@pytest.mark.tiles
@pytest.mark.parametrize("heads", UNALIKE, ids=str)
@pytest.mark.parametrize("name", ["full", "window", "alibi"])
def test_all_heads_that_are_laid_out_unalike(name: str, heads: tuple[int, int]) -> None:
    check_unalike(name, heads)


@pytest.mark.parametrize(("target", "name", "width"), QUICK)
def test_tiles_fit_their_machine(target: str, name: str, width: int) -> None:
    check(target, name, WIDTHS[width], HALF)


@pytest.mark.tiles
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", NVIDIA)
def test_every_tile_fits_its_machine(target: str, name: str, width: int) -> None:
    check(target, name, WIDTHS[width], HALF)


@pytest.mark.tiles
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["causal", "window", "packed", "everything"])
def test_every_tile_fits_its_machine_in_other_dtypes(name: str, width: int) -> None:
    for target in ("sm_80", "sm_90"):
        check(target, name, WIDTHS[width], torch.float16)
        if width <= 256:
            check(target, name, WIDTHS[width], torch.float32)


@pytest.mark.parametrize(("target", "width"), [("sm_90", 64), ("sm_90", 128), ("sm_100", 64)])
def test_programs_that_make_several_tiles_fit(target: str, width: int) -> None:
    """No table asks for one yet."""
    plan = plans(target, HALF, case("causal"), width, width, backward=False)[0]
    plan.arguments["PERSISTENT"] = True
    assert problem_of(target, "attention_forward", compile_plan(target, plan), True) is None


def decoding(name: str, heads: int) -> Options:
    """A case of four queries, of ``heads`` query heads."""
    options = case(name)
    for key in options.keys() & {"bias", "mask"}:
        options[key] = options[key][:, :heads, :4]
    for key in options.keys() & {"sinks", "alibi_slopes"}:
        options[key] = options[key][:heads]
    return options


@pytest.mark.parametrize(
    ("name", "targets"),
    [("causal", ["sm_90"]), pytest.param("causal", ["sm_80", "sm_100"], marks=pytest.mark.full),
     pytest.param("packed", NVIDIA, marks=pytest.mark.full),
     pytest.param("everything", NVIDIA, marks=pytest.mark.tiles),
     *(pytest.param(name, ["gfx942"], marks=pytest.mark.tiles) for name in ("causal", "packed", "everything"))],
)  # fmt: skip
def test_decoding_fits_its_machine(name: str, targets: list[str]) -> None:
    for target in targets:
        for heads in (2, 4):  # of the query; 2 of the key
            for dim in (64, 128, 256, 512):
                for plan in plans(
                    target, HALF, decoding(name, heads), dim, dim, queries=4, heads=heads, backward=False
                ):
                    if plan.kernel.__name__ == "attention_decode":
                        assert problem_of(target, "attention_decode", compile_plan(target, plan), True) is None


@pytest.mark.parametrize("paged", ["queries of one length", "packed queries"])
def test_pages_fit_their_machine(paged: str) -> None:
    batch, page = 2, 16
    options: Options = {"lengths_k": torch.empty(batch, dtype=torch.int64), "causal": True}
    if paged == "packed queries":
        options["cu_seqlens_q"] = torch.empty(batch + 1, dtype=torch.int32)
    table = torch.empty(batch, 32, dtype=torch.int32)
    for target in NVIDIA:
        for queries in (4, 256):
            made = plans(target, HALF, options, 128, 128, queries=queries, keys=page, pages=table, backward=False)
            assert made
            for plan in made:
                if plan.kernel.__name__ != "attention_merge":
                    problem = problem_of(target, plan.kernel.__name__, compile_plan(target, plan), True)
                    assert problem is None, f"{target} {plan.kernel.__name__} {plan.options}: {problem}"


@pytest.mark.tiles
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["causal", "lengths", "padding mask", "dropout", "everything"])
def test_tiles_compile_for_amd(name: str, width: int) -> None:
    check("gfx942", name, WIDTHS[width], HALF)


def test_rows_are_read_sixteen_bytes_at_a_time_and_ahead() -> None:
    forward = plans("sm_90", HALF, case("causal"), 128, 128, backward=False, describable=False)[0]
    assert forward.arguments["ALIGN"] == 8
    text = compile_plan("sm_90", forward).text
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10", text), "no copy of 16 bytes ahead"


HIDDEN = "0fFF800000"  # -inf, the score of a pair that is hidden


def loops_of_products(plan: Plan, target: str) -> list[str]:
    found = compile_plan(target, plan)
    return [body for body in loops(found.text) if any(product in body for product in set(found.products))]


@pytest.mark.parametrize(
    ("name", "hides"),
    [("full", [False, True]), ("causal", [False, True]), ("window", [True, False, True]), ("bias of heads", [True])],
)
def test_tiles_that_all_rows_see_have_a_loop_of_their_own(name: str, hides: list[bool]) -> None:
    """Over keys: in order, whether each loop of products can hide a pair; the last one has the keys' end. After them dq
    has one that takes back what was wrong in sums over all keys."""
    for target in ("sm_80", "sm_90"):
        for plan in plans(target, HALF, case(name), 64, 64):
            if plan.kernel.__name__ in ("attention_forward", "attention_backward_queries"):
                found = [HIDDEN in body for body in loops_of_products(plan, target)]
                takes_back = [True] * (plan.kernel.__name__ == "attention_backward_queries")
                assert found == hides + takes_back, f"{target} {plan.kernel.__name__}"


def test_tiles_of_queries_that_see_all_keys_have_a_loop_of_their_own() -> None:
    """Which of the loops over queries can hide a pair; those over the heads of a group are around them."""
    for name, hides in (("full", {False}), ("causal", {True, False}), ("window", {True})):
        plan = next(p for p in plans("sm_90", HALF, case(name), 64, 64) if "keys" in p.kernel.__name__)
        bodies = loops_of_products(plan, "sm_90")
        inner = [body for body in bodies if not any(other != body and other in body for other in bodies)]
        assert {HIDDEN in body for body in inner} == hides, name


@pytest.mark.parametrize(
    ("name", "what"),
    [("dropout", r"\bmul\.hi\.u32\b"), ("softcap", r"\b(?:rcp|div)\.\S*f32\b"), ("alibi", r"\bcvt\.rn\.f32\.[su]32\b")],
    ids=["Philox", "the quotient of tanh", "a distance"],
)
def test_a_feature_that_is_off_is_no_code(name: str, what: str) -> None:
    """What a feature computes is in a loop of each kernel of products, and in none where it is off."""

    def computed(plan: Plan) -> bool:
        return any(re.search(what, body) for body in loops(compile_plan("sm_90", plan).text))

    for plain, featured in zip(*(plans("sm_90", HALF, case(x), 64, 64) for x in ("full", name)), strict=True):
        if plain.kernel.__name__ != "attention_delta":
            assert not computed(plain), plain.kernel.__name__
            assert computed(featured), featured.kernel.__name__


def test_tf32_only_where_torch_allows_it() -> None:
    """By either of torch's two names for it, of float32 alone; elsewhere its products are exact."""

    def multiplied_as(dtype: torch.dtype) -> set[str]:
        found = plans("sm_90", dtype, case("causal", dtype), 64, 64) + plans("sm_90", dtype, {}, 64, 64, queries=1)
        return {plan.arguments["PRECISION"] for plan in found if "PRECISION" in plan.arguments}

    def listing() -> str:
        return compile_plan("sm_90", plans("sm_90", torch.float32, case("causal"), 64, 64, backward=False)[0]).text

    try:
        assert not re.search(r"\bw?g?mma\b", listing())
        for setting, expected in (("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(setting)
            assert multiplied_as(torch.float32) == {expected}, setting
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert multiplied_as(torch.float32) == {expected}, setting
        assert multiplied_as(HALF) == {"ieee"}
        assert re.search(r"mma\S*\.tf32", listing())
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_no_new_variant_for_another_length_batch_or_stride() -> None:
    for name in ("full", "causal", "lengths", "dropout", "packed"):
        seen = set()
        for batch in (1, 2, 3):
            options = {k: v if "seqlens" not in k and "lengths" not in k else v.new_empty(batch + ("seqlens" in k))
                       for k, v in case(name).items() if isinstance(v, torch.Tensor)}  # fmt: skip
            options = {**{k: v for k, v in case(name).items() if not isinstance(v, torch.Tensor)}, **options}
            for queries, keys, heads in ((17, 33, 4), (64, 1024, 8), (4096, 129, 6)):
                made = plans("sm_90", HALF, {**options, "sinks": None}, 64, 64, batch=batch, queries=queries, keys=keys,
                             heads=heads)  # fmt: skip
                seen |= {variant(plan) for plan in made}
        kernels = 6 if name == "packed" else 4  # a packed batch may hold sequences that decode
        assert len(seen) == kernels, f"{name}: {len(seen)} variants of {kernels} kernels"


def test_no_new_variant_of_decoding_for_another_length_batch_or_page() -> None:
    """One a size of its tile: the queries of a group of heads, rounded up to 16, 32 or 64."""
    lengths, table = torch.empty(3, dtype=torch.int64), torch.empty(3, 40, dtype=torch.int32)
    for options, paged in (({"causal": True}, False), ({"causal": True, "lengths_k": lengths}, True)):
        seen: dict[str, set] = {}
        for queries, keys, group in itertools.product((1, 2, 7, 16), (16, 33, 5000), (1, 2, 4)):
            for batch in (3,) if paged else (1, 3):
                pages = table[:, :3].contiguous() if paged and keys == 33 else table if paged else None
                made = plans("sm_90", HALF, options, 64, 64, batch=batch, queries=queries, keys=keys, heads=2 * group,
                             pages=pages, backward=False)  # fmt: skip
                for plan in made:
                    seen.setdefault(plan.kernel.__name__, set()).add(variant(plan))
        assert {name: len(variants) for name, variants in seen.items()} == {"attention_decode": 3, "attention_merge": 1}


def test_the_number_of_variants_is_known() -> None:
    """Of one dtype and head dimension: one a feature set, however it is called."""
    names = ["full", "causal", "window", "lengths", "padding mask", "dropout", "alibi", "everything"]
    found = {variant(plan) for name in names for plan in plans("sm_90", HALF, case(name), 128, 128)}
    # Delta and two gradients and the forward for each set of features, the sinks of three, and the bias of the last.
    assert len(found) == 4 * len(names) + 3 + 1


def test_each_feature_multiplies_the_variants_by_a_known_number() -> None:
    """All there are of the forward kernel for one dtype and head dimension: the product of these."""
    lengths, sequences = torch.empty(2, dtype=torch.int64), torch.empty(3, dtype=torch.int32)

    def pairs(dtype: torch.dtype, keys: int) -> list[torch.Tensor]:
        whole = torch.empty(2, 4, 256, keys, dtype=dtype)
        by_key = [whole, whole[:, :, :1], whole[..., :1], whole[:, :, :1, :1], whole[:1], whole[:, :1]]
        return [*by_key, whole.transpose(2, 3).contiguous().transpose(2, 3)]

    axes: dict[str, tuple[int, list[Options]]] = {
        "layout": (5, [
            {}, {"lengths_q": lengths}, {"lengths_k": lengths}, {"lengths_q": lengths, "lengths_k": lengths},
            {"cu_seqlens_q": sequences, "cu_seqlens_k": sequences},
        ]),
        "right limit": (2, [{}, {"causal": True}, {"causal": True, "window_right": 5}, {"window_right": 100}]),
        "left limit": (2, [{}, {"window_left": 0}, {"window_left": 100}]),
        "prefix": (2, [{}, {"prefix_lengths": lengths}]),
        "align": (1, [{}, {"bottom_right": False}]),
        "softcap": (2, [{}, {"softcap": 1.0}, {"softcap": 30.0}]),
        "slopes": (2, [{}, {"alibi_slopes": torch.empty(4)}]),
        "dropout": (2, [{}, *({"dropout_p": p, "seed": lengths[:1]} for p in (0.1, 0.5, 1.0))]),
        "sinks": (3, [{}, {"sinks": torch.empty(4)}, {"sinks": torch.empty(4, dtype=HALF)}]),
        "scale": (2, [{}, {"scale": 1.0}, {"scale": -1.0}]),
        "mask": (7, [{}, *({"mask": x} for n in (256, 250) for x in pairs(torch.bool, n))]),
        "bias": (13, [{}, *({"bias": x} for n in (256, 250) for d in (HALF, torch.float32) for x in pairs(d, n))]),
    }  # fmt: skip
    for name, (count, given) in axes.items():
        found = set()
        for options in given:
            keys = next((options[x].shape[3] for x in ("bias", "mask") if x in options), 256)
            keys = 256 if keys == 1 else keys
            made = plans("sm_90", HALF, options, 128, 128, keys=keys, backward=False)
            found |= {variant(plan) for plan in made if plan.kernel.__name__ == "attention_forward"}
        assert len(found) == count, f"{name}: {len(found)} variants"
