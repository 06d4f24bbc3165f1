"""Reranking on TensorRT-LLM: the same requests, prompts read and answers decoded elsewhere.

Data flow of one prompt::

    pages -> embeddings (vision engine) -> inputs -> calls -> runner -> tokens -> writing -> order
      \\-> images (LLM API) --------------------------^

``inputs`` makes what the decoder engine is fed, ``calls`` the keywords of every call, ``runner`` is
the one module that imports ``tensorrt_llm`` and ``tensorrt``, ``writing`` makes answers of its
calls and ``answering`` results of those. All of it is tested against stand-ins for the packages
that have the signatures of their sources and compute with our own engine. Nothing of it was ever
run with TensorRT-LLM or TensorRT themselves, which could not be had.

What becomes of the options of a request, on both targets unless one is named:

================================ ==================================================================
option                           on TensorRT-LLM
================================ ==================================================================
top_k, plan (but ``cascade``),   as ever: they are about prompts and orders; lists are cut into
window, stride, anchors, layout, windows where the engine was built for shorter prompts or fewer
min_pixels, max_pixels, samples  image tokens than the context holds
max_new_tokens                   as ever
temperature                      TensorRT-LLM draws: other draws than ours
seed                             engines: repeatable. LLM API: refused before 1.4, which draws with
                                 one seed for all requests
stop="eos", "tag"                as ever; the answer is cut at the same token
stop="determined"                ends at the tag: same order, nothing saved; ``stop_reason`` says so
think="full", "off", a number    as ever; forced text is part of the prompt of a call. LLM API: it
                                 reads prompts as text, and where it would read other tokens than
                                 were written the request ends with an EngineError
think="auto"                     refused: it needs the probabilities of first choices
constrain=True                   not masked: ``status`` is ``ok`` only for a list that the mask
                                 would have let pass as it is, and otherwise ``repaired``
deadline_ms, draft, plan=        refused: they need single steps, logits or our own keys and values
"cascade", image_kv="relocate"
================================ ==================================================================

The checkpoint's repetition penalty holds on engines and, from 1.4 on, in the LLM API; loading warns
where an older one ignores it. ``open_document`` is refused on the LLM API, which encodes pages with
each prompt.

Every result is called ``approximate``: no result of it was compared with ours, and TensorRT-LLM
shares blocks of keys and values between prompts, which may change last bits. ``list_logprob`` is
empty, ``first_token_ms`` is None, and the reasoning of a stream comes as a whole. Options of
``Reranker.load`` that say how our own engine computes (dtype, kernels, prefill, kv, graphs) are
refused, as is ``concurrency``.
"""
