"""The only module that imports ``tensorrt_llm`` and ``tensorrt``, and only inside functions.

It was run with a stand-in for ``tensorrt_llm`` and never with the package itself, which only
NVIDIA's own package index serves; :class:`VisionSession` was not run at all. So its calls are as
short as they can be, and what goes into them is made in :mod:`mmr5_runtime.trtllm.calls`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr5_runtime.rope import Grid
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.trtllm import calls
from mmr5_runtime.trtllm.bundle import DECODER, VISION, Bundle
from mmr5_runtime.trtllm.inputs import VISION_OUTPUT, engine_inputs, vision_inputs
from mmr5_runtime.trtllm.prompt import Limits, Runner, RunnerPrompt, Written, written
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.types import EngineError

PACKAGE = "tensorrt_llm"


def installed_version(target: str) -> str:
    """Version of the installed TensorRT-LLM; EngineError unless it serves a bundle's ``target``."""
    version = str(_module(PACKAGE).__version__)
    calls.check_version(version, target)
    return version


def open_runner(bundle: Bundle, spec: ModelSpec, device: torch.device) -> Runner:
    """The runner of a checked bundle.

    Raises EngineError when the package is missing or of another version, without a GPU, when
    engines have not been built, and when they do not load.
    """
    version = installed_version(bundle.target)
    if device.type != "cuda":
        raise EngineError(
            f"TensorRT-LLM runs on an NVIDIA GPU and {device} is none; load the engine where there "
            "is one, or with backend='native'."
        )
    if bundle.target == "llm-api":
        return LlmApiRunner(bundle, spec, version)
    return EngineRunner(bundle, spec, device)


class EngineRunner:
    """TensorRT engines: the decoder in ``ModelRunnerCpp``, the vision tower in a session of ours.

    ``MultimodalModelRunner`` is not used: it passes on neither stop words nor extra ids.
    """

    encodes_pages = False

    def __init__(self, bundle: Bundle, spec: ModelSpec, device: torch.device) -> None:
        """Raises EngineError as :func:`open_runner`, and for engines of another vocabulary."""
        built = bundle.built()
        if built.vocab_size != spec.text.vocab_size:
            raise EngineError(
                f"{bundle.folder / DECODER} was built for a vocabulary of {built.vocab_size} and "
                f"the model has {spec.text.vocab_size}; run {bundle.folder / 'build.sh'} again."
            )
        self._spec, self._device, self._positions = spec, device, built.positions
        self._limits, self._ends = built.limits, calls.Ends.of(spec)
        runtime = _module(f"{PACKAGE}.runtime")
        self._mrope_params: Any = _module(f"{PACKAGE}.layers").MropeParams
        self._vision = VisionSession(bundle.folder / VISION, device)
        folder = (bundle.folder / DECODER).parent
        try:
            self._runner = runtime.ModelRunnerCpp.from_dir(
                **calls.from_dir(str(folder), built.reuse)
            )
        except (RuntimeError, AssertionError, OSError) as error:
            raise EngineError(
                f"{folder} does not load ({error}); run {bundle.folder / 'build.sh'} on this "
                "machine, with the GPU it is to run on."
            ) from error

    @property
    def limits(self) -> Limits:
        return self._limits

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        return self._vision.run(vision_inputs(pixel_values, grid, self._spec.vision))

    def generate(
        self, prompt: RunnerPrompt, limit: int, params: SamplingParams, stops: StopWords | None
    ) -> Written:
        inputs = engine_inputs(prompt, self._spec, self._positions)
        mrope_params = self._mrope_params(**calls.mrope(inputs))
        keywords = calls.engine_generate(inputs, mrope_params, limit, params, self._ends, stops)
        try:
            found = self._runner.generate(**keywords)
        except RuntimeError as error:
            raise EngineError(
                f"TensorRT-LLM failed on a prompt of {len(prompt.token_ids)} tokens ({error}); "
                "pass fewer pages, or build the engine for longer prompts."
            ) from error
        # The output begins with the prompt and is filled up behind the sequence.
        length = int(found["sequence_lengths"][0, 0])
        ids = found["output_ids"][0, 0, len(prompt.token_ids) : length].tolist()
        return written(ids, self._ends.ids, limit, stops)


class VisionSession:
    """One TensorRT engine of the vision tower: a page per run."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises EngineError when the engine does not load on this machine."""
        trt = _module("tensorrt")
        self._trt, self._device = trt, device
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{path} does not load in TensorRT {trt.__version__}, which reads engines of its "
                "own version and GPU only; run build.sh on this machine."
            )
        self._context = self._engine.create_execution_context()

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output for ``inputs`` by name, which are cast to what the engine takes."""
        stream = torch.cuda.current_stream(self._device)
        held = {}
        for name, value in inputs.items():
            held[name] = value.to(self._device, self._dtype(name)).contiguous()
        profile = self._profile({name: tuple(value.shape) for name, value in held.items()})
        self._context.set_optimization_profile_async(profile, stream.cuda_stream)
        for name, value in held.items():
            self._context.set_input_shape(name, tuple(value.shape))
            self._context.set_tensor_address(name, value.data_ptr())
        shape = tuple(self._context.get_tensor_shape(VISION_OUTPUT))
        out = torch.empty(shape, dtype=self._dtype(VISION_OUTPUT), device=self._device)
        self._context.set_tensor_address(VISION_OUTPUT, out.data_ptr())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise EngineError("TensorRT failed to encode a page; build the vision engine again.")
        stream.synchronize()
        return out

    def _dtype(self, name: str) -> torch.dtype:
        kinds = {
            self._trt.DataType.FLOAT: torch.float32,
            self._trt.DataType.HALF: torch.float16,
            self._trt.DataType.BF16: torch.bfloat16,
            self._trt.DataType.INT32: torch.int32,
            self._trt.DataType.INT64: torch.int64,
            self._trt.DataType.BOOL: torch.bool,
        }
        kind: torch.dtype = kinds[self._engine.get_tensor_dtype(name)]
        return kind

    def _profile(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The first optimisation profile that all ``shapes`` lie in."""
        for index in range(self._engine.num_optimization_profiles):
            fits = True
            for name, shape in shapes.items():
                least, _, most = self._engine.get_tensor_profile_shape(name, index)
                fits &= all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
            if fits:
                return index
        raise EngineError(
            f"no profile of the vision engine takes a page of these shapes ({shapes}); pass a "
            "smaller max_pixels, or build the engine for larger pages."
        )


class LlmApiRunner:
    """The PyTorch backend of TensorRT-LLM, which encodes pages itself."""

    encodes_pages = True

    def __init__(self, bundle: Bundle, spec: ModelSpec, version: str) -> None:
        """Raises EngineError as :func:`open_runner`."""
        self._spec, self._ends = spec, calls.Ends.of(spec)
        self._version = calls.check_version(version, bundle.target)
        package, llmapi = _module(PACKAGE), _module(f"{PACKAGE}.llmapi")
        self._sampling_params: Any = package.SamplingParams
        file = bundle.arguments_file(version)
        try:
            arguments = _module("yaml").safe_load(file.read_text(encoding="utf-8"))
            self._limits = calls.llm_limits(arguments)
            kv_cache = llmapi.KvCacheConfig(**arguments[calls.KV_CACHE])
            self._llm = package.LLM(**calls.llm(str(bundle.folder), arguments, kv_cache))
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise EngineError(
                f"{bundle.folder} with {file.name} does not load in TensorRT-LLM {version} "
                f"({error!r}); export it again for this version."
            ) from error

    @property
    def limits(self) -> Limits:
        return self._limits

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        raise EngineError(
            "TensorRT-LLM's LLM API encodes pages itself, with each prompt; rerank pages without "
            "opening a document first."
        )

    def generate(
        self, prompt: RunnerPrompt, limit: int, params: SamplingParams, stops: StopWords | None
    ) -> Written:
        keywords = calls.llm_sampling(limit, params, self._ends, stops)
        inputs = calls.llm_inputs(prompt, self._spec.image_token_id, self._version)
        try:
            found = self._llm.generate(
                **calls.llm_generate(inputs, self._sampling_params(**keywords))
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"TensorRT-LLM failed on a prompt of {len(prompt.token_ids)} tokens ({error}); "
                "pass fewer or smaller pages."
            ) from error
        return written(found.outputs[0].token_ids, self._ends.ids, limit, stops)


def _module(name: str) -> Any:
    """An imported module; EngineError when it is not there or does not import."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise EngineError(f"{name} lacks {error.name}; install it again.") from error
        raise EngineError(
            f"{name.partition('.')[0]} is not installed, and this bundle runs on nothing else; "
            f"install {PACKAGE}=={calls.ENGINE_VERSION} from NVIDIA's package index on a machine "
            "with an NVIDIA GPU, or load the engine with backend='native'."
        ) from error
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{name} cannot be imported ({error}); install it again, together with its driver."
        ) from error
