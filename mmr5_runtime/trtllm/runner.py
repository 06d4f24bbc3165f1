"""The only module that imports ``tensorrt_llm`` and ``tensorrt``, and only inside functions.

It was run with stand-ins for both and never with the packages themselves; ``tensorrt_llm`` is
served by NVIDIA's own package index only. So its calls are as short as they can be, and what goes
into them is made in :mod:`mmr5_runtime.trtllm.calls`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmr5_runtime.decoder import here
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.rope import Grid
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.trtllm import calls
from mmr5_runtime.trtllm.bundle import DECODER, VISION, Bundle, dtype_of
from mmr5_runtime.trtllm.inputs import (
    VISION_OUTPUT,
    engine_inputs,
    followed_by,
    one_pad_per_page,
    vision_inputs,
)
from mmr5_runtime.trtllm.prompt import (
    Limits,
    OpenPrompt,
    Runner,
    RunnerPrompt,
    Written,
    finished,
    written,
)
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.types import EngineError

PACKAGE, TENSORRT = "tensorrt_llm", "tensorrt"


def installed_versions(bundle: Bundle) -> dict[str, str]:
    """Versions of the packages that a bundle runs on; EngineError for what cannot run it."""
    versions = {PACKAGE: str(_module(PACKAGE, bundle).__version__)}
    calls.check_version(versions[PACKAGE], bundle.target)
    if bundle.target == "engine":
        versions[TENSORRT] = str(_module(TENSORRT, bundle).__version__)
    return versions


def gpu_index(device: torch.device) -> int:
    """Number of the GPU that ``device`` is; EngineError when it is none."""
    if device.type != "cuda":
        raise EngineError(
            f"TensorRT-LLM runs on an NVIDIA GPU and {device} is none; load the engine where there "
            "is one, or with backend='native'."
        )
    return torch.cuda.current_device() if device.index is None else device.index


def open_runner(
    bundle: Bundle, spec: ModelSpec, device: torch.device, tokenizer: PromptTokenizer
) -> Runner:
    """The runner of a checked bundle.

    Raises EngineError when the package is missing or of another version, without a GPU, when
    engines have not been built, and when they do not load.
    """
    version = installed_versions(bundle)[PACKAGE]
    index = gpu_index(device)
    if bundle.target == "engine":
        return EngineRunner(bundle, spec, device, index)
    if index:
        raise EngineError(
            f"TensorRT-LLM's LLM API takes the first GPU and not {device}; pass device='cuda:0' "
            f"and start the process with CUDA_VISIBLE_DEVICES={index}."
        )
    return LlmApiRunner(bundle, spec, version, tokenizer)


class EngineRunner:
    """TensorRT engines: the decoder in ``ModelRunnerCpp``, the vision tower in a session of ours.

    ``MultimodalModelRunner`` is not used: it passes on neither stop words nor extra ids.
    """

    encodes_pages = False
    ignores: frozenset[str] = frozenset()

    def __init__(self, bundle: Bundle, spec: ModelSpec, device: torch.device, index: int) -> None:
        """``index``: number of the GPU. Raises EngineError as :func:`open_runner`, and for engines
        of another vocabulary."""
        built = bundle.built()
        if built.vocab_size != spec.text.vocab_size:
            raise EngineError(
                f"{bundle.folder / DECODER} was built for a vocabulary of {built.vocab_size} and "
                f"the model has {spec.text.vocab_size}; run {bundle.folder / 'build.sh'} again."
            )
        self.spec, self.built, self.ends = spec, built, calls.Ends.of(spec)
        self._device = device
        runtime = _module(f"{PACKAGE}.runtime", bundle)
        self.mrope_params: Any = _module(f"{PACKAGE}.layers", bundle).MropeParams
        folder = (bundle.folder / DECODER).parent
        try:
            with here(device):
                self._vision: VisionSession | None = VisionSession(bundle, device)
                self._runner: Any = runtime.ModelRunnerCpp.from_dir(
                    **calls.from_dir(str(folder), built.reuse, index)
                )
        except (RuntimeError, AssertionError, OSError) as error:
            raise EngineError(
                f"{folder} does not load ({error}); run {bundle.folder / 'build.sh'} on this "
                "machine, with the GPU it is to run on."
            ) from error

    @property
    def limits(self) -> Limits:
        return self.built.limits

    @property
    def dtype(self) -> torch.dtype:
        return self.built.dtype

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        assert self._vision is not None
        return self._vision.run(vision_inputs(pixel_values, grid, self.spec.vision))

    def open(self, prompt: RunnerPrompt) -> OpenPrompt:
        return _EnginePrompt(self, prompt)

    def generate(self, keywords: dict[str, Any]) -> Any:
        """What ``ModelRunnerCpp.generate`` gives."""
        with here(self._device):
            return self._runner.generate(**keywords)

    def close(self) -> None:
        self._vision = self._runner = None


class _EnginePrompt:
    """A prompt for the engines; its inputs are made once."""

    def __init__(self, runner: EngineRunner, prompt: RunnerPrompt) -> None:
        self._runner = runner
        self._inputs = engine_inputs(prompt, runner.spec, runner.built.positions)

    def generate(
        self, behind: Sequence[int], limit: int, params: SamplingParams, stops: StopWords | None
    ) -> Written:
        runner = self._runner
        inputs = followed_by(self._inputs, behind, runner.spec)
        mrope_params = runner.mrope_params(**calls.mrope(inputs))
        count = len(inputs.input_ids)
        try:
            found = runner.generate(
                calls.engine_generate(inputs, mrope_params, limit, params, runner.ends, stops)
            )
        except RuntimeError as error:
            raise EngineError(
                f"TensorRT-LLM failed on a prompt of {count} tokens ({error}); pass fewer pages, "
                "or build the engine for longer prompts."
            ) from error
        # The output begins with the prompt and is filled up behind the sequence.
        length = int(found["sequence_lengths"][0, 0])
        ids = found["output_ids"][0, 0, count:length].tolist()
        return written(ids, runner.ends.ids, limit, stops)


class VisionSession:
    """One TensorRT engine of the vision tower: a page per run."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        """Raises EngineError when the engine does not load on this machine."""
        trt, path = _module(TENSORRT, bundle), bundle.folder / VISION
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

    def __init__(
        self, bundle: Bundle, spec: ModelSpec, version: str, tokenizer: PromptTokenizer
    ) -> None:
        """Raises EngineError as :func:`open_runner`."""
        self.image_token_id, self.ends = spec.image_token_id, calls.Ends.of(spec)
        self.tokenizer = tokenizer
        self.ignores = calls.ignored(calls.check_version(version, bundle.target))
        package, llmapi = _module(PACKAGE, bundle), _module(f"{PACKAGE}.llmapi", bundle)
        self._sampling_params: Any = package.SamplingParams
        file = bundle.arguments_file(version)
        try:
            arguments = _yaml(file)
            self._limits = calls.llm_limits(arguments)
            self._dtype = dtype_of(arguments["dtype"])
            kv_cache = llmapi.KvCacheConfig(**arguments[calls.KV_CACHE])
            self._llm: Any = package.LLM(**calls.llm(str(bundle.folder), arguments, kv_cache))
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise EngineError(
                f"{bundle.folder} with {file.name} does not load in TensorRT-LLM {version} "
                f"({error!r}); export it again for this version."
            ) from error

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def encode_page(self, pixel_values: Tensor, grid: Grid) -> Tensor:
        raise EngineError(
            "TensorRT-LLM's LLM API encodes pages itself, with each prompt; use backend='native' "
            "for what needs their embeddings."
        )

    def open(self, prompt: RunnerPrompt) -> OpenPrompt:
        return _ApiPrompt(self, prompt)

    def generate(self, inputs: dict[str, Any], sampling: dict[str, Any]) -> Any:
        """The one output that ``LLM.generate`` gives for one prompt."""
        params = self._sampling_params(**sampling)
        return self._llm.generate(**calls.llm_generate(inputs, params)).outputs[0]

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()


class _ApiPrompt:
    """A prompt for the LLM API; its pages are resized once."""

    def __init__(self, runner: LlmApiRunner, prompt: RunnerPrompt) -> None:
        self._runner = runner
        self._ids = one_pad_per_page(prompt.token_ids, runner.image_token_id)
        self._images: list[Image.Image] = [page.image() for page in prompt.pages]
        self._pixels: PixelBudget = prompt.pixels

    def generate(
        self, behind: Sequence[int], limit: int, params: SamplingParams, stops: StopWords | None
    ) -> Written:
        runner = self._runner
        ids = [*self._ids, *behind]
        self._require_read_alike(ids, behind)
        sampling = calls.llm_sampling(limit, params, runner.ends, stops, runner.ignores)
        try:
            found = runner.generate(calls.llm_inputs(ids, self._images, self._pixels), sampling)
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"TensorRT-LLM failed on a prompt of {len(ids)} tokens and {len(self._images)} "
                f"pages ({error}); pass fewer or smaller pages."
            ) from error
        return finished(found.token_ids, found.finish_reason, runner.ends.ids, stops)

    def _require_read_alike(self, ids: Sequence[int], behind: Sequence[int]) -> None:
        """The API makes text of a prompt's ids and tokenizes that: EngineError for other tokens."""
        tokenizer = self._runner.tokenizer
        if self._runner.image_token_id in behind:
            what = "the model wrote an image token, which the LLM API would take for a page"
        elif tokenizer.text_ids(tokenizer.decode(ids, skip_special=False)) != list(ids):
            what = "the LLM API reads prompts as text, and would read the answer so far, or the "
            what += "question, as other tokens than those that were written"
        else:
            return
        raise EngineError(
            f"TensorRT-LLM cannot go on with this prompt: {what}; pass think='full', or load a "
            "bundle of engines or backend='native'."
        )


def _yaml(file: Path) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise EngineError(
            f"PyYAML is not installed, and {file} cannot be read without it; install pyyaml."
        ) from error
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _module(name: str, bundle: Bundle) -> Any:
    """An imported module; EngineError when it is not there or does not import."""
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != top:
            raise EngineError(f"{name} lacks {error.name}; install it again.") from error
        versions = [calls.ENGINE_VERSION] if bundle.target == "engine" else bundle.arguments()
        raise EngineError(
            f"{top} is not installed, and {bundle.folder} runs on nothing else; install {PACKAGE} "
            f"{' or '.join(versions) or 'of the version it was exported for'} from NVIDIA's "
            "package index on a machine with an NVIDIA GPU, or load the engine with "
            "backend='native'."
        ) from error
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{name} cannot be imported ({error}); install it again, together with its driver."
        ) from error
