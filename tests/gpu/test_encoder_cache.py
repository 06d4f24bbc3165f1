"""Page embeddings in GPU memory, page-locked main memory and on disk: the same bits from each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.reuse.encoder_cache import EncoderCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GIB = 1 << 30
GRID, TOKENS = (1, 40, 60), 600
ENGINE = b"e" * 32


def test_every_tier_gives_back_the_same_bits(tmp_path: Path) -> None:
    device = torch.device("cuda")
    pages = {
        bytes([n]) * 32: torch.randn(TOKENS, 3584, device=device, dtype=torch.bfloat16)
        for n in range(4)
    }
    size = next(iter(pages.values())).nbytes
    config = CacheConfig(embeddings_gib=2 * 2 * size / GIB, gpu_gib=size / GIB, disk=tmp_path)
    cache = EncoderCache(config, device, ENGINE)
    for key, page in pages.items():
        cache.put(key, page, GRID)
    for key in reversed(pages):  # one is on the GPU, at least one more in main memory
        found = cache.get(key, GRID, TOKENS)
        assert found is not None and found.device.type == "cuda"
        assert torch.equal(found.view(torch.int16), pages[key].view(torch.int16))
    stats = cache.stats()
    assert (stats.gpu.entries, stats.gpu.bytes, stats.gpu.hits) == (1, size, 1)
    assert stats.host.hits >= 1 and stats.disk.hits >= 1 and stats.misses == 0
    assert stats.host.hits + stats.disk.hits == 3
    assert stats.host.bytes <= stats.host.limit_bytes  # counted as rounded up by PyTorch
