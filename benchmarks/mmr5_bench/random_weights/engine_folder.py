"""An engine folder of random weights, as ``mmr5-export`` writes one, without any checkpoint.

For what starts from files: how long loading takes. 6.4 GB for int4 at the 7B's shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmr5_bench.random_weights.shapes import (
    PREPROCESSOR,
    Quant,
    Shape,
    config_of,
    generation_of,
    load_formats,
)
from mmr5_bench.random_weights.tensors import RandomTensors
from mmr5_bench.random_weights.tokens import WHOLE_WORDS, padded_tokenizer_json
from mmr5_export.plan import make_plan
from mmr5_export.processor import image_settings, pixel_budget
from mmr5_export.write import TensorWriter
from mmr5_runtime.artifact import file_sha256, tool_versions, write_manifest
from mmr5_runtime.manifest import FileEntry, Manifest, Source, TemplateRef
from mmr5_runtime.manifest import Quant as Stored
from mmr5_runtime.prompt import DEFAULT_PROFILE, load_template
from mmr5_runtime.spec import ModelSpec


def write_random_engine(
    folder: Path, shape: Shape, quant: Quant, device: torch.device | str = "cpu"
) -> Path:
    """Writes the whole engine, drawn on ``device``, into a new ``folder`` and returns it.

    OSError where the disk does not take it; ValueError for an unknown shape or quant.
    """
    return write_engine_of(folder, config_of(shape), f"random {shape}", quant, device)


def write_engine_of(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    quant: Quant,
    device: torch.device | str = "cpu",
) -> Path:
    """:func:`write_random_engine` of the model that a ``config.json`` describes, called ``name``.

    Special tokens begin at the config's ``bos_token_id``. Raises ValueError for an unknown quant.
    """
    generation = generation_of(config)
    spec = ModelSpec.from_hf_config(config, generation)
    formats = load_formats(spec, quant)
    plan = make_plan(spec, formats)
    folder.mkdir(parents=True)
    drawn = RandomTensors(spec, formats, device)
    with TensorWriter(folder, plan.stored) as writer:
        for tensor in plan.stored:
            writer.write(tensor.name, drawn.get(tensor.name).cpu())
        writer.finish()
    texts = {
        "tokenizer.json": padded_tokenizer_json(config["bos_token_id"], WHOLE_WORDS),
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps(generation),
        "preprocessor_config.json": json.dumps(PREPROCESSOR),
    }
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    template = load_template(DEFAULT_PROFILE)
    manifest = Manifest(
        created_by=tool_versions(),
        source=Source(name, None, {}),
        spec=spec,
        quant=Stored(quant, "random", formats),
        template=TemplateRef(template.name, template.sha256),
        pixel_budget=pixel_budget(PREPROCESSOR),
        image=image_settings(PREPROCESSOR, spec.vision),
        files={
            path.name: FileEntry(file_sha256(path), path.stat().st_size)
            for path in sorted(folder.iterdir())
        },
        tensors={tensor.name: tensor.file for tensor in plan.stored},
        report={},
    )
    write_manifest(folder, manifest)
    return folder
