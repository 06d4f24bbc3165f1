"""Every way of running the model that is compared, by the name it has on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from mmr5_bench.peers.base import Peer
from mmr5_bench.peers.bnb import BitsAndBytesPeer
from mmr5_bench.peers.huggingface import REFERENCE_TEMPERATURE, TransformersPeer
from mmr5_bench.peers.llama_server import LlamaServerPeer
from mmr5_bench.peers.names import PEERS
from mmr5_bench.peers.ours import OursPeer
from mmr5_bench.peers.tinygemm import GROUP_SIZES, TinygemmPeer
from mmr5_bench.peers.vllm_offline import VllmPeer


def all_peers() -> tuple[Peer, ...]:
    """Every contender in the order of :data:`~mmr5_bench.peers.names.PEERS`."""
    made: list[Peer] = [
        TransformersPeer(),
        TransformersPeer(temperature=REFERENCE_TEMPERATURE),
        TransformersPeer(cache="static"),
        *(OursPeer(quant) for quant in ("bf16", "int8", "int4")),
        *(OursPeer(quant, "default") for quant in ("bf16", "int8", "int4")),
        BitsAndBytesPeer("nf4"),
        BitsAndBytesPeer("int8"),
        *(TinygemmPeer(size) for size in GROUP_SIZES),
        *(VllmPeer(kind) for kind in ("bf16", "fp8", "gptq")),
        LlamaServerPeer(),
    ]
    return tuple(made)


def choose_peers(names: Sequence[str]) -> tuple[Peer, ...]:
    """The contenders of these names, all for none; ValueError for an unknown name."""
    known = {peer.name: peer for peer in all_peers()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no contender {unknown[0]!r}; there are {', '.join(PEERS)}")
    return tuple(known[name] for name in dict.fromkeys(names or PEERS))
