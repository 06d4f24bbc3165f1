"""The TensorRT-LLM versions that files are written for, and where they differ. Data only.

Requirements were read in the package metadata of the version named, the rest in the project's
sources at commits near the releases. None of the three was installed or run here: their wheels are
served by NVIDIA's own package index only.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmr5_export.options import OptionError


@dataclass(frozen=True)
class Version:
    """One release.

    ``engines``: it still has ``trtllm-build``, the builder of TensorRT engines. ``config_option``
    of ``trtllm-serve`` takes the file of LLM arguments. ``needs`` are the requirements of its wheel
    that have to be right before it is installed.
    """

    name: str
    engines: bool
    config_option: str
    needs: tuple[str, ...]


# 1.2.1 is the last stable release that builds engines. The builder went during the candidates of
# 1.3.0, of which rc22 is the first on PyPI without any requirement of tensorrt.
VERSIONS = {
    version.name: version
    for version in (
        Version(
            "1.2.1",
            engines=True,
            config_option="--extra_llm_api_options",
            needs=("torch>=2.9.1,<=2.10.0a0", "tensorrt~=10.14.1", "transformers==4.57.3"),
        ),
        Version(
            "1.3.0rc22",
            engines=False,
            config_option="--config",
            needs=("torch==2.11.0", "transformers==5.5.4"),
        ),
        Version(
            "1.4.0rc1",
            engines=False,
            config_option="--config",
            needs=("torch~=2.14.0", "transformers==5.5.4"),
        ),
    )
}
ENGINE_VERSION = "1.2.1"


def known_version(name: str) -> Version:
    """The version called ``name``; raises :class:`OptionError` naming those that are known."""
    if name not in VERSIONS:
        raise OptionError(
            f"--trt-version {name} is none that files are known to fit; give one of "
            f"{', '.join(VERSIONS)}."
        )
    return VERSIONS[name]
