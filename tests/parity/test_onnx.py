"""The graphs in ONNX Runtime against the native engine: every stage, and whole replies.

Dense ones agree to 1e-4, absolutely, in every stage; measured, on an x86-64 with AVX2, were at most
8e-6 for the random models and 4e-5 for mini, whose logits reach 22. The golden of a quantized
linear is the native one, with the rounding that ONNX Runtime does to its input done here: what is
left is the order of sums. Behind several of them a sum that ends in another last bit makes a code
fall on the other side of a half, now and then, so whole models are only as close as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from helpers.exporting import quick_export
from helpers.inputs import GRIDS, random_pages, random_prompt
from helpers.tiny import make_hf_model, tiny_configs, write_checkpoint
from mmr5_export.onnx.graph import Graph
from mmr5_export.onnx.ort import add_graphs
from mmr5_export.onnx.ort_decoder import OPSET
from mmr5_export.onnx.ort_linear import CONTRIB, GraphWeights, activation_block
from mmr5_export.onnx.stored import stored_places
from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.engine import Engine
from mmr5_runtime.linear import Linear
from mmr5_runtime.loading import load_engine
from mmr5_runtime.model import Model, embed_prompt, prefill
from mmr5_runtime.onnx.files import GRAPHS
from mmr5_runtime.onnx.session import open_session
from mmr5_runtime.rope import mrope_positions
from mmr5_runtime.spec import linear_shapes
from mmr5_runtime.types import ExportError

TOLERANCE = 1e-4  # absolute error of a dense engine
STEPS = 32
SUMS = 2e-6  # relative error of a linear whose sums are ordered otherwise
ONE_CODE = 2e-3  # and of one in which a code of the input was rounded the other way
# Of a whole model in which a few codes were rounded the other way; 2.6e-2 is the most seen.
ROUNDING = 5e-2
CONFIGS = ["three_heads", "tied", "narrow_heads"]
# Those of mini unless a checkpoint is named; what the vision tower or the head is stored as too.
QUANTIZED: dict[str, dict[str, Any]] = {
    "int4": {"quant": "int4"},
    "int4-asymmetric": {"quant": "int4", "lm_head": "int4", "group_size": 32, "symmetric": False},
    "int4-asymmetric-one-group": {"quant": "int4", "symmetric": False},
    "int8": {"quant": "int8"},
    "int8-weight-only": {"quant": "int8-weight-only"},
    "vision-int8": {"quant": "bf16", "quantize_vision": "int8"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Engine folders with graphs: dense ones by tiny config or "mini", quantized ones of mini."""
    root = tmp_path_factory.mktemp("graphs")

    @cache
    def make(name: str) -> Path:
        options = QUANTIZED.get(name, {"quant": "bf16"})
        source = "mini"
        config = tiny_configs().get(name) if name in CONFIGS else None
        if name == "narrow_heads":
            # Patches of 8 pixels; their heads of 12 values are none that ONNX Runtime takes.
            config = tiny_configs()["small_patches"]
            config.text_config.hidden_size = config.vision_config.out_hidden_size = 48
            config.text_config.rope_parameters["mrope_section"] = [1, 1, 2]
        if name == "int4-asymmetric-one-group":  # 128 columns: an odd number of groups
            config = tiny_configs()["int4"]
        if config is not None:
            model = make_hf_model(config, seed=6)
            source = str(write_checkpoint(model, root / f"{name}-checkpoint"))
        quick_export(source, output=root / name, **options)
        add_graphs(root / name)
        return root / name

    return make


def _load(folder: Path, backend: str) -> Engine:
    return load_engine(
        folder,
        device="cpu",
        dtype="auto",
        min_pixels=None,
        max_pixels=None,
        check_hashes=False,
        backend=backend,
    ).engine


def _round_inputs(block: int) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    """Rounds every ``block`` columns of a linear's input to 8 bits with a scale of their own."""

    def round_input(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        blocks = inputs[0].unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = (blocks / torch.where(scale == 0, 1, scale)).round()
        return ((codes * scale).flatten(-2),)

    return round_input


def _with_its_rounding(engine: Engine) -> Engine:
    """The native engine, its weight-only linears rounding their inputs as MatMulNBits does."""
    assert isinstance(engine.model, Model)
    for module in engine.model.modules():
        if isinstance(module, Linear) and module.prepared.format is not None:
            block = activation_block(module.prepared.format, module.prepared.k)
            if block is not None:
                module.register_forward_pre_hook(_round_inputs(block))
    return engine


def _replies(engine: Engine, chosen: list[int] | None = None) -> Iterator[Tensor]:
    """Page embeddings, a prompt's logits, then those of ``STEPS`` decode steps.

    The tokens read are ``chosen``, or the most likely ones, which are put into it.
    """
    spec, model = engine.spec, engine.model
    ids, pages = random_prompt(spec, GRIDS, 3), random_pages(spec, GRIDS, 3)
    embeddings = [engine.encode_page(page, grid) for page, grid in zip(pages, GRIDS, strict=True)]
    yield from embeddings
    positions, position = mrope_positions(ids, GRIDS, spec)
    embeds, arena = embed_prompt(model, ids, embeddings), model.new_arena(len(ids) + STEPS)
    cut = len(ids) // 3  # in the middle of a page: the rest is read behind what is cached
    parts = [
        prefill(model, embeds[a:b], positions[:, a:b], arena, all_logits=True)
        for a, b in ((0, cut), (cut, cut + 1), (cut + 1, len(ids)))
    ]
    yield from parts
    logits, given = parts[-1][-1], chosen is not None and len(chosen) > 0
    for step in range(STEPS):
        token = chosen[step] if chosen is not None and given else int(logits.argmax())
        if chosen is not None and not given:
            chosen.append(token)
        logits = engine.step(torch.tensor([[token]]), torch.tensor([[position + step]]), [arena])
        logits = logits[0, 0]
        yield logits
    yield arena.k[:, :, : arena.length]
    yield arena.v[:, :, : arena.length]


@pytest.mark.parametrize("name", [*CONFIGS, "mini"])
def test_dense_engines_agree_in_every_stage(folder: Callable[[str], Path], name: str) -> None:
    tokens: list[int] = []
    expected = list(_replies(_load(folder(name), "native"), tokens))
    own: list[int] = []
    found = list(_replies(_load(folder(name), "onnxruntime"), own))
    assert own == tokens and len(set(tokens)) > 1
    assert len(found) == len(expected) > STEPS
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_engines_agree_with_the_same_rounding(
    folder: Callable[[str], Path], name: str
) -> None:
    """A smoke test, which finds a wrong part but no wrong rounding: linears are tested below."""
    tokens: list[int] = []
    expected = list(_replies(_with_its_rounding(_load(folder(name), "native")), tokens))
    found = list(_replies(_load(folder(name), "onnxruntime"), tokens))
    for a, b in zip(found, expected, strict=True):
        error = float((a - b).norm() / b.norm())
        assert error <= ROUNDING, error
    steps = slice(-STEPS - 2, -2)
    same = [
        int(a.argmax() == b.argmax()) for a, b in zip(found[steps], expected[steps], strict=True)
    ]
    assert sum(same) >= STEPS - 2  # tokens of a random prompt may be nearly as likely


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_quantized_linear_is_its_golden(
    folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    made = folder(name)
    manifest = read_manifest(made)
    spec, formats = manifest.spec, manifest.formats
    model = _with_its_rounding(_load(made, "native")).model
    assert isinstance(model, Model)
    places = stored_places(made, manifest.tensors)
    groups: dict[str, list[str]] = {_first_of_group(linear): [] for linear in formats}
    for linear in formats:
        groups[_first_of_group(linear)].append(linear)
    generator = torch.Generator().manual_seed(2)
    for first, names in groups.items():
        graph = Graph("linear", OPSET, {CONTRIB: 1})
        columns = linear_shapes(spec, formats)[first][1]
        x = graph.input("x", torch.float32, ["M", columns])
        y = GraphWeights(graph, spec, formats, places).linear(x, *names)
        graph.output("y", y, torch.float32, ["M", "N"])
        path = made / "linear.onnx"  # beside the weights it names
        graph.save(path)
        session = open_session(path)
        path.unlink()
        worst = list[Tensor]()
        for rows in (1, 3, 17, 179):
            size = torch.rand(columns, generator=generator)
            given = torch.randn(rows, columns, generator=generator) * size
            given[-1, : columns // 2] = 0  # whole blocks of zeros
            expected = _native_linear(model, first)(given)
            found = torch.from_numpy(session.run(None, {"x": given.numpy()})[0])
            errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
            worst.append(errors)
            assert errors.max() <= ONE_CODE, (first, rows)
        # A value next to a half may fall on either side of it: reciprocals of scales are not exact.
        assert (torch.cat(worst) <= SUMS).double().mean() > 0.95, first


def test_the_rounding_is_what_makes_the_difference(folder: Callable[[str], Path]) -> None:
    """The golden is needed: without its rounding a linear is a thousand bounds away."""
    model = _load(folder("int4"), "native").model
    assert isinstance(model, Model)
    linear, x = _native_linear(model, "model.layers.0.mlp.down_proj"), torch.randn(4, 512)
    [rounded] = _round_inputs(128)(None, (x,))
    assert (linear(rounded) - linear(x)).norm() > 1000 * SUMS * linear(x).norm()


def _first_of_group(linear: str) -> str:
    """The first of the linears that run as one with it."""
    for part in ("k_proj", "v_proj"):
        linear = linear.replace(part, "q_proj")
    return linear.replace("up_proj", "gate_proj")


def _native_linear(model: Model, first: str) -> Linear:
    path = first.replace("model.layers.", "decoder.layers.").replace("mlp.gate_proj", "mlp.gate_up")
    path = path.replace("self_attn.q_proj", "qkv").replace("self_attn.o_proj", "o_proj")
    path = path.replace("down_proj", "down").replace("attn.", "")
    path = path.replace("visual.merger.mlp.0", "visual.merger_in")
    path = path.replace("visual.merger.mlp.2", "visual.merger_out")
    path = "decoder.lm_head" if first == "lm_head" else path
    found = model.get_submodule(path)
    assert isinstance(found, Linear)
    return found


@pytest.mark.parametrize("name", ["mini", "int4", "int8"])
def test_graphs_pass_the_checker_and_hold_no_weights(
    folder: Callable[[str], Path], name: str
) -> None:
    made = folder(name)
    manifest = read_manifest(made)
    for file in GRAPHS:
        onnx.checker.check_model(str(made / file))
        model = onnx.load(str(made / file), load_external_data=False)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {23}
        outside = [
            {item.key: item.value for item in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.external_data
        ]
        assert {entry["location"] for entry in outside} <= set(manifest.tensors.values())
        inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        assert inside < 2000 and len(outside) > 1


def test_what_onnxruntime_cannot_run_is_refused(tmp_path: Path) -> None:
    model = make_hf_model(tiny_configs()["small_patches"], seed=6)
    quick_export(str(write_checkpoint(model, tmp_path / "source")), "bf16", tmp_path / "engine")
    with pytest.raises(ExportError, match="heads of 12 .* multiple of 8"):
        add_graphs(tmp_path / "engine")
    quick_export("mini", "fp8", tmp_path / "fp8")
    with pytest.raises(ExportError, match="w8a8-fp8.*int4, int8 or bf16"):
        add_graphs(tmp_path / "fp8")
    for made in ("engine", "fp8"):
        assert not list((tmp_path / made).glob("*.onnx"))


def test_columns_that_share_a_rounding_scale() -> None:
    assert activation_block(Format("int8"), 3584) == 128
    assert activation_block(Format("int8"), 48) == 16
    assert activation_block(Format("int8"), 90) is None
    assert activation_block(Format("int8", activations="int8"), 3584) is None
